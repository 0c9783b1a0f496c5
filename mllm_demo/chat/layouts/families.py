"""Which picture, and which part of it, each image token stands for, family by family of processors.

A family returns one `Place` for each image token, in reading order, or None when the tokens are not those it
expects; `places` then falls back to `by_runs`, which knows pictures but no boxes. Every number comes from
the processor or from what it returned. Tokens of videos do not occur: a model is shown frames, each as a picture
of its own, and a video's placeholder that a person types is broken up before any processor reads it (`chat.prompt`).
It knows nothing of text, roles or routing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import (
    Ernie4_5_VLMoeProcessor,
    Gemma4Processor,
    Glm4vProcessor,
    Idefics3Processor,
    InternVLProcessor,
    Kimi_K25Processor,
    Llama4Processor,
    LlavaProcessor,
    MiniMaxM3VLProcessor,
    PixtralProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

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
    family = next((family for kinds, family in FAMILIES if isinstance(processor, kinds)), None)
    found = family(processor, prompt) if family else None
    if found is None or len(found) != len(prompt.positions):
        return by_runs(prompt)
    return found


def by_runs(prompt: Prompt) -> list[Place]:
    """For processors nobody described: pictures told apart by runs of image tokens, no boxes.

    Where there are not as many runs as pictures (row separators inside a picture, pictures that touch), the
    picture is known only if it is the only one. Aria is read so too: its tokens are learned queries, each of
    which may look at the whole tile, so none has a region.
    """
    runs = prompt.runs()
    if len(prompt.sizes) == 1:
        return [Place(0)] * len(prompt.positions)
    known = len(runs) == len(prompt.sizes)
    return [Place(n if known else None) for n, (start, end) in enumerate(runs) for _ in range(start, end)]


def dynamic_grid(processor, prompt: Prompt) -> list[Place] | None:
    """Qwen2-VL to 3, GLM-4.5V, ERNIE-4.5-VL, MiniMax-M3: the whole picture, resized; merge_size^2 patches a token."""
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


def padded_grid(processor, prompt: Prompt) -> list[Place] | None:
    """Kimi-K2.5: the picture shrunk to what the processor allows, never enlarged, then padded on the right and
    below to whole tokens of merge_size^2 patches; what is only padding has no box."""
    grids, images = prompt.inputs.get("image_grid_thw"), processor.image_processor
    if grids is None or len(grids) != len(prompt.sizes):
        return None
    patch = images.patch_size
    token = patch * images.merge_size
    longest = images.size["max_height"] * patch
    found = []
    for index, ((_, rows, cols), size) in enumerate(zip(grids.tolist(), prompt.sizes, strict=True)):
        patches = math.prod(max(1, length // patch) for length in size)
        scale = min(1.0, math.sqrt(images.max_patches / patches), longest / max(size))
        resized = [max(1, int(length * scale)) for length in size]
        view = View(0.0, 0.0, size[0] / resized[0], size[1] / resized[1])
        rows, cols = rows // images.merge_size, cols // images.merge_size
        if [math.ceil(length / token) for length in resized] != [cols, rows]:
            return None
        canvas = (0.0, 0.0, float(cols * token), float(rows * token))
        found += [Place(index, view.box(*box, size)) for box in grid_boxes(rows, cols, canvas)]
    return found


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


def tiles_and_thumbnail(processor, prompt: Prompt) -> list[Place] | None:
    """InternVL: the picture stretched to a whole number of tiles, row by row, then the whole picture once more
    (left out when it is one tile). Pixel shuffle joins neighbours, so a tile's tokens are a square grid."""
    side = math.isqrt(processor.image_seq_length)
    images = processor.image_processor
    runs = prompt.runs()
    if side * side != processor.image_seq_length or len(runs) != len(prompt.sizes):
        return None
    found: list[Place] = []
    for index, ((start, stop), (width, height)) in enumerate(zip(runs, prompt.sizes, strict=True)):
        whole = (0.0, 0.0, float(width), float(height))
        regions = [whole]
        if stop - start != side * side:
            tile = (images.size["height"], images.size["width"])
            cols, rows = get_optimal_tiled_canvas((height, width), tile, images.min_patches, images.max_patches)
            regions = [*grid_boxes(rows, cols, whole), whole]
        if stop - start != side * side * len(regions):
            return None
        found += [Place(index, box) for region in regions for box in grid_boxes(side, side, region)]
    return found


