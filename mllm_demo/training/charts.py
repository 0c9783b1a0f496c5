"""Draws bar, line and pie charts and tables, and knows the value, colour and place of every part.

Of two manners: the plain one has large letters and value axes that end at 10 or 100, told at their ends and middle; the
free one varies what programs that draw charts vary: where axes end, how many ticks they have, frames, the size of
letters, where slices begin. It knows nothing of questions or models.
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from mllm_demo.training.lettering import Line, draw_line, fitting_font
from mllm_demo.training.things import COLOURS, Chart, Thing

TOPS = (10, 100)
DARK, LIGHT = (20, 20, 20), (240, 240, 240)
STEPS = (1, 2, 5, 10, 20, 25, 50)  # between the ticks of a free axis
LETTERS = (0.028, 0.06)  # height of the free manner's, of the picture's
KINDS = ("bar", "line", "pie", "table")


class _Sheet:
    """One chart being drawn: its canvas, font, ink and what has been put on it so far."""

    def __init__(self, rng: np.random.Generator, canvas: Image.Image, font_file: bytes, ink: tuple, free: bool):
        self.rng, self.canvas, self.file, self.ink, self.free = rng, canvas, font_file, ink, free
        self.size = canvas.width
        self.draw = ImageDraw.Draw(canvas)
        self.things: list[Thing] = []
        self.lines: list[Line] = []

    def text(
        self, text: str, x: float, baseline: float, pixels: float, width: float, anchor: float = 0.5,
        ink: tuple | None = None,
    ) -> None:  # fmt: skip
        """`x` is the left edge (anchor 0), the middle (0.5) or the right edge (1) of the text."""
        font = fitting_font(self.file, text, width, pixels)
        left = float(np.clip(x - anchor * font.getlength(text), 1, self.size - 1 - font.getlength(text)))
        line, letters = draw_line(self.canvas, text, font, left, baseline, ink or self.ink)
        self.lines.append(line)
        self.things += letters

    def pixels(self, low: float, high: float) -> float:
        """A height of letters, between these shares of the picture where the manner is the plain one."""
        return self.size * self.rng.uniform(*LETTERS if self.free else (low, high))

    def part(self, name: str, box: tuple, colour: str) -> None:
        self.things.append(Thing("part", name, tuple(float(v) for v in box), colour))


def _shade(rng: np.random.Generator, colour: str) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.uniform(-18, 18, 3), 0, 255))


def _colours(rng: np.random.Generator, count: int, ground: np.ndarray, varied: bool) -> list[str]:
    seen = [name for name, rgb in COLOURS.items() if np.abs(np.array(rgb) - ground).max() > 60]
    return [str(c) for c in rng.choice(seen, count, replace=False)] if varied else [str(rng.choice(seen))] * count


def spaced(rng: np.random.Generator, count: int, top: int) -> list[int]:
    """Different values, far enough apart that the eye can rank them."""
    while True:
        values = rng.integers(1 if top == 10 else 5, top + 1, count)
        if count == 1 or np.diff(np.sort(values)).min() >= 0.06 * top:
            return [int(v) for v in values]


def _scale(rng: np.random.Generator, values: list[int], free: bool, top: int) -> tuple[int, range]:
    """Where the value axis ends, and its ticks."""
    if not free:
        return top, range(0, top + 1, top // 2)
    highest = max(values)
    step = int(rng.choice([step for step in STEPS if 2 <= highest / step <= 10]))
    end = -(-highest // step) * step if rng.random() < 0.5 else int(np.ceil(1.05 * highest))
    return end, range(0, end + 1, step)


def _axes(sheet: _Sheet, top: int, ticks: range, title: str | None) -> tuple[float, float, float, float]:
    """Draws axes and ticks; returns the plot's (x0, y0, x1, y1), y1 being the height of value 0."""
    size, rng = sheet.size, sheet.rng
    pixels = sheet.pixels(0.055, 0.068)
    digits = len(str(max(ticks)))
    x0 = size * 0.03 + 0.7 * pixels * digits if sheet.free else size * (0.05 + 0.032 * digits + 0.02)
    y0, y1 = size * (0.17 if title else 0.08), size * rng.uniform(0.8, 0.93 if sheet.free else 0.86)
    if title:
        tall = size * (rng.uniform(*LETTERS) if sheet.free else 0.075)
        sheet.text(title, size / 2, size * 0.1, tall, size * 0.9)
    if sheet.free and rng.random() < 0.5:
        sheet.draw.rectangle((x0, y0, size * 0.97, y1), outline=sheet.ink, width=1)
    else:
        sheet.draw.line((x0, y0, x0, y1), fill=sheet.ink, width=2)
        sheet.draw.line((x0, y1, size * 0.97, y1), fill=sheet.ink, width=2)
    grid = rng.random() < 0.5
    for tick in ticks:
        y = y1 - (y1 - y0) * tick / top
        sheet.draw.line((x0 - 3, y, size * 0.97 if grid else x0, y), fill=sheet.ink, width=1)
        sheet.text(str(tick), x0 - 5, y + pixels * 0.35, pixels, x0 - 6, 1.0)
    return x0, y0, size * 0.97, y1


