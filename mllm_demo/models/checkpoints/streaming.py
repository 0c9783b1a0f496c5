"""Writes safetensors files tensor by tensor, so that a file of any size costs the memory of one tensor.

A run that is killed at any moment goes on where it stopped: what is written is checked against the checksum noted
beside it, and the first tensor that is not whole is made again. It knows nothing of what the tensors mean.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mllm_demo.models.checkpoints.source import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_READ = 16 * 2**20
PART, SUMS = ".part", ".sums"


@dataclass(frozen=True)
class Piece:
    """One tensor of a file to be written: known by shape and dtype, made by `load` when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def header(pieces: Sequence[Piece]) -> bytes:
    """What the file begins with: the length of a JSON table, and the table."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        table[piece.name] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.nbytes],
        }
        offset += piece.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: Path, pieces: Sequence[Piece], wrote: Callable[[int], None]) -> str:
    """Writes `pieces` to `file`.part and returns the sha256 of the whole; `wrote` is told the bytes of each tensor.

    `finish` gives the file its name. What an earlier run left, of the same pieces, is kept as far as it is whole.
    """
    start = header(pieces)
    part, sums = file.with_name(file.name + PART), file.with_name(file.name + SUMS)
    source = part if part.exists() or not file.exists() else file
    whole = hashlib.sha256(start)
    kept = _kept(source, sums, start, pieces, whole, wrote)
    if source == file and kept == len(pieces):
        return whole.hexdigest()
    if source == file:
        file.rename(part)
    with part.open("r+b" if kept else "wb") as stream, sums.open("r+b" if kept else "wb") as notes:
        position = len(start) + sum(piece.nbytes for piece in pieces[:kept])
        if kept:
            stream.truncate(position)
            notes.truncate(kept * 65)
        else:
            stream.write(start)
        stream.seek(position)
        notes.seek(kept * 65)
        for piece in pieces[kept:]:
            data = _bytes(piece)
            whole.update(data)
            stream.write(data)
            stream.flush()
            notes.write(hashlib.sha256(data).hexdigest().encode() + b"\n")
            notes.flush()
            wrote(piece.nbytes)
        os.fsync(stream.fileno())
    return whole.hexdigest()


def finish(file: Path) -> None:
    """Gives a written file its name."""
    part = file.with_name(file.name + PART)
    if part.exists():
        part.rename(file)


def forget_sums(file: Path) -> None:
    """Removes the notes beside a finished file, once nothing can be left to resume."""
    file.with_name(file.name + SUMS).unlink(missing_ok=True)


def checksum(file: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """The sha256 of `file`; `read` is told the bytes as they are read."""
    whole = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(_READ):
            whole.update(data)
            read(len(data))
    return whole.hexdigest()


def _bytes(piece: Piece) -> memoryview:
    tensor = piece.load().detach().to("cpu", piece.dtype).contiguous()
    if tuple(tensor.shape) != piece.shape:
        raise ValueError(f"{piece.name} has shape {tuple(tensor.shape)}, not {piece.shape}")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _kept(part: Path, sums: Path, start: bytes, pieces: Sequence[Piece], whole, wrote: Callable[[int], None]) -> int:
    """How many of `pieces` an earlier run has left whole in `part`; their bytes are added to `whole`."""
    if not part.is_file() or not sums.is_file():
        return 0
    noted = sums.read_text(encoding="ascii", errors="replace").splitlines()
    kept = 0
    with part.open("rb") as stream:
        if stream.read(len(start)) != start:
            return 0
        for piece, expected in zip(pieces, noted, strict=False):
            data = stream.read(piece.nbytes)
            if hashlib.sha256(data).hexdigest() != expected:
                break
            whole.update(data)
            wrote(piece.nbytes)
            kept += 1
    return kept