def broken_rows(processor, prompt: Prompt) -> list[Place] | None:
    """Pixtral, Mistral 3: the whole picture, resized; behind each row a token that stands for no patch."""
    sizes = prompt.inputs.get("image_sizes")
    side = processor.patch_size * processor.spatial_merge_size
    if sizes is None or len(sizes) != len(prompt.sizes) or getattr(processor.image_processor, "do_center_crop", False):
        return None
    if (sizes % side).any():  # not resized, so what is left over at the edges has no token
        return None
    return [
        Place(index, box)
        for index, ((rows, cols), (width, height)) in enumerate(zip(sizes.tolist(), prompt.sizes, strict=True))
        for box in grid_boxes(rows // side, cols // side, (0.0, 0.0, float(width), float(height)))
    ]


def pooled_grid(processor, prompt: Prompt) -> list[Place] | None:
    """Gemma 4: the whole picture, resized near its own shape; a token is the mean of a square of patches.

    Patches say their (column, row) in `image_position_ids`, padding says -1.
    """
    positions = prompt.inputs.get("image_position_ids")
    if positions is None or len(positions) != len(prompt.sizes):
        return None
    pooled = ((positions.amax(dim=1) + 1) // processor.image_processor.pooling_kernel_size).tolist()
    return [
        Place(index, box)
        for index, ((cols, rows), (width, height)) in enumerate(zip(pooled, prompt.sizes, strict=True))
        for box in grid_boxes(rows, cols, (0.0, 0.0, float(width), float(height)))
    ]


def separated_tiles(processor, prompt: Prompt) -> list[Place] | None:
    """Llama 4: tiles row by row with a separator behind each, then the whole picture stretched to one tile.

    Tiles are cut from a canvas that the picture fills from its upper left corner in its own shape; what is
    padding has no box. A picture of one tile has no second view. Which canvas was taken is read from the
    separators, so the processor's own choice is not repeated.
    """
    images, words = processor.image_processor, processor.tokenizer
    across, down = words.convert_tokens_to_ids([processor.tile_token, processor.tile_global_token])
    size = (images.size["width"], images.size["height"])
    found: list[Place] = []
    rows: list[int] = [0]
    index = 0
    for start, stop in prompt.runs():
        side = math.isqrt(stop - start)
        behind = prompt.ids[stop] if stop < len(prompt.ids) else None
        if side * side != stop - start or index >= len(prompt.sizes):
            return None
        if behind in (across, down):
            rows[-1] += 1
            rows += [0] if behind == down else []
            continue
        *counts, rest = rows
        if rest or len(set(counts)) > 1:
            return None
        found += [Place(index, box) for box in _canvas(images, prompt.sizes[index], size, counts, side)]
        rows = [0]
        index += 1
    return found if index == len(prompt.sizes) and rows == [0] else None


def _canvas(images, picture: tuple[int, int], tile: tuple[int, int], counts: list[int], side: int) -> list[Box | None]:
    """Boxes of `side` x `side` tokens a tile, for rows of `counts` tiles of `tile` (width, height) pixels."""
    cols, rows = (counts[0], len(counts)) if counts else (1, 1)
    canvas = (cols * tile[0], rows * tile[1])
    room = canvas
    if not images.resize_to_max_canvas:
        # A small picture is not enlarged beyond one tile, however large its canvas.
        room = tuple(min(max(own, tile[1]), whole) for own, whole in zip(picture, canvas, strict=True))
    # The picture keeps its shape in whole pixels, rounded down, and touches the nearer limit.
    scales = [space / own for space, own in zip(room, picture, strict=True)]
    seen = [
        space if scale == min(scales) else max(1, math.floor(own * min(scales)))
        for space, own, scale in zip(room, picture, scales, strict=True)
    ]
    view = View(0.0, 0.0, picture[0] / seen[0], picture[1] / seen[1])
    boxes = [
        view.box(*box, picture)
        for region in grid_boxes(rows, cols, (0.0, 0.0, float(canvas[0]), float(canvas[1])))
        for box in grid_boxes(side, side, region)
    ]
    if not counts:
        return boxes
    return [*boxes, *grid_boxes(side, side, (0.0, 0.0, float(picture[0]), float(picture[1])))]


FAMILIES = (
    (
        (
            Qwen2VLProcessor,
            Qwen2_5_VLProcessor,
            Qwen3VLProcessor,
            Glm4vProcessor,
            Ernie4_5_VLMoeProcessor,
            MiniMaxM3VLProcessor,
        ),
        dynamic_grid,
    ),
    ((Idefics3Processor, SmolVLMProcessor), tiles),
    ((LlavaProcessor,), single_view),
    ((InternVLProcessor,), tiles_and_thumbnail),
    ((PixtralProcessor,), broken_rows),
    ((Gemma4Processor,), pooled_grid),
    ((Llama4Processor,), separated_tiles),
    ((Kimi_K25Processor,), padded_grid),
)
