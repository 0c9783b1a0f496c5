"""Renders annotated training pictures from a seed: objects, coloured shapes and words on varied backgrounds.

It knows nothing of questions, models or files; the same `(seed, index, split)` is always the same picture.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mllm_demo.training.art import OBJECT_NAMES, TEST_FONTS, TEST_STYLES, TRAIN_FONTS, TRAIN_STYLES, Art
from mllm_demo.training.words import TEST_WORDS, TRAIN_WORDS

COLOURS = {
    "red": (214, 38, 38), "orange": (245, 135, 25), "yellow": (245, 215, 40), "green": (45, 155, 65),
    "blue": (40, 90, 210), "purple": (135, 60, 180), "black": (25, 25, 28), "white": (248, 248, 248),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
MAX_COUNT = 4
# How often each kind of picture is drawn, and the largest number of letters a word has.
KINDS = {"single": 0.1, "same": 0.27, "objects": 0.16, "shapes": 0.29, "word": 0.12, "mixed": 0.06}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Thing:
    """One drawn thing. `kind`: object / shape / letter; `box`: (x0, y0, x1, y1) in pixels of the scene."""

    kind: str
    name: str
    box: tuple[float, float, float, float]
    colour: str | None = None

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """`image`: uint8 `[size, size, 3]`; `word` is the text on it, if any (its letters are `things` too)."""

    image: np.ndarray
    things: tuple[Thing, ...]
    word: str | None
    kind: str

    def of_kind(self, kind: str) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind == kind)


@dataclass(frozen=True)
class Split:
    """What a set of pictures may use; `name` also separates the random streams of the sets."""

    name: str
    styles: tuple[str, ...]
    fonts: tuple[str, ...]
    words: tuple[str, ...]


TRAIN = Split("train", TRAIN_STYLES, TRAIN_FONTS, TRAIN_WORDS)
# Held out: fonts and words never trained on, backgrounds drawn from another random stream.
HELD_OUT = Split("held-out", TRAIN_STYLES, TEST_FONTS, TEST_WORDS)
UNSEEN_STYLE = Split("unseen-style", TEST_STYLES, TEST_FONTS, TEST_WORDS)
SPLITS = {split.name: split for split in (TRAIN, HELD_OUT, UNSEEN_STYLE)}


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """A flat, graded, striped, blotched or noisy ground, mostly pale or dark so that things stand out."""
    base = rng.uniform(150, 255, 3) if rng.random() < 0.7 else rng.uniform(0, 110, 3)
    style = rng.choice(["flat", "gradient", "stripes", "blotches"], p=[0.35, 0.3, 0.15, 0.2])
    grid = np.linspace(0, 1, size)
    if style == "flat":
        field = np.zeros((size, size))
    elif style == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        field = np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None]
    elif style == "stripes":
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 40) / size
        field = 0.5 * ((np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None]) % period > period / 2)
    else:
        small = Image.fromarray(rng.integers(0, 255, (6, 6), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        field = np.asarray(small) / 255
    tint = rng.uniform(-45, 45, 3)
    pixels = base + field[..., None] * tint
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.uniform(2, 9), (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def _places(rng: np.random.Generator, size: int, sides: list[float]) -> list[tuple[float, float]] | None:
    """Top-left corners for boxes of these sides which overlap by at most a tenth; None if they do not fit."""
    placed: list[tuple[float, float]] = []
    for index, side in enumerate(sides):
        for _ in range(60):
            x, y = rng.uniform(0, size - side, 2)
            gaps = (
                max(abs(x + side / 2 - px - other / 2), abs(y + side / 2 - py - other / 2)) - 0.45 * (side + other)
                for (px, py), other in zip(placed, sides[:index], strict=True)
            )
            if all(gap > 0 for gap in gaps):
                placed.append((x, y))
                break
        else:
            return None
    return placed


def _sides(rng: np.random.Generator, count: int, size: int) -> list[float]:
    low, high = {1: (0.28, 0.9), 2: (0.24, 0.46), 3: (0.2, 0.38), 4: (0.19, 0.34)}[min(count, 4)]
    return [float(size * rng.uniform(low, high)) for _ in range(count)]


def _paste_sprite(rng: np.random.Generator, canvas: Image.Image, sprite: np.ndarray, corner, side: float) -> tuple:
    image = Image.fromarray(sprite, "RGBA")
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC)
    image = image.resize((round(side), round(side)), Image.Resampling.LANCZOS)
    x, y = round(corner[0]), round(corner[1])
    canvas.paste(image, (x, y), image)
    left, top, right, bottom = image.getbbox() or (0, 0, image.width, image.height)
    return (x + left, y + top, x + right, y + bottom)


def _draw_shape(rng: np.random.Generator, canvas: Image.Image, shape: str, colour: str, corner, side: float) -> tuple:
    scale = 3  # drawn larger and reduced, which smooths the edges
    layer = Image.new("L", (round(side) * scale,) * 2)
    draw, extent = ImageDraw.Draw(layer), layer.width - 1
    turn = rng.uniform(-0.3, 0.3)
    if shape == "circle":
        draw.ellipse((0, 0, extent, extent), fill=255)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[shape]
        angles = turn - np.pi / 2 + (np.pi / 4 if shape == "square" else 0) + np.arange(corners) * 2 * np.pi / corners
        radius = np.where(np.arange(corners) % 2, 0.42, 1.0) if shape == "star" else np.ones(corners)
        points = extent / 2 * (1 + radius[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1))
        draw.polygon([tuple(point) for point in points], fill=255)
    layer = layer.resize((round(side),) * 2, Image.Resampling.LANCZOS)
    shade = np.clip(np.array(COLOURS[colour]) + rng.uniform(-18, 18, 3), 0, 255).astype(int)
    x, y = round(corner[0]), round(corner[1])
    canvas.paste(tuple(int(v) for v in shade), (x, y), layer)
    left, top, right, bottom = layer.getbbox()
    return (x + left, y + top, x + right, y + bottom)


def _draw_word(rng, canvas: Image.Image, word: str, font_file: bytes, top_range: tuple[float, float]) -> list[Thing]:
    size = canvas.width
    pitch = size * rng.uniform(0.138, min(0.205, 0.945 / len(word)))  # at 224 pixels at least one cell a letter
    font = ImageFont.truetype(BytesIO(font_file), round(pitch * rng.uniform(1.0, 1.25)))
    shown = word.upper() if rng.random() < 0.75 else word.lower()
    left = rng.uniform(size * 0.02, size * 0.98 - pitch * len(word))
    middle = rng.uniform(*top_range)
    ground = np.asarray(canvas).reshape(-1, 3).mean(0)
    ink = rng.uniform(0, 255, 3)
    while np.abs(ink - ground).max() < 110:
        ink = rng.uniform(0, 255, 3)
    draw, things = ImageDraw.Draw(canvas), []
    for index, letter in enumerate(shown):
        x = left + pitch * (index + 0.5)
        draw.text((x, middle + font.size * 0.35), letter, font=font, fill=tuple(int(v) for v in ink), anchor="ms")
        box = (left + pitch * index, middle - pitch / 2, left + pitch * (index + 1), middle + pitch / 2)
        things.append(Thing("letter", letter.upper(), box))
    return things


def _damage(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Blur, brightness and JPEG damage, so that photographs are less foreign."""
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.4:
        levels = np.arange(256) * rng.uniform(0.75, 1.15)
        image = image.point(levels.clip(0, 255).astype(int).tolist() * 3)
    if rng.random() < 0.3:
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(35, 90)))
        image = Image.open(buffer).convert("RGB")
    return image


