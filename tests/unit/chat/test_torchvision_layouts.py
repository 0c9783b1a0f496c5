"""Processors whose pictures need torchvision: with it, bright spots are found again; without, tokens are synthetic.

The spots are those of `test_native_layouts`. What runs everywhere are tokens that the processor itself writes, for
tiles counted by hand.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DeepseekOcr2ImageProcessorPil, DeepseekOcr2Processor
from transformers.utils import is_torchvision_available

from mllm_demo.chat.layout import prompt_tokens

# Without torchvision transformers makes a new stand-in for these classes at every import.
from mllm_demo.chat.layouts.families import (
    Kimi_K25Processor,
    Llama4Processor,
    MiniMaxM3VLProcessor,
    MuseSparkProcessor,
    Step3p7Processor,
)
from mllm_demo.chat.messages import Message
from tests.unit.chat.test_layout import CONFIG, SIZES, SPECIAL, chat, cover, picture, read, seen, tokenizer
from tests.unit.chat.test_native_layouts import cells, check_spots, named

if is_torchvision_available():
    from transformers import (
        Kimi_K25ImageProcessor,
        Llama4ImageProcessor,
        MiniMaxM3VLImageProcessor,
        MuseGlimmerImageProcessor,
        Step3p7ImageProcessor,
    )

with_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="its image processor needs torchvision")
LINE = (200, 20)


OTHER = SimpleNamespace(num_frames=1, fps=1, model_input_names=[])


def with_pictures(kind):
    """`kind` with whatever image processor, and nothing real for videos and sounds."""

    class PictureProcessor(kind):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    return PictureProcessor


def step(images=None):
    """A token stands for 8 x 8 pixels: 6 x 6 for the whole picture, 4 x 4 for a tile of 32 pixels."""
    sizes = {"size": {"height": 48, "width": 48}, "patch_size": 32, "vision_patch_size": 4, "downsampler_stride": 2}
    if images is None:
        images = SimpleNamespace(**sizes, _is_extreme_aspect=lambda width, height: width == 120)
    else:
        images = images(**sizes, do_normalize=False)
    marks = ["<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>"]
    return with_pictures(Step3p7Processor)(images, tokenizer([*SPECIAL, *marks]), chat_template=chat("<im_patch>"))


def muse(images=None):
    names = {"image_token": "<|patch|>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    declared = {"patch_size": 4, "merge_size": 2}
    images = images(**declared, max_image_tokens=256, do_normalize=False) if images else SimpleNamespace(**declared)
    return with_pictures(MuseSparkProcessor)(images, OTHER, named(names), OTHER, chat_template=chat("<|patch|>"))


def kimi():
    """Pictures of more than 300 patches are shrunk."""
    images = Kimi_K25ImageProcessor(
        patch_size=8, merge_size=2, size={"max_height": 40, "max_width": 40}, max_patches=300, do_normalize=False
    )
    words = named({"image_token": "<|media_pad|>", "video_token": "<|video|>"})
    return with_pictures(Kimi_K25Processor)(images, words, OTHER, chat_template=chat("<|media_pad|>"))


def minimax():
    images = MiniMaxM3VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 64 * 64}, do_normalize=False
    )
    kind = with_pictures(MiniMaxM3VLProcessor)
    words = tokenizer([*SPECIAL, kind.IMAGE_TOKEN, kind.VIDEO_TOKEN, kind.VISION_START_TOKEN, kind.VISION_END_TOKEN])
    return kind(images, words, OTHER, chat_template=chat(kind.IMAGE_TOKEN))


def llama4():
    """A token stands for 16 x 16 pixels of a tile of 64."""
    side = {"height": 64, "width": 64}
    images = Llama4ImageProcessor(size=side, max_patches=6, resize_to_max_canvas=False, do_normalize=False)
    marks = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"]
    marks += ["<|tile_x_separator|>", "<|tile_y_separator|>"]
    words = tokenizer([*SPECIAL, *marks])
    return with_pictures(Llama4Processor)(images, words, patch_size=8, chat_template=chat("<|image|>"))


def brightness(processor, inputs) -> np.ndarray:
    """[image tokens] of one picture: how bright the input behind each token is."""
    images, pixels = processor.image_processor, inputs["pixel_values"].double().numpy()
    if "image_grid_thw" in inputs:
        _, rows, cols = inputs["image_grid_thw"][0].tolist()
        patches = pixels.reshape(rows * cols, -1).mean(axis=1)
        if isinstance(processor, MiniMaxM3VLProcessor):  # the patches of a token follow each other
            return patches.reshape(-1, images.merge_size**2).mean(axis=1)
        return cells(patches.reshape(1, rows, cols), rows // images.merge_size, cols // images.merge_size)
    if isinstance(processor, Llama4Processor):
        return cells(pixels.reshape(-1, *pixels.shape[-3:]), 4, 4)
    parts = [inputs["pixel_values_local"].double().numpy()] if "pixel_values_local" in inputs else []
    stride = images.vision_patch_size * images.downsampler_stride
    return np.concatenate([cells(part, *(n // stride for n in part.shape[-2:])) for part in [*parts, pixels]])


PROCESSORS = {
    "kimi-k2.5": kimi,
    "llama 4": llama4,
    "minimax-m3": minimax,
    "muse-spark": lambda: muse(MuseGlimmerImageProcessor),
    "step-3.7": lambda: step(Step3p7ImageProcessor),
}
PADDED = ("kimi-k2.5", "llama 4")


@with_torchvision
@pytest.mark.parametrize("size", [*SIZES, LINE, (40, 24), (48, 40)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_bright_spot_in_a_token_s_box_lights_up_that_token(name, size):
    processor = PROCESSORS[name]()
    _, inputs, tokens = read(processor, Message("user", (picture(*size), "what?")))
    behind = [token for token in tokens if token.modality == "image"]
    assert len(behind) == brightness(processor, inputs).size
    boxed = [number for number, token in enumerate(behind) if token.box]
    assert len(boxed) == len(behind) or name in PADDED or size == LINE
    check_spots(processor, size, behind, boxed, brightness)


@with_torchvision
@pytest.mark.parametrize("name", PROCESSORS)
def test_boxes_cover_each_picture_once_and_tiles_with_the_whole_twice(name):
    for tokens, size in zip(seen(PROCESSORS[name](), *SIZES), SIZES, strict=True):
        assert (cover(tokens, size) == (2 if name in ("step-3.7", "llama 4") else 1)).all()


def written(processor, sizes, inputs) -> list[list]:
    """Boxes, picture by picture, of the tokens that the processor writes for tiles as `inputs` counts them."""
    shown = [processor.replace_image_token(inputs, number) for number in range(len(sizes))]
    ids = processor.tokenizer(f"<|s|>user:{''.join(shown)}what?<|e|>\n")["input_ids"]
    messages = (Message("user", (*(picture(*size) for size in sizes), "what?")),)
    tokens = prompt_tokens(processor, CONFIG, messages, ids, inputs)
    return [[t.box for t in tokens if t.image_index == n and t.modality == "image"] for n in range(len(sizes))]


def test_step_cuts_equal_tiles_and_shows_the_whole_once_more():
    masks = [[False, True, False, False], [False] * 4]
    inputs = {"num_local_patches": [4, 0], "patch_newline_masks": masks}
    cut, whole = written(step(), [(64, 80), (60, 48)], inputs)
    assert len(cut) == 4 * 16 + 36 and len(whole) == 36
    # Two rows of two tiles, each 32 x 40 pixels of the picture and 4 x 4 tokens.
    assert cut[0] == (0, 0, 8, 10) and cut[16] == (32, 0, 40, 10) and cut[32] == (0, 40, 8, 50)
    assert cut[63] == (56, 70, 64, 80)
    assert cut[64] == pytest.approx((0, 0, 64 / 6, 80 / 6)) and whole[-1] == (50, 40, 60, 48)


def test_step_pads_a_line_to_a_square():
    (boxes,) = written(step(), [(120, 10)], {"num_local_patches": [0]})
    assert boxes[:7] == [(n * 20, 0, n * 20 + 20, 10) for n in range(6)] + [None]
    assert not any(boxes[6:]) and len(boxes) == 36


def test_step_with_rows_of_unlike_length_has_no_boxes():
    inputs = {"num_local_patches": [3], "patch_newline_masks": [[False, True, False]]}
    assert set(written(step(), [(64, 80)], inputs)[0]) == {None}


def test_muse_stretches_each_picture_over_its_grid():
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]])}
    wide, small = written(muse(), [(90, 40), (30, 50)], inputs)
    assert len(wide) == 6 and wide[4] == (30, 20, 60, 40) and small == [(0, 0, 30, 50)]


def test_deepseek_s_tokens_are_learned_queries_so_only_their_picture_is_known():
    """Its own processor, which needs no torchvision: tiles of 32 pixels, then the whole, then a separator."""
    images = DeepseekOcr2ImageProcessorPil(size={"height": 64, "width": 64}, tile_size=32, do_normalize=False)
    words = tokenizer([*SPECIAL])
    processor = DeepseekOcr2Processor(images, words, chat("<image>"), patch_size=8, downsample_ratio=2)
    _, inputs, tokens = read(processor, Message("user", (picture(70, 40), "or ", picture(20, 30), "what?")))
    behind = [token for token in tokens if token.modality == "image"]
    assert inputs["num_local_patches"].tolist() == [2, 0]
    assert [token.image_index for token in behind] == [0] * (2 * 4 + 16 + 1) + [1] * (16 + 1)
    assert all(token.box is None for token in behind)
