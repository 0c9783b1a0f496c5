"""From a MoE-LLaVA checkpoint as published to a folder that transformers loads: made once, then only a path.

It knows nothing of hubs: the checkpoint and its vision tower are folders.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, GenerationConfig, SiglipConfig, SiglipVisionConfig

from mllm_demo.chat.events import LoadProgress
from mllm_demo.errors import CheckpointError, LoadError
from mllm_demo.models.checkpoints.source import Source
from mllm_demo.models.fetching import Progress
from mllm_demo.models.moe_llava import weights
from mllm_demo.models.moe_llava.config import FAMILIES, MoeLlavaConfig
from mllm_demo.models.moe_llava.processor import load_image_processor, load_tokenizer, make_processor, vocabulary_of

LAYOUT_VERSION = 1  # raise when the folder that is written changes


def read_original(folder: Path) -> dict | None:
    """The configuration in `folder` if it is one of the original's, else None."""
    try:
        flat = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    families = {family.model_type for family in FAMILIES}
    is_ours = not isinstance(flat, dict) or flat.get("model_type") not in families or "text_config" in flat
    return None if is_ours else flat


def read_config(folder: Path, tower: Path, title: str) -> MoeLlavaConfig:
    """The configuration of the original in `folder` with that of its `tower`; raises `CheckpointError`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        seen = AutoConfig.from_pretrained(tower, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The vision tower of {title} in {tower.name} cannot be read; fetch it again.") from error
    if isinstance(seen, CLIPConfig | SiglipConfig):
        seen = seen.vision_config
    if not isinstance(seen, CLIPVisionConfig | SiglipVisionConfig):
        raise CheckpointError(
            f"The vision tower of {title} is a {seen.model_type}; the published ones are CLIP and SigLIP."
        )
    if isinstance(seen, SiglipVisionConfig):
        seen.vision_use_head = False  # pools the picture to one vector, which nothing reads
    config.vision_config = seen
    patches = (seen.image_size // seen.patch_size) ** 2
    if config.vision_feature_select_strategy == "default":
        patches -= isinstance(seen, SiglipVisionConfig)
    else:
        patches += isinstance(seen, CLIPVisionConfig)
    config.image_seq_length = patches
    return config


def convert_weights(
    folder: Path, tower: Path, config: MoeLlavaConfig, target: Path, title: str, progress: Callable[[float], None]
) -> None:
    """Writes the tensors of `folder` and `tower` to `target`; `progress` is told the share done."""
    weights.write(weights.pieces(config, Source(folder), Source(tower), title), target, progress)


def _key(folder: Path, tower: Path) -> str:
    """Changes whenever anything that the converted folder is made of changes; weights count by name and size."""
    digest = hashlib.sha256(str(LAYOUT_VERSION).encode())
    for path in [*sorted(folder.glob("*")), *sorted(tower.glob("*"))]:
        if path.suffix in (".json", ".txt", ".tiktoken"):
            digest.update(path.read_bytes())
        elif path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def prepare(folder: Path, tower: Path, cache_dir: Path, title: str, progress: Progress) -> Path:
    """The converted folder of the original in `folder`, in the cache; made if it is not there yet.

    A run that was killed goes on where it stopped; a half-made folder is never returned. Raises `CheckpointError`
    for what is wrong with the files, `LoadError` when the cache cannot be written.
    """
    target = cache_dir / "moe_llava" / f"{folder.name}-{_key(folder, tower)}"
    if target.is_dir():
        return target
    config = read_config(folder, tower, title)
    tokenizer = load_tokenizer(folder, title)
    tokens, rows = vocabulary_of(tokenizer), weights.vocabulary_size(Source(folder), config, title)
    if tokens > rows:
        raise CheckpointError(
            f"The tokenizer of {title} has {tokens} tokens and its weights have {rows}; they are not of one model."
        )
    config.text_config.vocab_size = tokens
    processor = make_processor(tokenizer, load_image_processor(tower, config, title), config)
    config.image_token_index = processor.image_token_id
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id

    def written(share: float) -> None:
        progress(LoadProgress(share, f"Converting {title}, once: {share:.0%}"))

    written(0.0)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        convert_weights(folder, tower, config, partial, title, written)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        GenerationConfig(**ends).save_pretrained(partial)
        partial.rename(target)
    except OSError as error:
        raise LoadError(
            f"Could not write the converted {title} to {cache_dir} ({error.strerror}); make room or choose another "
            "--cache-dir."
        ) from error
    return target
