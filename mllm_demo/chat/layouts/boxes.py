"""Boxes of a regular grid laid over a region, and the view a model had of a picture, in the picture's pixels.

It knows nothing of tokens or processors.
"""

from dataclasses import dataclass

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """Where a model's input lies on the original: input pixel (x, y) shows original pixel
    (left + x * x_scale, top + y * y_scale); parts outside the original are padding."""

    left: float
    top: float
    x_scale: float
    y_scale: float

    def box(self, x0: float, y0: float, x1: float, y1: float, size: tuple[int, int]) -> Box | None:
        """That rectangle of the input on the original of `size` (width, height); None if all padding."""
        width, height = size
        box = (
            max(0.0, self.left + x0 * self.x_scale),
            max(0.0, self.top + y0 * self.y_scale),
            min(float(width), self.left + x1 * self.x_scale),
            min(float(height), self.top + y1 * self.y_scale),
        )
        return box if box[0] < box[2] and box[1] < box[3] else None


def grid_boxes(rows: int, cols: int, region: Box) -> list[Box]:
    """`rows` x `cols` equal boxes of `region`, row by row; neighbours share their edge exactly."""
    x0, y0, x1, y1 = region
    xs = [x0 + (x1 - x0) * col / cols for col in range(cols)] + [x1]
    ys = [y0 + (y1 - y0) * row / rows for row in range(rows)] + [y1]
    return [(xs[col], ys[row], xs[col + 1], ys[row + 1]) for row in range(rows) for col in range(cols)]
