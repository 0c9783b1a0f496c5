"""Renders annotated training pictures from a seed: objects, shapes, text, charts and tables on varied grounds.

It knows nothing of questions, models or files; the same `(seed, index, split)` is always the same picture.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mllm_demo.training.art import HELD_OUT_STYLE, OBJECT_NAMES, TEST_FONTS, TEST_STYLES, TRAIN_FONTS, TRAIN_STYLES, Art
from mllm_demo.training.canvas import background, damage, ink_on, plain
from mllm_demo.training.charts import DARK, LIGHT, draw_chart
from mllm_demo.training.lettering import HEIGHTS, SPACE, draw_line, font_of, write
from mllm_demo.training.restyle import restyled
from mllm_demo.training.things import COLOURS, CROWD, MAX_COUNT, PAGE, SHAPES, Scene, Split, Thing
from mllm_demo.training.words import TEST_WORDS, TRAIN_WORDS, invented

SIZE = 384
RESTYLED = 0.4  # of the drawings to learn from
SMALL, SMALL_HEIGHTS = 0.4, (0.045, 0.1)  # of the texts to learn from: letters too small to have a token each
SINGLE = 0.6  # below this, a large text to learn from is one number or word; more words are more to read at once
# How often each kind of picture is drawn; `CROWD` and `PAGE` only where they are asked for.
KINDS = {"single": 0.08, "same": 0.08, "objects": 0.14, "shapes": 0.06, "mixed": 0.04, "text": 0.36, "chart": 0.24}
FREE = 0.6  # of the charts to learn from: as other programs draw them
PAGE_HEIGHTS = (0.045, 0.1)
NUMBERS = 0.15  # of a page's words
STYLES = (str.upper, str.lower, str.capitalize)

TRAIN = Split("train", TRAIN_STYLES, TRAIN_FONTS, TRAIN_WORDS, False)
# Held out: drawings, fonts and words never trained on, backgrounds drawn from another random stream.
HELD_OUT = Split("held-out", TRAIN_STYLES, TEST_FONTS, TEST_WORDS, True)
UNSEEN_STYLE = Split("unseen-style", TEST_STYLES, TEST_FONTS, TEST_WORDS, None)
SPLITS = {split.name: split for split in (TRAIN, HELD_OUT, UNSEEN_STYLE)}


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
    low, high = {1: (0.25, 0.9), 2: (0.22, 0.46), 3: (0.2, 0.38), 4: (0.17, 0.33), 5: (0.15, 0.3)}[min(count, 5)]
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


def _sprite(rng: np.random.Generator, art: Art, split: Split, name: str) -> np.ndarray:
    """A drawing of `name` that the split may show."""
    withheld = HELD_OUT_STYLE[name]
    allowed = [style for style in split.styles if style in art.drawn[name]]
    if split.withheld is not None:
        held = [style for style in allowed if (style == withheld) == split.withheld]
        # Where the withheld style has no drawing of it, another style stands in, in every split.
        allowed = held or allowed
    sprite = art.sprites[str(rng.choice(allowed))][OBJECT_NAMES.index(name)]
    return restyled(rng, sprite) if split.withheld is False and rng.random() < RESTYLED else sprite


def _covered(corner: tuple[float, float], side: float, things: list[Thing]) -> bool:
    x, y = corner
    return any(x < t.box[2] and t.box[0] < x + side and y < t.box[3] and t.box[1] < y + side for t in things)


class _Picture:
    """One picture being drawn."""

    def __init__(self, rng: np.random.Generator, art: Art, split: Split, size: int, kind: str):
        self.rng, self.art, self.split, self.size, self.kind = rng, art, split, size, kind
        sheet = kind == "chart" or (kind in ("text", PAGE) and rng.random() < 0.4)
        self.canvas = plain(rng, size) if sheet else background(rng, size)
        self.ground = np.asarray(self.canvas).reshape(-1, 3).mean(0)
        self.things: list[Thing] = []
        self.lines: list[str] = []
        self.chart = None

    def some_objects(self, count: int) -> list[str]:
        return [str(name) for name in self.rng.choice(OBJECT_NAMES, count, replace=False)]

    def _spots(self, count: int, at_least: int = 1) -> list[tuple[tuple[float, float], float]]:
        corners = None
        while corners is None:
            sides = _sides(self.rng, max(count, at_least), self.size)[:count]
            corners = _places(self.rng, self.size, sides)
        return list(zip(corners, sides, strict=True))

    def objects(self, names: list[str], alike: bool = False) -> None:
        """Drawings of them; all `alike` of one name."""
        sprites = {}
        if alike:
            sprites = {name: _sprite(self.rng, self.art, self.split, name) for name in dict.fromkeys(names)}
        for name, (corner, side) in zip(names, self._spots(len(names)), strict=True):
            drawing = sprites[name] if alike else _sprite(self.rng, self.art, self.split, name)
            self.things.append(Thing("object", name, _paste_sprite(self.rng, self.canvas, drawing, corner, side)))

    def shapes(self, count: int) -> None:
        rng = self.rng
        names = rng.choice(SHAPES, count, replace=count > len(SHAPES) or rng.random() < 0.5)
        if rng.random() < 0.25:
            names = np.repeat(names[:1], count)
        self._shapes(names)

    def _shapes(self, names: Sequence[str]) -> None:
        visible = [name for name, rgb in COLOURS.items() if np.abs(np.array(rgb) - self.ground).max() > 80]
        for name, (corner, side) in zip(names, self._spots(len(names), 2), strict=True):
            self._shape(str(self.rng.choice(visible)), str(name), corner, side)

    def crowd(self) -> None:
        """Three things or more of two kinds: the other scenes seldom have several of one kind beside others."""
        count = int(self.rng.integers(3, MAX_COUNT + 1))
        shapes = self.rng.random() < 0.7
        kinds = self.rng.choice(SHAPES, 2, replace=False) if shapes else self.some_objects(2)
        names = [str(name) for name in self.rng.choice(kinds, count)]
        if shapes:
            self._shapes(names)
        else:
            self.objects(names, alike=True)

    def _shape(self, colour: str, name: str, corner, side: float) -> None:
        box = _draw_shape(self.rng, self.canvas, name, colour, corner, side)
        self.things.append(Thing("shape", name, box, colour))

    def mixed(self) -> None:
        """One or two objects and a coloured shape beside them."""
        self.objects(self.some_objects(int(self.rng.integers(1, 3))))
        side = self.size * 0.2
        for _ in range(40):
            corner = tuple(self.rng.uniform(0, self.size - side, 2))
            if not _covered(corner, side, self.things):
                self._shape(str(self.rng.choice(list(COLOURS)[:6])), str(self.rng.choice(SHAPES)), corner, side)
                return

    def text(self) -> None:
        rng, size = self.rng, self.size
        band = (0.04 * size, 0.96 * size)
        if rng.random() < 0.25:
            side = size * rng.uniform(0.35, 0.55)
            name = self.some_objects(1)[0]
            corner = (rng.uniform(0, size - side), rng.uniform(0, max(size * 0.62 - side, 1)))
            drawing = _sprite(rng, self.art, self.split, name)
            self.things.append(Thing("object", name, _paste_sprite(rng, self.canvas, drawing, corner, side)))
            band = (0.68 * size, 0.97 * size)
        small = self.split.withheld is False and rng.random() < SMALL
        roll = rng.random()
        if small and roll > 0.25:
            lines = [" ".join(self._word() for _ in range(rng.integers(1, 4))) for _ in range(rng.integers(1, 5))]
        elif roll < 0.25:
            lines = [str(rng.integers(0, 10 ** int(rng.integers(1, 6))))]
        elif roll < (SINGLE if self.split.withheld is False else 0.85) or band[0] > size / 2:
            lines = [self._word()]
        else:
            lines = [" ".join(self._word() for _ in range(rng.integers(1, 3))) for _ in range(rng.integers(1, 4))]
        style = STYLES[rng.integers(3)]
        shown = [style(line) for line in lines]
        font = self.art.fonts[str(rng.choice(self.split.fonts))]
        ink = ink_on(rng, self.ground)
        written, letters = write(rng, self.canvas, shown, font, band, ink, SMALL_HEIGHTS if small else HEIGHTS)
        self.things += letters
        self.lines = [line.text for line in written]

    def page(self) -> None:
        """Small words and numbers over the whole picture: some 80 cells of letters, where a chart has a dozen."""
        rng, size = self.rng, self.size
        ink, baseline = ink_on(rng, self.ground), 0.0
        while True:
            font = font_of(self.art.fonts[str(rng.choice(self.split.fonts))], round(size * rng.uniform(*PAGE_HEIGHTS)))
            baseline += font.size * rng.uniform(1.1, 1.7)
            if baseline > 0.98 * size:
                return
            left, gap = rng.uniform(0, 0.1 * size), None
            while left + font.getlength(word := self._word_or_number()) < size:
                line, letters = draw_line(self.canvas, word, font, left, baseline, ink)
                _, y0, end, y1 = line.box
                if gap is not None:
                    self.things.append(Thing("space", SPACE, (gap, y0, left, y1)))
                self.things += letters
                self.lines.append(line.text)
                gap, left = end, end + font.size * rng.uniform(0.3, 1.2)

    def _word_or_number(self) -> str:
        if self.rng.random() < NUMBERS:
            return str(self.rng.integers(0, 10 ** int(self.rng.integers(1, 4))))
        return STYLES[self.rng.integers(3)](self._word())

    def _word(self) -> str:
        """A word of the split; in training, often one that nobody uses, so letters are read and not just guessed."""
        if self.split.withheld is False and self.rng.random() < 0.35:
            return invented(self.rng)
        return self.split.words[self.rng.integers(len(self.split.words))]

    def draw_chart(self, kind: str | None) -> None:
        font = self.art.fonts[str(self.rng.choice(self.split.fonts))]
        ink = DARK if self.ground.mean() > 127 else LIGHT
        free = self.split.withheld is False and self.rng.random() < FREE
        self.chart, parts, written = draw_chart(self.rng, self.canvas, font, ink, self.split.words, kind, free)
        self.things += parts
        self.lines = [line.text for line in written]

    def finish(self) -> Scene:
        image = np.asarray(damage(self.rng, self.canvas))
        return Scene(image, tuple(self.things), tuple(self.lines), self.chart, self.kind)


def render(
    art: Art, split: Split, seed: int, index: int, size: int = SIZE, kind: str | None = None, chart: str | None = None
) -> Scene:
    """Picture number `index` of a split; `kind` forces one of `KINDS`, `CROWD` or `PAGE`, `chart` the kind of chart."""
    rng = np.random.default_rng((seed, sum(split.name.encode()), index))
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    picture = _Picture(rng, art, split, size, kind)
    count = int(rng.integers(1, MAX_COUNT + 1))
    if kind == "single":
        picture.objects(picture.some_objects(1))
    elif kind == "same":
        picture.objects(picture.some_objects(1) * count, alike=True)
    elif kind == "objects":
        picture.objects(picture.some_objects(int(rng.integers(2, 6))))
    elif kind == "shapes":
        picture.shapes(count)
    elif kind == CROWD:
        picture.crowd()
    elif kind == "mixed":
        picture.mixed()
    elif kind == "text":
        picture.text()
    elif kind == PAGE:
        picture.page()
    elif kind == "chart":
        picture.draw_chart(chart)
    else:
        raise ValueError(f"There is no kind of scene called {kind!r}: {', '.join((*KINDS, CROWD, PAGE))}.")
    return picture.finish()
