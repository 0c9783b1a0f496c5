"""Places of image tokens where a picture is cut into tiles and shown once more as a whole.

Each function is asked as `families` says. It knows nothing of text, roles or routing.
"""

import math
import re

from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from mllm_demo.chat.layouts.boxes import Box, View, grid_boxes
from mllm_demo.chat.layouts.places import Place, Prompt

# A tile's tag is at most this many tokens even when a tokenizer has no token of its own for it.
_TAG_WINDOW = 16
_TILE_TAG = re.compile(r"<row_(\d+)_col_(\d+)>\s*$")


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


def marked_tiles(processor, prompt: Prompt) -> list[Place] | None:
    """Step-3.7: tiles row by row between marks of their own, with one more mark behind each row but the last, then
    the whole picture.

    Both are stretched to what the tower reads, so tiles are equal parts of the picture. A line of a few pixels is
    padded on the right and below to a square first; what is only padding has no box.
    """
    images, words = processor.image_processor, processor.tokenizer
    opened, row_end = words.convert_tokens_to_ids(["<patch_start>", "<patch_newline>"])
    found: list[Place] = []
    rows: list[list[int]] = [[]]
    index = 0
    for start, stop in prompt.runs():
        side = math.isqrt(stop - start)
        if side * side != stop - start or index >= len(prompt.sizes):
            return None
        if start and prompt.ids[start - 1] == opened:
            rows[-1].append(side)
            # Behind the tile stands the mark that closes it.
            rows += [[]] if prompt.ids[stop + 1 : stop + 2] == [row_end] else []
            continue
        width, height = prompt.sizes[index]
        square = images._is_extreme_aspect(width, height)
        seen = (max(width, height),) * 2 if square else (width, height)
        whole = (0.0, 0.0, float(seen[0]), float(seen[1]))
        if len({len(row) for row in rows}) > 1 or len({tile for row in rows for tile in row}) > 1:
            return None
        parts = grid_boxes(len(rows), len(rows[0]), whole) if rows[0] else []
        view = View(0.0, 0.0, 1.0, 1.0)
        for region, tokens in [*((tile, rows[0][0]) for tile in parts), (whole, side)]:
            found += [Place(index, view.box(*box, (width, height))) for box in grid_boxes(tokens, tokens, region)]
        rows = [[]]
        index += 1
    return found if index == len(prompt.sizes) and rows == [[]] else None
