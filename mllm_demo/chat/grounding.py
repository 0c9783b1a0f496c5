"""Boxes that an answer names in percent of a picture, `[x1, y1, x2, y2]`, and the picture with them drawn.

It knows nothing of models or pages; what is no box draws nothing.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from mllm_demo.chat.messages import Picture

# Four whole numbers; not an index such as a[1, 2, 3, 4], nor a Markdown link's text.
_BOX = re.compile(r"(?<!\w)\[\s*" + r"\s*,\s*".join([r"(\d{1,3})"] * 4) + r"\s*\](?!\()", re.ASCII)
MAX_BOXES = 12
# Sides of the drawn picture: thin lines on a thumbnail would vanish, and nobody sees more than this in a chat.
MIN_SIDE, MAX_SIDE = 360, 1024
LINE_SHARE = 1 / 64
# Seen on any picture: a bright line between two dark ones.
BRIGHT, DARK = "#ffd60a", "#111111"


@dataclass(frozen=True)
class Box:
    """Corners in whole percent of the picture's width and height, from its upper left; x1 < x2, y1 < y2."""

    x1: int
    y1: int
    x2: int
    y2: int


def find_boxes(text: str) -> tuple[Box, ...]:
    """The boxes that `text` names, each once, in reading order; at most twelve."""
    found = {Box(*map(int, match.groups())): None for match in _BOX.finditer(text)}
    good = [box for box in found if box.x1 < box.x2 <= 100 and box.y1 < box.y2 <= 100]
    return tuple(good[:MAX_BOXES])


def draw_boxes(picture: Picture, boxes: Sequence[Box]) -> Picture:
    """`picture` in a size for the chat with `boxes` drawn; several are numbered in their order."""
    image = picture.to_pil()
    longest = max(image.size)
    scale = min(max(longest, MIN_SIDE), MAX_SIDE) / longest
    if scale != 1:
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    line = max(2, round(max(image.size) * LINE_SHARE))
    pen = ImageDraw.Draw(image)
    edges = [_pixels(box, image.size) for box in boxes]
    for edge in edges:
        pen.rectangle(_grown(edge, line // 2 + 1, image.size), outline=DARK, width=2 * line + 2)
    for edge in edges:
        pen.rectangle(edge, outline=BRIGHT, width=line)
    if len(edges) > 1:
        font = ImageFont.load_default(4 * line)
        for number, (left, top, _, _) in enumerate(edges, start=1):
            tag = pen.textbbox((left + line, top + line), str(number), font=font)
            pen.rectangle((left, top, tag[2] + line, tag[3] + line), fill=BRIGHT, outline=DARK)
            pen.text((left + line, top + line), str(number), fill=DARK, font=font)
    png = io.BytesIO()
    image.save(png, format="PNG", compress_level=1)
    return Picture(png.getvalue(), image.width, image.height, picture.name)


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    left, top = round(box.x1 * width / 100), round(box.y1 * height / 100)
    # The last pixel inside; a box narrower than a pixel is one pixel wide.
    return left, top, max(left, round(box.x2 * width / 100) - 1), max(top, round(box.y2 * height / 100) - 1)


def _grown(edge: Sequence[int], by: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = edge
    return max(left - by, 0), max(top - by, 0), min(right + by, size[0] - 1), min(bottom + by, size[1] - 1)
