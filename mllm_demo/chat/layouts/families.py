"""Which picture, and which part of it, each image token stands for, family by family of processors.

A family returns one `Place` for each image token, in reading order, or None when the tokens are not those it
expects; `places` then falls back to `by_runs`, which knows pictures but no boxes. Every number comes from
the processor or from what it returned. It knows nothing of text, roles or routing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import (
    Ernie4_5_VLMoeProcessor,
    Glm4vProcessor,
    Idefics3Processor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.image_transforms import get_resize_output_image_size

from mllm_demo.chat.layouts.boxes import Box, View, grid_boxes

# A tile's tag is at most this many tokens even when a tokenizer has no token of its own for it.
_TAG_WINDOW = 16
_TILE_TAG = re.compile(r"<row_(\d+)_col_(\d+)>\s*$")


@dataclass(frozen=True)
class Place:
    """The picture an image token belongs to (None: unknown) and its box in pixels of the original."""

    image_index: int | None
    box: Box | None = None


@dataclass(frozen=True)
class Prompt:
    """`ids`: the prompt; `positions`: where its image tokens are, ascending; `sizes`: (width, height) of each
    picture; `inputs`: what the processor returned."""

    ids: Sequence[int]
    positions: Sequence[int]
    sizes: Sequence[tuple[int, int]]
    inputs: Mapping

    def runs(self) -> list[tuple[int, int]]:
        """Half-open spans of neighbouring image tokens."""
        starts = [p for n, p in enumerate(self.positions) if n == 0 or self.positions[n - 1] != p - 1]
        ends = [p + 1 for n, p in enumerate(self.positions) if self.positions[n + 1 : n + 2] != [p + 1]]
        return list(zip(starts, ends, strict=True))


def places(processor, prompt: Prompt) -> list[Place]:
    """One `Place` for each of `prompt.positions`, by the family of `processor` or, failing that, by runs."""
    if hasattr(processor, "image_grid"):
        found = declared_grid(processor, prompt)
    else:
        family = next((family for kinds, family in FAMILIES if isinstance(processor, kinds)), None)
        found = family(processor, prompt) if family else None
    if found is None or len(found) != len(prompt.positions):
        return by_runs(prompt)
    return found


def by_runs(prompt: Prompt) -> list[Place]:
    """For processors nobody described: pictures told apart by runs of image tokens, no boxes.

    Where there are not as many runs as pictures (row separators inside a picture, pictures that touch), the
    picture is known only if it is the only one.
    """
    runs = prompt.runs()
    if len(prompt.sizes) == 1:
        return [Place(0)] * len(prompt.positions)
    known = len(runs) == len(prompt.sizes)
    return [Place(n if known else None) for n, (start, end) in enumerate(runs) for _ in range(start, end)]


def declared_grid(processor, prompt: Prompt) -> list[Place]:
    """Processors that say `image_grid` (rows, cols): the whole picture, resized to one square."""
    rows, cols = processor.image_grid
    return [
        Place(index, box)
        for index, (width, height) in enumerate(prompt.sizes)
        for box in grid_boxes(rows, cols, (0.0, 0.0, float(width), float(height)))
    ]


def dynamic_grid(processor, prompt: Prompt) -> list[Place] | None:
    """Qwen2-VL to 3, GLM-4.5V, ERNIE-4.5-VL: the whole picture, resized; a token is merge_size^2 patches."""
    if "image_grid_thw" not in prompt.inputs:
        return None
    merge = processor.image_processor.merge_size
    grids = prompt.inputs["image_grid_thw"].tolist()
    if len(grids) != len(prompt.sizes):
        return None
    return [
        Place(index, box)
        for index, ((frames, rows, cols), (width, height)) in enumerate(zip(grids, prompt.sizes, strict=True))
        for _ in range(frames)
        for box in grid_boxes(rows // merge, cols // merge, (0.0, 0.0, float(width), float(height)))
    ]


def single_view(processor, prompt: Prompt) -> list[Place] | None:
    """LLaVA: the picture resized (shortest edge or to a given size), then cropped in the middle.

    What the crop left out has no token; patches of padding, and a class token where the model keeps it, have
    no box. A tower without a class token loses its first patch all the same when the model drops one token.
    """
    if "pixel_values" not in prompt.inputs:
        return None
    height, width = prompt.inputs["pixel_values"].shape[-2:]
    patch = processor.patch_size
    # "default" drops one token of those that the tower puts before its patches.
    leading = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    found = []
    for index, size in enumerate(prompt.sizes):
        view = _view(processor.image_processor, size, (width, height))
        patches = [Place(index)] * max(leading, 0)
        for y in range(height // patch):
            for x in range(width // patch):
                corners = (x * patch, y * patch, (x + 1) * patch, (y + 1) * patch)
                patches.append(Place(index, view.box(*corners, size) if view else None))
        found += patches[max(-leading, 0) :]
    return found


def _view(image_processor, size: tuple[int, int], seen: tuple[int, int]) -> View | None:
    """How `image_processor` made an input of `seen` pixels of a picture of `size`; both (width, height)."""
    canvas, shift = size, (0, 0)
    if getattr(image_processor, "do_pad", False):
        if not hasattr(image_processor, "pad_to_square"):
            return None
        side = max(size)
        canvas, shift = (side, side), ((side - size[0]) // 2, (side - size[1]) // 2)
    resized = canvas
    if image_processor.do_resize:
        wanted = {key: value for key, value in dict(image_processor.size).items() if value}
        if set(wanted) == {"shortest_edge"}:
            # Only the shape is read, so a picture without memory stands in for the real one.
            picture = np.broadcast_to(np.uint8(0), (3, canvas[1], canvas[0]))
            rows, cols = get_resize_output_image_size(
                picture, wanted["shortest_edge"], default_to_square=False, input_data_format="channels_first"
            )
            resized = (cols, rows)
        elif set(wanted) == {"height", "width"}:
            resized = (wanted["width"], wanted["height"])
        else:
            return None
    crop = seen if getattr(image_processor, "do_center_crop", False) else resized
    if crop != seen:
        return None
    x_scale, y_scale = canvas[0] / resized[0], canvas[1] / resized[1]
    left, top = ((whole - part) // 2 for whole, part in zip(resized, crop, strict=True))
    return View(left * x_scale - shift[0], top * y_scale - shift[1], x_scale, y_scale)


def tiles(processor, prompt: Prompt) -> list[Place] | None:
    """Idefics3, SmolVLM: tiles row by row, each announced by its tag, then the whole picture once more.

    The picture is stretched to a whole number of tiles, without padding, so tiles are equal parts of it.
    """
    side = math.isqrt(processor.image_seq_len)
    if side * side != processor.image_seq_len:
        return None
    found: list[Place] = []
    pending: list[tuple[int, int]] = []
    index = 0
    end = 0
    for start, stop in prompt.runs():
        before = prompt.ids[max(end, start - _TAG_WINDOW) : start]
        tag = _TILE_TAG.search(processor.tokenizer.decode(before, skip_special_tokens=False))
        end = stop
        if stop - start != processor.image_seq_len or index >= len(prompt.sizes):
            return None
        if tag:
            pending.append((int(tag[1]) - 1, int(tag[2]) - 1))
            continue
        width, height = prompt.sizes[index]
        whole = (0.0, 0.0, float(width), float(height))
        rows, cols = (1 + max(numbers) for numbers in zip(*pending, strict=True)) if pending else (0, 0)
        if pending != [(row, col) for row in range(rows) for col in range(cols)]:
            return None
        for region in [*grid_boxes(rows, cols, whole), whole]:
            found += [Place(index, box) for box in grid_boxes(side, side, region)]
        pending = []
        index += 1
    return None if pending or index != len(prompt.sizes) else found


FAMILIES = (
    (
        (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor, Glm4vProcessor, Ernie4_5_VLMoeProcessor),
        dynamic_grid,
    ),
    ((Idefics3Processor, SmolVLMProcessor), tiles),
    ((LlavaProcessor,), single_view),
)