def _bars_or_line(sheet: _Sheet, kind: str, labels, values, top: int, title: str | None, varied: bool) -> Chart:
    rng, count, size = sheet.rng, len(labels), sheet.size
    top, ticks = _scale(rng, values, sheet.free, top)
    x0, y0, x1, y1 = _axes(sheet, top, ticks, title)
    ground = np.asarray(sheet.canvas)[2, 2]
    colours = _colours(rng, count, ground, varied and kind == "bar")
    step, fill = (x1 - x0) / count, rng.uniform(0.5, 0.8)
    middles = [x0 + step * (i + 0.5) for i in range(count)]
    heights = [y1 - (y1 - y0) * value / top for value in values]
    shades = {colour: _shade(rng, colour) for colour in dict.fromkeys(colours)}  # in one order, unlike a set
    if kind == "line":
        sheet.draw.line(list(zip(middles, heights, strict=True)), fill=shades[colours[0]], width=3)
    for middle, height, colour in zip(middles, heights, colours, strict=True):
        if kind == "line":
            box = (middle - 6, height - 6, middle + 6, height + 6)
            sheet.draw.ellipse(box, fill=shades[colour])
            sheet.part("point", box, colour)
        else:
            box = (middle - step * fill / 2, height, middle + step * fill / 2, y1 - 1)
            outline = sheet.ink if colour in ("white", "black") else None
            sheet.draw.rectangle(box, fill=shades[colour], outline=outline)
            sheet.part("bar", box, colour)
    pixels, shows_values = sheet.pixels(0.06, 0.075), rng.random() < 0.35
    for label, value, middle, height in zip(labels, values, middles, heights, strict=True):
        sheet.text(label, middle, y1 + pixels * 1.15, pixels, step * 0.94)
        if shows_values:
            sheet.text(str(value), middle, height - 5, pixels * 0.95, step * 0.94)
    regions = tuple((middle - step / 2, y0 - 20, middle + step / 2, size) for middle in middles)
    return Chart(kind, labels, tuple(values), tuple(colours if varied else [None] * count), top, regions)


def slices(rng: np.random.Generator, count: int) -> list[int]:
    """Different percentages of a whole, none of them too small to see."""
    while True:
        shares = rng.dirichlet([2.5] * count) * 100
        values = [int(v) for v in np.round(shares)]
        values[-1] = 100 - sum(values[:-1])
        if min(values) >= 8 and np.diff(np.sort(values)).min() >= 4:
            return values


