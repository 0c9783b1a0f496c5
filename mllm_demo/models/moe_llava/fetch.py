"""Brings a MoE-LLaVA checkpoint and the vision tower that it names to this machine, and has them converted.

It knows nothing of tensors.
"""

from pathlib import Path

from mllm_demo.errors import CheckpointError
from mllm_demo.models import fetching
from mllm_demo.models.fetching import Files, Progress, monotone
from mllm_demo.models.moe_llava.checkpoint import prepare, read_original

_CHECKPOINT = (*fetching.DESCRIPTIONS, "*.tiktoken", "pytorch_model*.bin", *fetching.WEIGHTS)
_TOWER = ("config.json", "preprocessor_config.json", "pytorch_model.bin", "model.safetensors")


def is_original(folder: Path) -> bool:
    """Whether `folder` holds (the description of) a checkpoint as MoE-LLaVA publishes it."""
    return read_original(folder) is not None


def fetch(name: str, described: Path, cache_dir: Path, title: str, progress: Progress) -> Files:
    """A folder that transformers loads, made of `name`, a local folder or hub id, whose config.json is in `described`.

    Instant and offline when that was done before. Raises the `LoadError` family.
    """
    tower_name = read_original(described).get("mm_image_tower")
    if not tower_name:
        raise CheckpointError(f"{title} names no vision tower (mm_image_tower), so it cannot see; pick another model.")
    files = fetching.fetch_files(name, _CHECKPOINT, cache_dir, monotone(progress, 0.0, 0.6))
    tower = _tower_beside(files.folder, tower_name)
    if tower is None:
        tower = fetching.fetch_files(tower_name, _TOWER, cache_dir, monotone(progress, 0.6, 0.7)).folder
    converted = prepare(files.folder, tower, cache_dir, title, monotone(progress, 0.7, 1.0))
    return Files(converted, files.revision)


def _tower_beside(folder: Path, name: str) -> Path | None:
    """A local copy of the tower: where `name` is a path, or a folder called like it inside or beside the model's."""
    places = (Path(name).expanduser(), folder / name, folder / Path(name).name, folder.parent / Path(name).name)
    return next((place.resolve() for place in places if (place / "config.json").is_file()), None)
