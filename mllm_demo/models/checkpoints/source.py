"""A checkpoint's tensors by name, one at a time: `pytorch_model.bin` or safetensors, whole or in shards.

Files are mapped into memory, so a tensor costs memory only while somebody holds it; pickles are read with
`weights_only=True`. It knows nothing of what the tensors mean.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mllm_demo.errors import CheckpointError
from mllm_demo.models.checkpoints.truncated import first_cut_tensor

PATTERNS = ("pytorch_model*.bin", "model*.safetensors", "state.safetensors")
INDEXES = ("pytorch_model.bin.index.json", "model.safetensors.index.json")
# What safetensors calls the dtypes that a model may be stored in.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Entry:
    """One tensor that can be had: its shape and dtype are known, its bytes are read by `load`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


class Source(Mapping[str, Entry]):
    """Every tensor of a checkpoint: `source[name].load()`, in the order of its files.

    `path`: a folder or one file. Raises `CheckpointError` for a folder without weights, and for a file that is
    damaged or of another kind, by name of the first tensor that cannot be had where that can be told.
    """

    def __init__(self, path: Path) -> None:
        self.files = weight_files(path)
        self._entries: dict[str, Entry] = {}
        for file in self.files:
            entries = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
            for name, entry in entries.items():
                if name in self._entries:
                    raise CheckpointError(f"{file.name} holds {name}, which another file holds too; fetch it again.")
                self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights in `path`, a folder or a file; of two formats the safer one."""
    if path.is_file():
        return [path]
    for index in reversed(INDEXES):
        if (path / index).is_file():
            try:
                names = sorted(set(json.loads((path / index).read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path / index} cannot be read; fetch it again.") from error
            missing = [name for name in names if not (path / name).is_file()]
            if missing:
                raise CheckpointError(f"{path} lacks {missing[0]}, which its index names; fetch it again.")
            return [path / name for name in names]
    for pattern in reversed(PATTERNS):
        if files := sorted(path.glob(pattern)):
            return files
    raise CheckpointError(f"{path} holds no pytorch_model.bin and no model.safetensors; give the folder that does.")


def _safetensors(file: Path) -> dict[str, Entry]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        room = file.stat().st_size - 8 - length
        by_end = sorted(header.items(), key=lambda item: item[1]["data_offsets"][1])
        cut = next((name for name, about in by_end if about["data_offsets"][1] > room), None)
        shapes = {name: (tuple(about["shape"]), DTYPES[about["dtype"]]) for name, about in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file or is damaged; fetch it again.") from error
    if cut is not None:
        raise CheckpointError(f"{file} is cut off: {cut} is not all there; fetch it again.")

    def loader(name: str) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            try:
                with safe_open(file, framework="pt") as weights:
                    return weights.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{name} cannot be read from {file}; fetch it again.") from error

        return load

    return {name: Entry(shape, dtype, loader(name)) for name, (shape, dtype) in shapes.items()}


def _pickled(file: Path) -> dict[str, Entry]:
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch has no one exception for a file that is not its own
        cut = first_cut_tensor(file)
        if cut is not None:
            raise CheckpointError(f"{file} is cut off: {cut} is not all there; fetch it again.") from error
        raise CheckpointError(
            f"{file} is not a file of tensors that torch.save wrote in its zip format, or is damaged; fetch it again."
        ) from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{file} holds a {type(tensors).__name__}, not a state dict; give another file.")
    foreign = next((name for name, value in tensors.items() if not isinstance(value, torch.Tensor)), None)
    if foreign is not None:
        raise CheckpointError(f"{file} is not a state dict: {foreign} is no tensor; give another file.")
    return {
        str(name): Entry(tuple(value.shape), value.dtype, lambda value=value: value.contiguous())
        for name, value in tensors.items()
    }
