"""Finds the files of a choice: in a local folder, in the cache, or on the hub, with progress in bytes.

A start that finds everything in the cache touches no network. It knows nothing of tensors or devices.
"""

import errno
import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm import tqdm

from mllm_demo.chat.events import LoadProgress
from mllm_demo.errors import AdapterError, CheckpointError, DownloadError, LoadError

Progress = Callable[[LoadProgress], None]

DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = ("*.safetensors",)
PICKLED = ("pytorch_model*.bin",)
# Copies of the same weights for other runtimes.
IGNORED = ("onnx/*", "original/*", "consolidated*.safetensors")
HASHED_AT_ONCE = 16 * 2**20
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Files:
    """A folder on this machine and the revision (commit or content digest) that it holds."""

    folder: Path
    revision: str


def default_cache_dir() -> Path:
    """Where fetched and quantized weights are kept when nothing else was asked for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_demo"


def monotone(progress: Progress, start: float = 0.0, end: float = 1.0) -> Progress:
    """Maps 0..1 onto `start`..`end` of `progress`, and never lets the fraction go back."""
    highest = start

    def report(step: LoadProgress) -> None:
        nonlocal highest
        highest = max(highest, start + (end - start) * min(max(step.fraction, 0.0), 1.0))
        progress(LoadProgress(highest, step.note))

    return report


def _byte_bar(progress: Progress, name: str) -> type[tqdm]:
    """A tqdm class for the hub client: it draws nothing and reports the bytes that are on disk."""

    class ByteBar(tqdm):
        def __init__(self, *args, **kwargs):
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args, **kwargs):
            return None

        def update(self, n=1):
            # The client counts bytes twice, as received and as written; only the latter starts with what is cached.
            self.n += n or 0
            if self.counts_bytes and self.total and self.desc and not self.desc.startswith("Download"):
                note = f"Fetching {name}: {self.n / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
                progress(LoadProgress(self.n / self.total, note))

        def close(self):
            self.disable = True

    return ByteBar


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def digest(folder: Path) -> str:
    """Names what a local folder holds: configuration by content, weights by name and size."""
    summary = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        summary.update(path.read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        summary.update(f"{path.name} {path.stat().st_size}".encode())
    return f"sha256:{summary.hexdigest()[:16]}"


def _from_hub(name: str, patterns: tuple[str, ...], cache_dir: Path, progress: Progress) -> Files:
    """The snapshot of hub repository `name`; raises `DownloadError`."""
    try:
        (cache_dir / "hub").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"Could not write to {cache_dir} ({error.strerror}); choose another --cache-dir."
        ) from error
    wanted = {
        "cache_dir": cache_dir / "hub",
        "allow_patterns": list(patterns),
        "ignore_patterns": list(IGNORED),
    }
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **wanted))
    except LocalEntryNotFoundError:
        try:
            folder = Path(snapshot_download(name, tqdm_class=_byte_bar(progress, name), **wanted))
        except GatedRepoError as error:
            raise DownloadError(
                f"The hub asks for permission to fetch {name}; accept its terms there and set HF_TOKEN."
            ) from error
        except RepositoryNotFoundError as error:
            raise DownloadError(
                f"The hub has no {name}; check the spelling, or give a local folder."
            ) from error
        except Exception as error:  # the exceptions of the client's HTTP library differ between its versions
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise DownloadError(
                    f"The disk is full: {name} does not fit in {cache_dir}; make room or choose another --cache-dir."
                ) from error
            raise DownloadError(
                f"{name} could not be fetched from the hub; check the network, or give a local folder instead."
            ) from error
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is no preset, no folder and no hub id (owner/name); check the spelling, or choose a preset."
        ) from error
    return Files(folder, folder.name)


def local_folder(name: str, error: type[LoadError], what: str) -> Path | None:
    """The folder that `name` is, None where it may be a hub id; raises `error` for a path that is no folder."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise error(f"{name} is a file; give the folder that holds the {what}.")
    if _looks_like_path(name):
        raise error(f"The {what} folder {name} does not exist; check the path.")
    return None


def fetch_files(name: str, patterns: tuple[str, ...], cache_dir: Path, progress: Progress) -> Files:
    """A local folder as it is, or the files of a hub id that match `patterns`; raises `LoadError`."""
    folder = local_folder(name, CheckpointError, "model")
    return Files(folder, digest(folder)) if folder else _from_hub(name, patterns, cache_dir, progress)


def fetch_descriptions(name: str, cache_dir: Path, progress: Progress) -> Files:
    """Configuration, tokenizer and processor files of a folder or hub id: small, enough to judge the model by."""
    folder = local_folder(name, CheckpointError, "model")
    if folder is None and "/" not in name:
        raise CheckpointError(
            f"{name!r} is no preset, no folder and no hub id (owner/name); check the spelling, or choose a preset."
        )
    files = Files(folder, digest(folder)) if folder else _from_hub(name, DESCRIPTIONS, cache_dir, progress)
    if not (files.folder / "config.json").is_file():
        raise CheckpointError(
            f"{name} holds no config.json, so it is not a model; check the path or the hub id."
        )
    return files


def fetch_weights(name: str, cache_dir: Path, progress: Progress) -> Files:
    """All files of a model; raises `CheckpointError` when its weights are not safetensors."""
    files = fetch_files(name, DESCRIPTIONS + WEIGHTS, cache_dir, progress)
    if not any(files.folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{name} has no .safetensors weights; pickled weights are not read, convert them first."
        )
    return files


def fetch_adapter(name: str, cache_dir: Path, progress: Progress, with_subfolders: bool = False) -> Files:
    """A PEFT adapter's folder; raises `AdapterError` when it is not one or is pickled.

    `with_subfolders`: also the adapters inside it, which an X-LoRA consists of.
    """
    folder = local_folder(name, AdapterError, "adapter")
    if folder is None and "/" not in name:
        raise AdapterError(
            f"The adapter {name!r} is no folder and no hub id (owner/name); check the spelling."
        )
    wanted = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    if with_subfolders:
        wanted += (f"*/{ADAPTER_CONFIG}", f"*/{ADAPTER_WEIGHTS}")
    folder = folder or _from_hub(name, wanted, cache_dir, progress).folder
    if not (folder / ADAPTER_CONFIG).is_file():
        raise AdapterError(f"{name} holds no {ADAPTER_CONFIG}, so it is not a PEFT adapter; check the path.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(
            f"{name} holds no {ADAPTER_WEIGHTS}; pickled adapters are not read, save it as safetensors."
        )
    content = hashlib.sha256()
    for path in sorted(path for pattern in wanted for path in folder.glob(pattern)):
        with path.open("rb") as file:
            while piece := file.read(HASHED_AT_ONCE):
                content.update(piece)
    return Files(folder, f"sha256:{content.hexdigest()[:16]}")
