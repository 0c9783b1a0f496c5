"""The values that describe a training picture: things, charts, scenes and the splits they are drawn from.

It knows nothing of drawing, questions or models.
"""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (214, 38, 38), "orange": (245, 135, 25), "yellow": (245, 215, 40), "green": (45, 155, 65),
    "blue": (40, 90, 210), "purple": (135, 60, 180), "black": (25, 25, 28), "white": (248, 248, 248),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
CHART_PARTS = {"bar": "bar", "line": "point", "pie": "slice", "table": "row"}
MAX_COUNT = 6
ALL = ("things", "shapes")  # how all of them are counted; the second where there is nothing else
CROWD = "crowd"  # a kind of scene: several of one kind of thing beside several of another
PAGE = "page"  # a kind of scene: nothing but words and numbers as small as a chart's


@dataclass(frozen=True)
class Thing:
    """One drawn thing. `kind`: object / shape / letter / space / part (of a chart); `box`: (x0, y0, x1, y1), pixels."""

    kind: str
    name: str
    box: tuple[float, float, float, float]
    colour: str | None = None

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Chart:
    """`kind`: bar / line / pie / table. One label, value and colour (None where all share one) per part.

    `top` is the end of the value axis (100 for a pie), in the same unit as `values`. `regions`: boxes in pixels in
    which everything, a label too, belongs to part i.
    """

    kind: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[str | None, ...]
    top: int
    regions: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Scene:
    """`image`: uint8 `[size, size, 3]`; `lines`: the text written on it, top to bottom, in small letters."""

    image: np.ndarray
    things: tuple[Thing, ...]
    lines: tuple[str, ...] = ()
    chart: Chart | None = None
    kind: str = ""

    def of_kind(self, *kinds: str) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind in kinds)


@dataclass(frozen=True)
class Split:
    """What a set of pictures may use; `name` also separates the random streams of the sets.

    `withheld`: True draws every object only in the style it was never trained in, False never in that one, None
    in any of `styles`.
    """

    name: str
    styles: tuple[str, ...]
    fonts: tuple[str, ...]
    words: tuple[str, ...]
    withheld: bool | None
