"""Processors of mixture-of-experts models: each image token's box is the part of the picture behind it.

The check of `test_layout` on other families: a bright spot painted into a token's box must light up that token's
pixels. Llama 4's image processor needs torchvision, so its boxes are compared with a canvas worked out by hand;
the tokens are written by its own processor.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    Ernie4_5_VLMoeImageProcessorPil,
    Ernie4_5_VLMoeProcessor,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    Llama4Processor,
    PixtralImageProcessorPil,
)

from mllm_demo.chat.layout import prompt_tokens

# Without torchvision transformers makes a new stand-in for these classes at every import.
from mllm_demo.chat.layouts.families import Kimi_K25Processor, MiniMaxM3VLProcessor, PixtralProcessor
from mllm_demo.chat.messages import Message
from tests.unit.chat.test_layout import (
    CONFIG,
    SIZES,
    SPECIAL,
    chat,
    cover,
    inner,
    picture,
    read,
    seen,
    tokenizer,
    without_video,
)


def named(names: dict[str, str]):
    words = tokenizer([*SPECIAL, *names.values()])
    words._set_model_specific_special_tokens(names)
    return words


def internvl(**changes):
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<ctx>"}
    side = {"height": 32, "width": 32}
    declared = {"size": side, "crop_to_patches": True, "min_patches": 1, "max_patches": 6, "do_normalize": False}
    images = GotOcr2ImageProcessorPil(**declared | changes)
    words = named({**names, "video_token": "<video>"})
    return without_video(InternVLProcessor)(images, words, None, image_seq_length=16, chat_template=chat("<ctx>"))


class Pixtral(PixtralProcessor):
    """Its own class wants torchvision before it does anything; this one writes the same tokens without it."""

    def __init__(self, merge: int):
        self.image_processor = PixtralImageProcessorPil(size={"longest_edge": 64}, do_normalize=False)
        self.tokenizer = tokenizer([*SPECIAL, "[IMG]", "[IMG_BREAK]", "[IMG_END]"])
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("[IMG]")
        self.patch_size, self.spatial_merge_size = 8, merge

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, chat_template=chat("[IMG]"), **options)

    def __call__(self, text, images, return_tensors):
        side = self.patch_size * self.spatial_merge_size
        found = self.image_processor(images, patch_size=side, return_tensors=return_tensors)
        first, *rest = text[0].split("[IMG]")
        for (height, width), words in zip(found["image_sizes"].tolist(), rest, strict=True):
            rows = ["[IMG]" * (width // side)] * (height // side)
            first += "[IMG_BREAK]".join(rows) + "[IMG_END]" + words
        return {**found, **self.tokenizer([first], return_tensors=return_tensors)}


class Gemma4(Gemma4Processor):
    """With pictures only: its video part needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def gemma4():
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    images = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    words = named({**names, "video_token": "<|video|>"})
    other = SimpleNamespace(num_frames=1, fps=1, model_input_names=[])
    return Gemma4(other, images, words, other, chat_template=chat("<|image|>"))


def glm4v():
    words = tokenizer([*SPECIAL, "<|image|>", "<|video|>"])
    size = {"shortest_edge": 128, "longest_edge": 64 * 64 * 2}
    images = Glm4vImageProcessorPil(patch_size=4, merge_size=2, size=size, do_normalize=False)
    return without_video(Glm4vProcessor)(images, words, None, chat_template=chat("<|image|>"))


