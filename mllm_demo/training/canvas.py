"""What lies behind the things of a training picture, and what happens to it afterwards: grounds and damage.

It knows nothing of things, questions or models.
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter


def background(rng: np.random.Generator, size: int) -> Image.Image:
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


def plain(rng: np.random.Generator, size: int) -> Image.Image:
    """A paper-like or dark flat ground, on which charts and tables stand."""
    low, high = (225, 256) if rng.random() < 0.85 else (15, 60)
    return Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(low, high, 3)))


def ink_on(rng: np.random.Generator, ground: np.ndarray) -> tuple[int, int, int]:
    """A colour that can be read on `ground` (RGB); mostly near black or near white."""
    if rng.random() < 0.5:
        dark = float(ground.mean()) > 127
        return tuple(int(v) for v in (rng.integers(0, 50, 3) if dark else rng.integers(210, 256, 3)))
    ink = rng.uniform(0, 255, 3)
    while np.abs(ink - ground).max() < 110:
        ink = rng.uniform(0, 255, 3)
    return tuple(int(v) for v in ink)


def damage(rng: np.random.Generator, image: Image.Image) -> Image.Image:
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
