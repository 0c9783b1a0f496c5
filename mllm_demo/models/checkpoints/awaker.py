"""Awaker2.5-VL: from the original's one state dict to an ordinary base checkpoint and a PEFT adapter of our method.

    python -m mllm_demo.models.checkpoints.awaker FOLDER --out CONVERTED

Loading does the same by itself, once, into the cache. Tensors are read and written one at a time; a run that was
killed goes on where it stopped; every file written is checksummed. It knows nothing of hubs or devices.
"""

import argparse
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PretrainedConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mllm_demo.chat.events import LoadProgress
from mllm_demo.cli import Parser, TerminalProgress, run
from mllm_demo.errors import CheckpointError
from mllm_demo.models.checkpoints import streaming
from mllm_demo.models.checkpoints.awaker_layout import (
    MARK,
    PREFIX,
    Mixture,
    adapter_pieces,
    base_pieces,
    check,
    expected_keys,
)
from mllm_demo.models.checkpoints.source import Entry, Source, weight_files
from mllm_demo.models.checkpoints.streaming import Piece
from mllm_demo.models.fetching import ADAPTER_WEIGHTS, DESCRIPTIONS, Progress

BASE, ADAPTER, MANIFEST = "base", "adapter", "conversion.json"
SHARD_BYTES = 4 * 10**9
SAMPLED = 2**20
_NOT_COPIED = ("config.json", "adapter_config.json", MANIFEST)


@dataclass(frozen=True)
class Converted:
    """Where a conversion's two halves are; `base` is None where only the adapter was asked for."""

    base: Path | None
    adapter: Path
    adapter_sha256: str


def is_checkpoint(path: Path) -> bool:
    """Whether `path` holds an original of this kind, judged by the names of its tensors.

    Raises `CheckpointError` when it has only pickled weights and they cannot be read.
    """
    try:
        files = weight_files(path)
    except CheckpointError:
        return False
    try:
        return any(MARK in name for name in Source(path))
    except CheckpointError:
        if files[0].suffix == ".bin":
            raise
        return False


def convert(
    source: Path, out: Path, progress: Progress, *, descriptions: Path | None = None, base: Path | None = None
) -> Converted:
    """Converts the checkpoint `source`, a folder or its one file, into `out`; at once when that was done before.

    `descriptions`: folder with the configuration, tokenizer and processor of the base model; default: `source`.
    `base`: a base model that is already there; then only the adapter is written.

    Raises `CheckpointError` for a foreign, damaged or incomplete checkpoint, and when the disk is full.
    """
    tensors_from = _identity(source, base)
    if is_done(out, tensors_from):
        progress(LoadProgress(1.0, "Already converted"))
        return _converted(out, base)
    title = source.name
    progress(LoadProgress(0.0, f"Reading what {title} holds"))
    tensors = Source(source)
    described = descriptions or (source if source.is_dir() else source.parent)
    config, declared = _configuration(described)
    mixture = Mixture.read(tensors, declared)
    check(tensors, expected_keys(config, mixture), config.tie_word_embeddings, title)
    if base is not None:
        _check_base(base, tensors)
    files = _plan(tensors, config, mixture, out, with_base=base is None)
    _check_disk(files, out)
    try:
        sums = _write(files, title, progress)
        if base is None:
            _describe_base(out / BASE, config, described, files)
        mixture.config().save_pretrained(out / ADAPTER)
        for file in files:
            streaming.finish(file)
        manifest = {
            "source": tensors_from,
            "files": {
                file.relative_to(out).as_posix(): {"bytes": file.stat().st_size, "sha256": total}
                for file, total in sums.items()
            },
        }
        partial = out / f"{MANIFEST}{streaming.PART}"
        partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        partial.rename(out / MANIFEST)
        for file in files:
            streaming.forget_sums(file)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise CheckpointError(f"{out} could not be written ({reason}); make room, then start again.") from error
    progress(LoadProgress(1.0, f"{title} is converted"))
    return _converted(out, base)


def prepare(source: Path, cache_dir: Path, progress: Progress, *, descriptions: Path) -> Converted:
    """`convert` into a place of its own under `cache_dir`, named by what is converted."""
    content = json.dumps(_identity(source, None)).encode() + (descriptions / "config.json").read_bytes()
    name = f"{source.name}-{hashlib.sha256(content).hexdigest()[:12]}"
    return convert(source, cache_dir / "converted" / name, progress, descriptions=descriptions)


def _converted(out: Path, base: Path | None) -> Converted:
    about = _manifest(out)["files"][f"{ADAPTER}/{ADAPTER_WEIGHTS}"]
    return Converted(None if base else out / BASE, out / ADAPTER, about["sha256"])


def is_done(out: Path, tensors_from: Mapping) -> bool:
    """Whether `out` holds the whole conversion of that source: every file is there, with its size."""
    manifest = _manifest(out)
    return manifest.get("source") == tensors_from and all(
        (out / name).is_file() and (out / name).stat().st_size == about["bytes"]
        for name, about in manifest["files"].items()
    )