def ernie():
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>"}
    names |= {"image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO|>"}
    names |= {"video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"}
    size = {"shortest_edge": 256, "longest_edge": 64 * 64}
    images = Ernie4_5_VLMoeImageProcessorPil(patch_size=4, merge_size=2, size=size, do_normalize=False)
    template = chat("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    return without_video(Ernie4_5_VLMoeProcessor)(images, named(names), None, chat_template=template)


PROCESSORS = {
    "internvl": internvl,
    "internvl in one piece": lambda: internvl(max_patches=1),
    "pixtral": lambda: Pixtral(1),
    "mistral 3": lambda: Pixtral(2),
    "gemma 4": gemma4,
    "glm-4.5v": glm4v,
    "ernie-4.5-vl": ernie,
}


def cells(pixels: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """[.., channels, height, width] as the mean of each of rows x cols parts."""
    *count, channels, height, width = pixels.shape
    parts = pixels.reshape(-1, channels, rows, height // rows, cols, width // cols)
    return parts.mean(axis=(1, 3, 5)).ravel()


def brightness(processor, inputs) -> np.ndarray:
    """[image tokens] of one picture: how bright the input behind each token is."""
    pixels = np.asarray(inputs["pixel_values"], dtype=np.float64)
    if "image_sizes" in inputs:
        height, width = inputs["image_sizes"][0].tolist()
        side = processor.patch_size * processor.spatial_merge_size
        return cells(pixels[0, :, :height, :width], height // side, width // side)
    if "image_position_ids" in inputs:
        positions = inputs["image_position_ids"][0].numpy()
        real = (positions >= 0).all(axis=1)
        cols, rows = positions.max(axis=0) + 1
        grid = np.zeros((1, rows, cols))
        grid[0, positions[real, 1], positions[real, 0]] = pixels[0, real].mean(axis=1)
        kernel = processor.image_processor.pooling_kernel_size
        return cells(grid, rows // kernel, cols // kernel)
    if "image_grid_thw" in inputs:
        return pixels.reshape(-1, processor.image_processor.merge_size**2 * pixels.shape[1]).mean(axis=1)
    side = int(processor.image_seq_length**0.5)
    return cells(pixels, side, side)


def check_spots(processor, size, behind, boxed, brightness) -> None:
    """A spot in the box of an image token is brightest behind that token: some of `behind`, of those numbered `boxed`.

    A tile and the thumbnail show the same spot; only tokens of one box size compete.
    """
    areas = np.array([(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) if t.box else 0 for t in behind])
    checked = 0
    for number in boxed[:: max(1, len(boxed) // 12)]:
        spot = inner(behind[number].box)
        _, lit, _ = read(processor, Message("user", (picture(*size, spot), "what?")))
        shine = np.where(np.abs(areas - areas[number]) <= 0.1 * areas[number], brightness(processor, lit), -1)
        assert int(shine.argmax()) == number, (number, spot)
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_bright_spot_in_a_token_s_box_lights_up_that_token(name, size):
    processor = PROCESSORS[name]()
    _, inputs, tokens = read(processor, Message("user", (picture(*size), "what?")))
    behind = [token for token in tokens if token.modality == "image"]
    assert len(behind) == brightness(processor, inputs).size and all(token.box for token in behind)
    check_spots(processor, size, behind, range(len(behind)), brightness)


@pytest.mark.parametrize("name", PROCESSORS)
def test_boxes_cover_each_picture_once_and_tiles_with_a_thumbnail_twice(name):
    for tokens, size in zip(seen(PROCESSORS[name](), *SIZES), SIZES, strict=True):
        times = 2 if name == "internvl" and len(tokens) > 16 else 1
        assert (cover(tokens, size) == times).all()


@pytest.mark.parametrize("name", ["pixtral", "mistral 3"])
def test_what_separates_rows_is_no_part_of_the_picture(name):
    _, _, tokens = read(PROCESSORS[name](), Message("user", (picture(*SIZES[0]), picture(*SIZES[1]), "a")))
    marks = [token for token in tokens if token.text in ("[IMG_BREAK]", "[IMG_END]")]
    assert marks and all(token.modality == "special" and token.box is None for token in marks)
    assert sum(token.text == "[IMG_END]" for token in marks) == 2


class Llama4(Llama4Processor):
    """With what its image processor declares, and nothing that needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def llama4(shapes, sizes, **changes):
    """Tokens of a prompt with pictures of `sizes`, cut into `shapes` (rows, columns) of tiles of 32 pixels."""
    marks = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"]
    words = tokenizer([*SPECIAL, *marks, "<|tile_x_separator|>", "<|tile_y_separator|>"])
    images = SimpleNamespace(size={"height": 32, "width": 32}, **{"resize_to_max_canvas": False} | changes)
    processor = Llama4(images, words, patch_size=8, chat_template=chat("<|image|>"))
    shown = "".join(processor._prompt_split_image(shape, 4) for shape in shapes)
    ids = words(f"<|s|>user:{shown}what?<|e|>\n")["input_ids"]
    messages = (Message("user", (*(picture(*size) for size in sizes), "what?")),)
    tokens = prompt_tokens(processor, CONFIG, messages, ids, {})
    return [[t.box for t in tokens if t.image_index == n and t.modality == "image"] for n in range(len(sizes))]


def test_llama_4_cuts_tiles_from_a_padded_canvas_and_shows_the_whole_once_more():
    wide, small = llama4([(1, 2), (1, 1)], [(60, 40), (16, 16)])
    # 60 x 40 shrinks to 48 x 32 on a canvas of 64 x 32: a token's 16 pixels are 20 of the picture.
    assert wide[:4] == [(0, 0, 20, 20), (20, 0, 40, 20), (0, 20, 20, 40), (20, 20, 40, 40)]
    assert wide[4:8] == [(40, 0, 60, 20), None, (40, 20, 60, 40), None]
    assert wide[8:] == [(0, 0, 30, 20), (30, 0, 60, 20), (0, 20, 30, 40), (30, 20, 60, 40)]
    # One tile is the whole picture, enlarged to the tile's 32 pixels.
    assert small == [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]


def test_llama_4_enlarges_to_the_whole_canvas_only_when_told_to():
    (kept,) = llama4([(2, 2)], [(40, 40)])
    assert kept[3] == (16, 16, 32, 32) and kept[4] == (32, 0, 40, 16) and kept[5] is None
    (enlarged,) = llama4([(2, 2)], [(40, 40)], resize_to_max_canvas=True)
    assert enlarged[3] == (10, 10, 20, 20) and enlarged[5] == (30, 0, 40, 10)
    assert len(kept) == len(enlarged) == 20


class Kimi(Kimi_K25Processor):
    """What its layout depends on: the numbers that the image processor declares."""

    def __init__(self, max_patches: int):
        self.tokenizer = tokenizer([*SPECIAL, "<|media_pad|>"])
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<|media_pad|>")
        self.image_processor = SimpleNamespace(
            patch_size=8, merge_size=2, size={"max_height": 512, "max_width": 512}, max_patches=max_patches
        )

    def boxes(self, grid: tuple[int, int, int], size: tuple[int, int]):
        ids = [self.image_token_id] * (grid[1] * grid[2] // self.image_processor.merge_size**2)
        messages = (Message("user", (picture(*size),)),)
        tokens = prompt_tokens(self, CONFIG, messages, ids, {"image_grid_thw": torch.tensor([grid])})
        return [token.box for token in tokens]

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, chat_template=chat("<|media_pad|>"), **options)


def test_kimi_pads_a_picture_of_its_own_size_to_whole_tokens():
    boxes = Kimi(1000).boxes((1, 8, 14), (100, 60))
    assert boxes[0] == (0, 0, 16, 16) and boxes[6] == (96, 0, 100, 16) and boxes[-1] == (96, 48, 100, 60)
    assert len(boxes) == 4 * 7


def test_kimi_shrinks_a_picture_of_too_many_patches():
    # 12 x 7 patches of which 24 are allowed: 53 x 32 pixels, padded to 64 x 32.
    boxes = Kimi(24).boxes((1, 4, 8), (100, 60))
    assert boxes[0] == pytest.approx((0, 0, 16 * 100 / 53, 30))
    assert boxes[-1] == pytest.approx((48 * 100 / 53, 30, 100, 60)) and len(boxes) == 8


def test_a_grid_that_the_declared_numbers_do_not_give_is_not_trusted():
    assert Kimi(24).boxes((1, 8, 14), (100, 60)) == [None] * 28


class MiniMax(MiniMaxM3VLProcessor):
    """Its image processor needs torchvision; of it the layout reads one number."""

    def __init__(self):
        self.tokenizer = tokenizer([*SPECIAL, "<|img|>"])
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<|img|>")
        self.image_processor = SimpleNamespace(merge_size=2)

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, chat_template=chat("<|img|>"), **options)


def test_minimax_stretches_each_picture_over_its_grid():
    processor = MiniMax()
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]])}
    messages = (Message("user", (picture(90, 40), picture(30, 50))),)
    tokens = prompt_tokens(processor, CONFIG, messages, [processor.image_token_id] * 7, inputs)
    assert [token.image_index for token in tokens] == [0] * 6 + [1]
    assert tokens[4].box == (30, 20, 60, 40) and tokens[6].box == (0, 0, 30, 50)
