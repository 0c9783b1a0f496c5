"""Redraws a training drawing in a manner that no set of art has: outlines, flat colours, other saturations.

So that a thing is known by its form and not by the hand that drew it. It knows nothing of things or pictures.
"""

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps


def _line_art(rng: np.random.Generator, colours: Image.Image, shape: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Dark lines where colours meet and around the whole."""
    width = int(rng.integers(1, 4)) * 2 + 1
    ink = tuple(int(v) for v in rng.integers(0, 50, 3))
    edges = colours.filter(ImageFilter.SMOOTH).filter(ImageFilter.FIND_EDGES).convert("L")
    limit = int(rng.integers(40, 90))
    inside = edges.point(lambda level: 255 * (level > limit)).filter(ImageFilter.MaxFilter(3))
    colours = colours.copy()
    colours.paste(ink, mask=ImageChops.multiply(inside, shape))
    grown = shape.filter(ImageFilter.MaxFilter(width))
    framed = Image.new("RGB", colours.size, ink)
    framed.paste(colours, mask=shape.filter(ImageFilter.MinFilter(3)))
    return framed, grown


def restyled(rng: np.random.Generator, sprite: np.ndarray) -> np.ndarray:
    """uint8 RGBA `[size, size, 4]` of a drawing → the same drawing by another hand."""
    image = Image.fromarray(sprite, "RGBA")
    colours, shape = image.convert("RGB"), image.getchannel("A")
    if rng.random() < 0.5:
        colours = ImageOps.posterize(colours, int(rng.integers(2, 4)))
    if rng.random() < 0.6:
        colours = ImageEnhance.Color(colours).enhance(rng.uniform(0.0, 1.6))
    if rng.random() < 0.4:
        colours = ImageEnhance.Contrast(colours).enhance(rng.uniform(0.6, 1.5))
    if rng.random() < 0.7:
        colours, shape = _line_art(rng, colours, shape)
    colours.putalpha(shape)
    return np.asarray(colours)
