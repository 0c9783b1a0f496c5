"""Draws words, numbers and short lines, and knows the box of every character and of every gap between words.

It knows nothing of what the text means or of what asks about it.
"""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mllm_demo.training.things import Thing

HEIGHTS = (0.075, 0.26)  # of letters, as shares of the picture
SPACE = " "
# What a reader tells apart; capitals are read as their small letters. A gap is narrower than a cell and so seen in no
# empty one: where tokens did not tell it, words were run together, and what stood on the next line was left out.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,%-: ?"
LINE_END = 0.3  # how wide the gap after a line is, that another follows, in heights of its letters


@lru_cache(maxsize=256)
def font_of(file: bytes, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(BytesIO(file), pixels)


@dataclass(frozen=True)
class Line:
    """`text` as drawn, in small letters; `box`: (x0, y0, x1, y1) in pixels."""

    text: str
    box: tuple[float, float, float, float]


def draw_line(
    canvas: Image.Image, text: str, font: ImageFont.FreeTypeFont, left: float, baseline: float, ink: tuple
) -> tuple[Line, list[Thing]]:
    """Writes `text` from `left` on `baseline`; returns it with one `Thing` per character, "letter" or "space"."""
    ImageDraw.Draw(canvas).text((left, baseline), text, font=font, fill=ink, anchor="ls")
    top, bottom = baseline - 0.75 * font.size, baseline + 0.2 * font.size
    edges = [left + font.getlength(text[:index]) for index in range(len(text) + 1)]
    letters = [
        Thing("space" if letter == SPACE else "letter", letter.lower(), (x0, top, x1, bottom))
        for letter, x0, x1 in zip(text, edges, edges[1:], strict=False)
        if letter.lower() in CHARACTERS
    ]
    return Line(text.lower(), (edges[0], top, edges[-1], bottom)), letters


def fitting_font(file: bytes, text: str, width: float, pixels: float) -> ImageFont.FreeTypeFont:
    """The font at `pixels` height, smaller if `text` would be wider than `width`."""
    font = font_of(file, round(pixels))
    wide = font.getlength(text)
    return font if wide <= width else font_of(file, max(8, int(pixels * width / wide)))


def write(
    rng: np.random.Generator, canvas: Image.Image, lines: list[str], file: bytes, band: tuple[float, float], ink: tuple,
    heights: tuple[float, float] = HEIGHTS,
) -> tuple[list[Line], list[Thing]]:  # fmt: skip
    """Writes `lines` below each other somewhere between the heights `band`, in letters as large as chance (`heights`,
    as shares of the picture) and space allow. The end of every line but the last is a "space", too."""
    size, longest = canvas.width, max(lines, key=len)
    tallest = (band[1] - band[0]) / len(lines) / 1.3
    pixels = min(rng.uniform(*heights) * size, tallest)
    font = fitting_font(file, longest, 0.94 * size, pixels)
    pitch = font.size * 1.3
    room = (band[1] - band[0]) - pitch * len(lines)
    top = band[0] + rng.uniform(0, max(room, 1e-3))
    centred, wide = rng.random() < 0.5, font.getlength(longest)
    left = rng.uniform(0.02 * size, max(0.98 * size - wide, 0.021 * size))
    written, letters = [], []
    for index, text in enumerate(lines):
        x = left + (wide - font.getlength(text)) / 2 if centred else left
        line, drawn = draw_line(canvas, text, font, x, top + pitch * (index + 0.8), ink)
        written.append(line)
        letters += drawn
        if index < len(lines) - 1:
            _, y0, x1, y1 = line.box
            letters.append(Thing("space", SPACE, (x1, y0, x1 + LINE_END * font.size, y1)))
    return written, letters
