"""An original checkpoint's tensors, assembled under the names used here and written as safetensors, once.

Tensors stay in their files until they are needed (memory mapping), and one file of the result is in memory at a time.
Nothing is unpickled but tensors. It knows nothing of hubs, processors or devices.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mllm_demo.errors import CheckpointError
from mllm_demo.models.moe_llava.config import MoeLlavaConfig, mixture
from mllm_demo.models.moe_llava.naming import VISION_TOWER, Naming

SHARD_BYTES = 2 * 10**9
Tensors = Mapping[str, torch.Tensor]


def open_weights(folder: Path, title: str) -> Tensors:
    """All tensors of `folder`'s safetensors or, if it has none, of its `pytorch_model*.bin`, mapped, not read.

    Raises `CheckpointError` when there is neither or a file is no checkpoint.
    """
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise CheckpointError(f"{title} has no weights (pytorch_model.bin or .safetensors); fetch it again.")
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        tensors.update(_open(path, title))
    return tensors


def _open(path: Path, title: str) -> Tensors:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} of {title} is damaged or cut off; fetch it again.") from error
    except Exception as error:  # what a damaged or hostile pickle raises depends on its bytes
        raise CheckpointError(
            f"{path.name} of {title} is damaged, cut off, or holds more than tensors; fetch it again."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path.name} of {title} is not a table of tensors; give the model's own checkpoint.")
    return state


@dataclass(frozen=True)
class _Part:
    """One parameter here: its shape, and its tensors in the original, to be joined (inner) and stacked (outer)."""

    name: str
    shape: torch.Size
    sources: list[list[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.sources[0][0].dtype.itemsize

    def assembled(self) -> torch.Tensor:
        joined = [torch.cat(row) if len(row) > 1 else row[0] for row in self.sources]
        whole = torch.stack(joined) if len(joined) > 1 or len(self.shape) > joined[0].dim() else joined[0]
        # Rows beyond the vocabulary that is used; nothing else may be longer than it should.
        return whole[: self.shape[0]].clone() if whole.shape != self.shape else whole.contiguous()


def vocabulary_size(tensors: Tensors, config: MoeLlavaConfig, title: str) -> int:
    """Rows of the original's token embeddings; raises `CheckpointError` when it has none."""
    name = Naming(config.text_config.model_type).sources("model.language_model.embed_tokens.weight", 0)[0][0]
    if name not in tensors:
        raise CheckpointError(f"{title} lacks {name}, so it is not such a model; fetch it again.")
    return tensors[name].shape[0]


def plan(config: MoeLlavaConfig, original: Tensors, tower: Tensors, title: str) -> list[_Part]:
    """Every parameter of `config`'s model, in its order, with its sources.

    Raises `CheckpointError` with the name of the first tensor that is missing, of another shape, or unknown.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    naming, counts = Naming(config.text_config.model_type), mixture(config.text_config).experts
    used: set[str] = set()
    parts = []
    for name, expected in model.state_dict().items():
        if name == "lm_head.weight" and name not in original and config.tie_word_embeddings:
            continue
        if name.startswith(VISION_TOWER):
            names, state = [[name.removeprefix(VISION_TOWER)]], tower
        else:
            layer = name.partition(".layers.")[2].partition(".")[0]
            names, state = naming.sources(name, counts.get(int(layer), 0) if layer else 0), original
            used.update(key for row in names for key in row)
        for key in (key for row in names for key in row):
            if key not in state:
                raise CheckpointError(f"{title} lacks the tensor {key}; fetch it again, whole.")
        part = _Part(name, expected.shape, [[state[key] for key in row] for row in names])
        _check_shape(part, names, title)
        parts.append(part)
    unknown = next((key for key in original if key not in used and not naming.is_ignored(key)), None)
    if unknown is not None:
        raise CheckpointError(
            f"{title} holds the tensor {unknown}, for which its configuration has no place; it is of another kind."
        )
    return parts


def _check_shape(part: _Part, names: list[list[str]], title: str) -> None:
    rows, *rest = part.shape[1:] if len(names) > 1 or len(part.shape) > part.sources[0][0].dim() else part.shape
    for tensors, keys in zip(part.sources, names, strict=True):
        found = sum(tensor.shape[0] for tensor in tensors)
        enough = found >= rows if "embed_tokens" in part.name or part.name == "lm_head.weight" else found == rows
        if not enough or any(list(tensor.shape[1:]) != rest for tensor in tensors):
            shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
            raise CheckpointError(
                f"The tensor {keys[0]} of {title} is {shapes}, where its configuration asks for {[rows, *rest]}; "
                "weights and config.json are not of one model."
            )


def write(parts: list[_Part], folder: Path, progress: Callable[[float], None]) -> None:
    """Writes `parts` as sharded safetensors with their index; `progress` is told the share of bytes written."""
    total = max(1, sum(part.num_bytes for part in parts))
    shards: list[list[_Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.num_bytes
    done, places = 0, {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({part.name: part.assembled() for part in shard}, folder / file, metadata={"format": "pt"})
        places |= {part.name: file for part in shard}
        done += sum(part.num_bytes for part in shard)
        progress(done / total)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