def _pie(sheet: _Sheet, labels, title: str | None) -> Chart:
    rng, size, count = sheet.rng, sheet.size, len(labels)
    values = slices(rng, count)
    colours = _colours(rng, count, np.asarray(sheet.canvas)[2, 2], True)
    if title:
        sheet.text(title, size / 2, size * 0.1, size * 0.075, size * 0.9)
    radius = size * rng.uniform(0.24, 0.29)
    cx, cy = size * rng.uniform(0.46, 0.54), size * (0.56 if title else 0.5)
    box = (cx - radius, cy - radius, cx + radius, cy + radius)
    angle, regions = rng.uniform(0, 360), []
    pixels = sheet.pixels(0.06, 0.07)
    shows_values = rng.random() < 0.35
    inside = sheet.free and shows_values and rng.random() < 0.7  # values stand in the slices
    if sheet.free and (inside or not shows_values):
        radius = size * rng.uniform(0.24, 0.42) - 2.2 * pixels  # as large as labels leave room for
        box = (cx - radius, cy - radius, cx + radius, cy + radius)
    for label, value, colour in zip(labels, values, colours, strict=True):
        stop = angle + 3.6 * value
        shade = _shade(rng, colour)
        sheet.draw.pieslice(box, angle, stop, fill=shade, outline=None if inside else sheet.ink)
        middle = np.deg2rad((angle + stop) / 2)
        px, py = cx + 0.6 * radius * np.cos(middle), cy + 0.6 * radius * np.sin(middle)
        sheet.part("slice", (px - 10, py - 10, px + 10, py + 10), colour)
        lx, ly = cx + 1.28 * radius * np.cos(middle), cy + 1.2 * radius * np.sin(middle)
        text = f"{label} {value}%" if shows_values and not inside else label
        anchor = 0.5 - 0.5 * np.cos(middle)
        if inside:
            ink = DARK if sum(shade) > 380 else LIGHT
            sheet.text(f"{value}%", px, py + pixels * 0.35, pixels, radius * 0.6, ink=ink)
        sheet.text(text, lx, ly + pixels * 0.35, pixels, size * 0.3, anchor)
        x0, y0, x1, y1 = sheet.lines[-1].box
        regions.append((x0 - 2, y0 - 2, x1 + 2, y1 + 2))
        angle = stop
    return Chart("pie", labels, tuple(values), tuple(colours), 100, tuple(regions))


def _table(sheet: _Sheet, labels, values, title: str | None) -> Chart:
    rng, size = sheet.rng, sheet.size
    top = size * (0.17 if title else 0.06)
    if title:
        sheet.text(title, size / 2, size * 0.1, size * 0.075, size * 0.9)
    row = (size * 0.95 - top) / len(labels)
    left, right = size * 0.06, size * 0.94
    split, pixels = size * rng.uniform(0.5, 0.65), min(sheet.pixels(0.08, 0.12), row * 0.7)
    regions = []
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = top + row * index
        sheet.draw.rectangle((left, y, right, y + row), outline=sheet.ink, width=1)
        baseline = y + row / 2 + pixels * 0.35
        sheet.text(label, left + size * 0.03, baseline, pixels, split - left - size * 0.04, 0.0)
        sheet.text(str(value), (split + right) / 2, baseline, pixels, right - split - 4)
        regions.append((left, y, right, y + row))
    sheet.draw.line((split, top, split, top + row * len(labels)), fill=sheet.ink, width=1)
    return Chart("table", labels, tuple(values), (None,) * len(labels), 100, tuple(regions))


def draw_chart(
    rng: np.random.Generator, canvas: Image.Image, font_file: bytes, ink: tuple, words: tuple[str, ...],
    kind: str | None = None, free: bool = False,
) -> tuple[Chart, list[Thing], list[Line]]:  # fmt: skip
    """Draws one chart over the whole canvas with labels out of `words`, in the plain manner or the free one."""
    kind = kind or str(rng.choice(KINDS, p=[0.45, 0.15, 0.2, 0.2]))
    count = int(rng.integers(2, 5 if kind == "pie" else 6))
    short = [word for word in words if len(word) <= (4 if count > 4 else 5)]
    picked = [str(word) for word in rng.choice(short, count + 1, replace=False)]
    capital = rng.random() < 0.5
    shown = tuple(word.capitalize() if capital else word for word in picked)
    title, labels = (shown[-1] if rng.random() < 0.4 else None), shown[:-1]
    top = int(rng.choice(TOPS))
    sheet = _Sheet(rng, canvas, font_file, ink, free)
    if kind == "pie":
        chart = _pie(sheet, labels, title)
    elif kind == "table":
        chart = _table(sheet, labels, spaced(rng, count, 100), title)
    else:
        chart = _bars_or_line(sheet, kind, labels, spaced(rng, count, top), top, title, rng.random() < 0.6)
    names = tuple(label.lower() for label in chart.labels)
    return replace(chart, labels=names), sheet.things, sheet.lines
