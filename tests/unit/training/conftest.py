import numpy as np
import pytest
from PIL import ImageFont

from mllm_demo.training.art import OBJECT_NAMES, SPRITE_SIZE, TEST_FONTS, TEST_STYLES, TRAIN_FONTS, TRAIN_STYLES, Art


@pytest.fixture(scope="session")
def art() -> Art:
    """Discs of a different colour for every object, and Pillow's own font: enough to draw every kind of scene."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SPRITE_SIZE, :SPRITE_SIZE] - SPRITE_SIZE / 2
    alpha = np.where(x**2 + y**2 < (SPRITE_SIZE / 2) ** 2, 255, 0).astype(np.uint8)
    colours = rng.integers(0, 255, (len(OBJECT_NAMES), 1, 1, 3), np.uint8)
    sprites = np.concatenate(
        (
            np.broadcast_to(colours, (len(OBJECT_NAMES), SPRITE_SIZE, SPRITE_SIZE, 3)),
            np.broadcast_to(alpha[None, ..., None], (len(OBJECT_NAMES), SPRITE_SIZE, SPRITE_SIZE, 1)),
        ),
        axis=-1,
    )
    font = ImageFont.load_default(20).font_bytes
    return Art(
        sprites=dict.fromkeys(TRAIN_STYLES + TEST_STYLES, sprites),
        fonts=dict.fromkeys(TRAIN_FONTS + TEST_FONTS, font),
    )
