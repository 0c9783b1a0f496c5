"""Which picture, and which part of it, each image token stands for, family by family of processors.

A family returns one `Place` for each image token, in reading order, or None when the tokens are not those it
expects; the fallback then knows pictures but no boxes. Every number comes from the processor or from what it
returned. Tokens of videos do not occur: a model is shown frames, each as a picture of its own, and a video's
placeholder that a person types is broken up before any processor reads it (`chat.prompt`). It knows nothing of text,
roles or routing.
"""

import math

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
    MuseSparkProcessor,
    PixtralProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
    Step3p7Processor,
)
from transformers.image_transforms import get_resize_output_image_size

from mllm_demo.chat.layouts.boxes import View, grid_boxes
from mllm_demo.chat.layouts.places import Place, Prompt, by_runs
from mllm_demo.chat.layouts.tiled import marked_tiles, separated_tiles, tiles, tiles_and_thumbnail


def places(processor, prompt: Prompt) -> list[Place]:
    """One `Place` for each of `prompt.positions`, by the family of `processor` or, failing that, by runs."""
    family = next((family for kinds, family in FAMILIES if isinstance(processor, kinds)), None)
    found = family(processor, prompt) if family else None
    if found is None or len(found) != len(prompt.positions):
        return by_runs(prompt)
    return found


def dynamic_grid(processor, prompt: Prompt) -> list[Place] | None:
    """Qwen2-VL to 3, GLM-4.5V, ERNIE-4.5-VL, MiniMax-M3, Muse-Spark: the whole picture, resized; merge_size^2 patches
    a token."""
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


FAMILIES = (
    (
        (
            Qwen2VLProcessor,
            Qwen2_5_VLProcessor,
            Qwen3VLProcessor,
            Glm4vProcessor,
            Ernie4_5_VLMoeProcessor,
            MiniMaxM3VLProcessor,
            MuseSparkProcessor,
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
    ((Step3p7Processor,), marked_tiles),
)