def verify(out: Path, progress: Progress) -> None:
    """Reads every file of a conversion again; raises `CheckpointError` naming the first that has changed."""
    files = _manifest(out).get("files")
    if not files:
        raise CheckpointError(f"{out} holds no finished conversion; convert again.")
    total, done = sum(about["bytes"] for about in files.values()), 0
    for name, about in files.items():

        def read(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            progress(LoadProgress(done / total, f"Checking {name}"))

        if not (out / name).is_file() or streaming.checksum(out / name, read) != about["sha256"]:
            raise CheckpointError(f"{out / name} is not what was written; delete {out} and convert again.")


def _manifest(out: Path) -> dict:
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _identity(source: Path, base: Path | None) -> dict:
    """What tells one source from another without reading it all: of each file its name, size, beginning and end.

    At the end of a `torch.save` file stand the checksums of all its tensors.
    """
    files = []
    for file in weight_files(source):
        size = file.stat().st_size
        with file.open("rb") as stream:
            ends = stream.read(SAMPLED)
            stream.seek(max(0, size - SAMPLED))
            ends += stream.read()
        files.append([file.name, size, hashlib.sha256(ends).hexdigest()])
    return {"weights": files, "with_base": base is None}


def _configuration(folder: Path) -> tuple[PretrainedConfig, dict]:
    """The base model's configuration, and what the same file declares under "moe"."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        declared = content.pop("moe", None) or {}
        kind = str(content.pop("model_type"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} holds no config.json of the base model; put the files that describe it beside the weights, or "
            "name their folder with --config."
        ) from error
    if kind != Qwen2VLConfig.model_type:
        raise CheckpointError(
            f"The configuration in {folder} is of a {kind} model, where the base of an Awaker checkpoint, a "
            f"{Qwen2VLConfig.model_type}, belongs; name the right folder with --config."
        )
    try:
        return Qwen2VLConfig(**content), declared
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"The config.json in {folder} cannot be used as it is; fetch it again.") from error


def _plan(
    tensors: Mapping[str, Entry], config: PretrainedConfig, mixture: Mixture, out: Path, *, with_base: bool
) -> dict[Path, list[Piece]]:
    """The tensors of each file that will be written."""
    files: dict[Path, list[Piece]] = {}
    if with_base:
        shards: list[list[Piece]] = [[]]
        for piece in base_pieces(tensors, config):
            if shards[-1] and sum(p.nbytes for p in shards[-1]) + piece.nbytes > SHARD_BYTES:
                shards.append([])
            shards[-1].append(piece)
        for index, shard in enumerate(shards, start=1):
            name = f"model-{index:05}-of-{len(shards):05}" if len(shards) > 1 else "model"
            files[out / BASE / f"{name}.safetensors"] = shard
    files[out / ADAPTER / ADAPTER_WEIGHTS] = adapter_pieces(tensors, config, mixture)
    return files


def _write(files: Mapping[Path, Sequence[Piece]], title: str, progress: Progress) -> dict[Path, str]:
    total = sum(piece.nbytes for pieces in files.values() for piece in pieces)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress(LoadProgress(done / total, f"Converting {title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB"))

    sums = {}
    for file, pieces in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        sums[file] = streaming.write(file, pieces, wrote)
    return sums


def _describe_base(
    folder: Path, config: PretrainedConfig, described: Path, files: Mapping[Path, Sequence[Piece]]
) -> None:
    """Writes the base model's configuration and shard index, and copies tokenizer and processor."""
    for pattern in DESCRIPTIONS:
        for file in described.glob(pattern):
            if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config.architectures = [Qwen2VLForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    shards = {file: pieces for file, pieces in files.items() if file.parent == folder}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(piece.nbytes for pieces in shards.values() for piece in pieces)},
            "weight_map": {piece.name: file.name for file, pieces in shards.items() for piece in pieces},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _check_disk(files: Mapping[Path, Sequence[Piece]], out: Path) -> None:
    need = 0
    for file, pieces in files.items():
        part = file.with_name(file.name + streaming.PART)
        there = next((path.stat().st_size for path in (part, file) if path.is_file()), 0)
        need += max(0, sum(piece.nbytes for piece in pieces) - there)
    existing = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise CheckpointError(
            f"Converting needs {need / 1e9:.1f} GB in {out}, where {free / 1e9:.1f} GB is free; make room or "
            "choose another folder."
        )


def _check_base(base: Path, tensors: Mapping[str, Entry]) -> None:
    """Compares the small tensors (norms, biases), which training a whole model would have moved too."""
    held = Source(base)
    small = [name for name, entry in held.items() if len(entry.shape) == 1 and PREFIX + name in tensors]
    if not small:
        raise CheckpointError(f"{base} is not the base model of this checkpoint; leave out --base.")
    for name in small:
        ours, theirs = held[name].load(), tensors[PREFIX + name].load()
        if ours.shape != theirs.shape or not torch.equal(ours.to(theirs.dtype), theirs):
            raise CheckpointError(f"{base} holds another {name} than the checkpoint does; leave out --base.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; raises `SettingsError`."""
    parser = Parser(
        prog="python -m mllm_demo.models.checkpoints.awaker",
        description="Turn an original Awaker checkpoint into a base model and an adapter.",
    )
    parser.add_argument("source", type=Path, help="folder of the original, or its pytorch_model.bin")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two")
    parser.add_argument(
        "--config", type=Path, default=None, help="folder with config.json, tokenizer and processor of the base model"
    )
    parser.add_argument(
        "--base", type=Path, default=None, help="base model that is already there: write only the adapter"
    )
    parser.add_argument("--verify", action="store_true", help="read what was written again and compare checksums")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, and says how to load the result."""
    arguments = parse(argv)
    source, out = arguments.source.expanduser().resolve(), arguments.out.expanduser().resolve()
    if not source.exists():
        raise CheckpointError(f"{arguments.source} does not exist; check the path.")
    progress = TerminalProgress(sys.stderr)
    try:
        written = convert(source, out, progress, descriptions=arguments.config or arguments.base, base=arguments.base)
        if arguments.verify:
            verify(out, progress)
    except SafetensorError as error:
        raise CheckpointError(f"{source} cannot be read ({error}); fetch it again.") from error
    finally:
        progress.close()
    print(f"Load it with: --model {written.base or arguments.base} --adapter {written.adapter}")


if __name__ == "__main__":
    sys.exit(run(main))
