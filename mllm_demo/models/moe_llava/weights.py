"""An original checkpoint's tensors, assembled under the names used here and written as safetensors.

Tensors are read, joined and written one at a time. It knows nothing of hubs, processors or devices.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mllm_demo.errors import CheckpointError, LoadError
from mllm_demo.models.checkpoints import streaming
from mllm_demo.models.checkpoints.source import Entry, Source
from mllm_demo.models.checkpoints.streaming import Piece
from mllm_demo.models.moe_llava.config import MoeLlavaConfig, mixture
from mllm_demo.models.moe_llava.model import shapes
from mllm_demo.models.moe_llava.naming import VISION_TOWER, Naming

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"
_EMBEDDINGS = "model.language_model.embed_tokens.weight"
_TOWER_PREFIX = "vision_model."


def vocabulary_size(original: Mapping[str, Entry], config: MoeLlavaConfig, title: str) -> int:
    """Rows of the original's token embeddings; raises `CheckpointError` when it has none."""
    name = Naming(config.text_config.model_type).sources(_EMBEDDINGS, 0)[0][0]
    if name not in original:
        raise CheckpointError(f"{title} lacks {name}, so it is not such a model; fetch it again.")
    return original[name].shape[0]


def pieces(config: MoeLlavaConfig, original: Mapping[str, Entry], tower: Source, title: str) -> list[Piece]:
    """Every parameter of `config`'s model, made of the tensors of the original and of its vision tower.

    Raises `CheckpointError` with the name of the first tensor that is missing, of another shape, or unknown.
    """
    seen = {name.partition(_TOWER_PREFIX)[2]: entry for name, entry in tower.items() if _TOWER_PREFIX in name}
    naming, counts = Naming(config.text_config.model_type), mixture(config.text_config).experts
    used: set[str] = set()
    found = []
    for name, shape in shapes(config).items():
        if name == "lm_head.weight" and name not in original and config.tie_word_embeddings:
            continue
        if name.startswith(VISION_TOWER):
            rows, entries, owner = [[name.removeprefix(VISION_TOWER)]], seen, f"the vision tower of {title}"
        else:
            layer = name.partition(".layers.")[2].partition(".")[0]
            rows, entries, owner = naming.sources(name, counts.get(int(layer), 0) if layer else 0), original, title
            used.update(key for row in rows for key in row)
        found.append(_piece(name, shape, rows, entries, owner))
    unknown = next((key for key in original if key not in used and not naming.is_ignored(key)), None)
    if unknown is not None:
        raise CheckpointError(
            f"{title} holds the tensor {unknown}, for which its configuration has no place; it is of another kind."
        )
    return found


def _piece(
    name: str, shape: tuple[int, ...], rows: list[list[str]], entries: Mapping[str, Entry], owner: str
) -> Piece:
    """`rows`: as `Naming.sources` gives them."""
    missing = next((key for row in rows for key in row if key not in entries), None)
    if missing is not None:
        raise CheckpointError(f"Of {owner} the tensor {missing} is missing; fetch it again, whole.")
    parts = [[entries[key] for key in row] for row in rows]
    stacked = ".mlp.experts." in name
    height, *rest = shape[1:] if stacked else shape
    # The original cuts its vocabulary to that of the tokenizer when it loads; nothing else may be longer.
    may_be_cut = name in (_EMBEDDINGS, "lm_head.weight")
    for row, keys in zip(parts, rows, strict=True):
        total = sum(entry.shape[0] for entry in row)
        fits = total >= height if may_be_cut else total == height
        if not fits or any(list(entry.shape[1:]) != rest for entry in row):
            held = " and ".join(str(list(entry.shape)) for entry in row)
            raise CheckpointError(
                f"The tensor {keys[0]} of {owner} is {held}, where the configuration asks for {[height, *rest]}; "
                "weights and config.json are not of one model."
            )

    def load() -> torch.Tensor:
        joined = [torch.cat([entry.load() for entry in row]) if len(row) > 1 else row[0].load() for row in parts]
        return torch.stack(joined) if stacked else joined[0][:height]

    return Piece(name, shape, parts[0][0].dtype, load)


def _check_disk(need: int, folder: Path) -> None:
    need -= sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise LoadError(
            f"Converting the weights needs {need / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB is free; "
            "make room or choose another --cache-dir."
        )


def write(found: list[Piece], folder: Path, progress: Callable[[float], None]) -> None:
    """Writes `found` to `folder` as sharded safetensors with their index; goes on where an earlier run stopped.

    `progress` is told the share of bytes written. Raises `LoadError` when the disk has no room for them.
    """
    total = max(1, sum(piece.nbytes for piece in found))
    _check_disk(total, folder)
    shards: list[list[Piece]] = [[]]
    size = done = 0
    for piece in found:
        if shards[-1] and size + piece.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done / total)

    places = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        streaming.write(file, shard, wrote)
        streaming.finish(file)
        places |= {piece.name: file.name for piece in shard}
    for name in set(places.values()):
        streaming.forget_sums(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