def render(art: Art, split: Split, seed: int, index: int, size: int = 224, kind: str | None = None) -> Scene:
    """Picture number `index` of a split; `kind` forces one of `KINDS`."""
    rng = np.random.default_rng((seed, sum(split.name.encode()), index))
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    canvas = _background(rng, size)
    ground = np.asarray(canvas).reshape(-1, 3).mean(0)
    visible = [name for name, rgb in COLOURS.items() if np.abs(np.array(rgb) - ground).max() > 80]
    things: list[Thing] = []
    word = None

    def add_objects(names: list[str], style: str | None = None) -> None:
        corners = None
        while corners is None:
            sides = _sides(rng, len(names), size)
            corners = _places(rng, size, sides)
        for name, corner, side in zip(names, corners, sides, strict=True):
            sprites = art.sprites[style or str(rng.choice(split.styles))]
            box = _paste_sprite(rng, canvas, sprites[OBJECT_NAMES.index(name)], corner, side)
            things.append(Thing("object", name, box))

    def add_shapes(pairs: list[tuple[str, str]]) -> None:
        corners = None
        while corners is None:
            sides = _sides(rng, max(2, len(pairs)), size)[: len(pairs)]
            corners = _places(rng, size, sides)
        for (colour, shape), corner, side in zip(pairs, corners, sides, strict=True):
            things.append(Thing("shape", shape, _draw_shape(rng, canvas, shape, colour, corner, side), colour))

    def some_objects(count: int) -> list[str]:
        return [str(name) for name in rng.choice(OBJECT_NAMES, count, replace=False)]

    count = int(rng.integers(1, MAX_COUNT + 1))
    if kind == "single":
        add_objects(some_objects(1))
    elif kind == "same":
        add_objects(some_objects(1) * count, str(rng.choice(split.styles)))
    elif kind == "objects":
        add_objects(some_objects(int(rng.integers(2, MAX_COUNT + 1))))
    elif kind == "shapes":
        shapes = rng.choice(SHAPES, count, replace=rng.random() < 0.5)
        if rng.random() < 0.25:
            shapes = np.repeat(shapes[:1], count)
        add_shapes([(str(rng.choice(visible)), str(shape)) for shape in shapes])
    elif kind == "mixed":
        add_objects(some_objects(int(rng.integers(1, 3))))
        corner = _places(rng, size, [*(t.box[2] - t.box[0] for t in things), size * 0.2])
        if corner is not None and not _covered(corner[-1], size * 0.2, things):
            colour, shape = str(rng.choice(visible)), str(rng.choice(SHAPES))
            box = _draw_shape(rng, canvas, shape, colour, corner[-1], size * 0.2)
            things.append(Thing("shape", shape, box, colour))
    if kind == "word":
        word = str(rng.choice(split.words))
        with_object = rng.random() < 0.3
        if with_object:
            side = size * rng.uniform(0.35, 0.55)
            corner = (rng.uniform(0, size - side), rng.uniform(0, size * 0.6 - side) if side < size * 0.6 else 0)
            name = some_objects(1)[0]
            box = _paste_sprite(rng, canvas, art.sprites[str(rng.choice(split.styles))][OBJECT_NAMES.index(name)],
                                corner, side)
            things.append(Thing("object", name, box))
        middle = (size * 0.78, size * 0.9) if with_object else (size * 0.15, size * 0.85)
        things.extend(_draw_word(rng, canvas, word, art.fonts[str(rng.choice(split.fonts))], middle))
    return Scene(np.asarray(_damage(rng, canvas)), tuple(things), word, kind)


def _covered(corner: tuple[float, float], side: float, things: list[Thing]) -> bool:
    x, y = corner
    return any(x < t.box[2] and t.box[0] < x + side and y < t.box[3] and t.box[1] < y + side for t in things)
