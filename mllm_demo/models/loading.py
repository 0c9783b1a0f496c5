"""From a choice to a model that answers: fetched files, quantized weights, adapter, processor.

`fetch` brings every file to this machine and judges whether the model can run here; `load` puts it into memory.
It knows nothing of chats, pages or routing. Remote code is never run, and of a pickle nothing but tensors is read.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, XLoraConfig
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mllm_demo.chat.events import LoadProgress
from mllm_demo.errors import CheckpointError, LoadError, OutOfMemoryError
from mllm_demo.models import adapters, catalog, fetching, memory, mixtures, quantize, sizes
from mllm_demo.models.bundled import weights as bundled_weights
from mllm_demo.models.checkpoints import awaker
from mllm_demo.models.fetching import Progress, monotone
from mllm_demo.models.moe_llava import fetch as moe_llava
from mllm_demo.models.moe_llava.model import set_noise
from mllm_demo.models.processors import load_processor
from mllm_demo.models.progress import bars_as_progress
from mllm_demo.models.reading import unmapped
from mllm_demo.settings import QUANTIZATIONS, ModelChoice

FETCH_SHARE = 0.5  # of the progress bar, when nothing is in the cache yet
LARGE_EXPERTS_BYTES = 10**9  # from which on experts are held in 4 bit unless something else was asked for


@dataclass(frozen=True)
class ResolvedModel:
    """Everything `load` needs, on this machine: folders, revisions and the names a person knows them by."""

    choice: ModelChoice
    title: str
    folder: Path
    revision: str
    adapter_names: tuple[str, ...] = ()
    adapter_folders: tuple[Path, ...] = ()
    adapter_revision: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on `device`, its processor, and the truth about both.

    `quantization` is what the weights really are; `dtype` what they compute in; `context_length` in tokens;
    `four_bit_share`, `memory_bytes`, `parameters` are counted from the tensors; `remark`: what a person should know
    about how this model is run, or "".
    """

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin
    choice: ModelChoice
    device: torch.device
    title: str
    adapter_title: str | None
    base_revision: str
    adapter_revision: str | None
    quantization: str
    dtype: str
    context_length: int
    four_bit_share: float
    memory_bytes: int
    parameters: int
    remark: str = ""


def read_config(folder: Path, title: str) -> PretrainedConfig:
    """The model's configuration; raises `CheckpointError` when no class here reads it, or none reads pictures."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{title} is of a kind this version of transformers does not know without running code from its "
            "folder, which is never done; pick another model or upgrade transformers."
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise CheckpointError(
            f"{title} ({config.model_type}) does not read pictures; pick an image-text-to-text model."
        )
    return config


def needed_bytes(folder: Path, config: PretrainedConfig, quantization: str, device: torch.device) -> int:
    """Bytes that the model in `folder` takes on `device` while it answers; its weights need not be here yet.

    Only a checkpoint that is stored quantized in a way that is not ours is judged by its files.
    """
    stored = quantize.stored_quantization(config)
    if stored not in (None, *QUANTIZATIONS):
        files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return catalog.needed(files, 0)
    model = sizes.without_memory(config, quantize.compute_dtype(device))
    held = sizes.parts(model, stored or quantization, **quantize.stored_exceptions(config))
    return catalog.needed(sum(part.bytes_held for part in held), sizes.cache_bytes(model))


def _check_memory(
    folder: Path,
    config: PretrainedConfig,
    title: str,
    quantization: str,
    device: torch.device,
    adapter_bytes: int = 0,
) -> None:
    """Raises `OutOfMemoryError` before anything is allocated."""
    need = needed_bytes(folder, config, quantization, device) + adapter_bytes
    memory.check_fits(title, need, device, memory.free_bytes(device))


def fetch(choice: ModelChoice, cache_dir: Path | None, progress: Progress) -> ResolvedModel:
    """Brings the files of `choice` to this machine; instant and offline when they are already here.

    Raises `LoadError`s for all that can be known before loading: missing or foreign files, an unreachable hub,
    no GPU, too little memory.
    """
    cache_dir = cache_dir or fetching.default_cache_dir()
    device = quantize.resolve_device(choice.device)
    progress = monotone(progress)
    progress(LoadProgress(0.0, "Looking for the model"))
    given = [_fetch_adapter(name, cache_dir, monotone(progress, 0.0, 0.05)) for name in choice.adapters]
    adapter_names = tuple(Path(name).name for name in choice.adapters)
    if len(given) > 1:
        configs = [adapters.read_config(one.folder, name) for one, name in zip(given, adapter_names, strict=True)]
        mixtures.check_arrow([one.folder for one in given], adapter_names, configs)
    entry = catalog.find(choice.model)
    title = entry.title if entry else Path(choice.model).name
    source = (entry.hub_id if entry else None) or choice.model
    if entry is not None and entry.hub_id is None:
        folder = bundled_weights.prepare(choice.quantization, cache_dir, monotone(progress, 0.05, 1.0))
        files = fetching.Files(folder, fetching.digest(folder))
        if not given:
            given = [fetching.fetch_adapter(str(bundled_weights.ADAPTER), cache_dir, progress)]
            adapter_names = (f"{entry.name} adapter",)
    elif (original := _fetch_original(source, entry, cache_dir, monotone(progress, 0.05, 1.0))) is not None:
        files = fetching.Files(original.base, fetching.digest(original.base))
        if not given:
            given = [fetching.Files(original.adapter, f"sha256:{original.adapter_sha256[:16]}")]
            adapter_names = (f"{title} experts",)
    else:
        files = fetching.fetch_descriptions(source, cache_dir, monotone(progress, 0.05, 0.1))
        _check_memory(files.folder, read_config(files.folder, title), title, choice.quantization, device)
        rest = monotone(progress, 0.1, 1.0)
        if moe_llava.is_original(files.folder):
            files = moe_llava.fetch(source, files.folder, cache_dir, title, rest)
        else:
            files = fetching.fetch_weights(source, cache_dir, rest)
    progress(LoadProgress(1.0, "All files are here"))
    return ResolvedModel(
        choice=choice,
        title=title,
        folder=files.folder,
        revision=files.revision,
        adapter_names=adapter_names,
        adapter_folders=tuple(one.folder for one in given),
        adapter_revision=", ".join(one.revision for one in given) or None,
    )


def _fetch_original(
    source: str, entry: catalog.CatalogueEntry | None, cache_dir: Path, progress: Progress
) -> awaker.Converted | None:
    """Base and adapter of an original that is one state dict, converted into the cache; None for any other model."""
    folder = fetching.local_folder(source, CheckpointError, "model")
    if folder is None and not (entry and entry.described_by):
        return None
    if folder is not None and not awaker.is_checkpoint(folder):
        return None
    described, weights_only = folder, folder is None or not (folder / "config.json").is_file()
    if weights_only:
        base = catalog.AWAKER.described_by
        described = fetching.fetch_descriptions(base, cache_dir, monotone(progress, 0.0, 0.02)).folder
    if folder is None:
        wanted = (*fetching.DESCRIPTIONS, *fetching.WEIGHTS, *fetching.PICKLED)
        folder = fetching.fetch_files(source, wanted, cache_dir, monotone(progress, 0.02, 0.5)).folder
    return awaker.prepare(folder, cache_dir, monotone(progress, 0.5, 1.0), descriptions=described)


def _experts_in_4bit(resolved: ResolvedModel, quantization: str, dtype: torch.dtype) -> bool:
    wanted = resolved.choice.expert_quantization
    if wanted != "auto" or quantization != "nf4" or len(resolved.adapter_folders) != 1:
        return wanted == "nf4"
    whole = adapters.adapter_bytes(resolved.adapter_folders[0], resolved.adapter_names[0], False, dtype)
    return whole >= LARGE_EXPERTS_BYTES


def _fetch_adapter(name: str, cache_dir: Path, progress: Progress) -> fetching.Files:
    """The files of one adapter, with those of its experts where it is an X-LoRA."""
    files = fetching.fetch_adapter(name, cache_dir, progress)
    config = adapters.read_config(files.folder, name)
    if isinstance(config, XLoraConfig):
        files = fetching.fetch_adapter(name, cache_dir, progress, with_subfolders=True)
        mixtures.xlora_experts(files.folder, name, config)
    return files


@contextmanager
def _memory_errors(title: str, device: torch.device) -> Iterator[None]:
    """Turns an allocation that failed while loading into `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(
            error
        )
        if not exhausted:
            raise
        raise OutOfMemoryError(
            f"Memory on {device.type} ran out while {title} was loading; choose a smaller model, "
            "--quantization nf4, or a larger machine."
        ) from error


def _load_base(
    resolved: ResolvedModel, device: torch.device, progress: Progress
) -> tuple[PreTrainedModel, str]:
    """The base model with quantized weights, and how they are really quantized."""
    title = resolved.title
    config = read_config(resolved.folder, title)
    dtype = quantize.compute_dtype(device)
    stored = quantize.stored_quantization(config)
    if stored in ("nf4", "fp4") and isinstance(config.quantization_config, dict):
        config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    try:
        with bars_as_progress(progress), unmapped(), _memory_errors(title, device):
            model, info = AutoModelForImageTextToText.from_pretrained(
                resolved.folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                quantization_config=None
                if stored
                else quantize.bnb_config(resolved.choice.quantization, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except LoadError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of {title} are damaged; delete them and fetch them again."
        ) from error
    except ImportError as error:
        raise CheckpointError(
            f"{title} needs a package that is missing: {' '.join(str(error).split())}"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"The weights of {title} do not fit its configuration or are incomplete; fetch or save them again."
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"The weights of {title} lack {len(missing)} tensors, the first being {missing[0]}; "
            "fetch or save them again."
        )
    if stored:
        quantize.compute_in(model, dtype)
    return model.eval(), stored or resolved.choice.quantization


def _context_length(config: PretrainedConfig, processor: ProcessorMixin) -> int:
    """Tokens the language model was made for; the tokenizer's own limit when the configuration names none."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit or processor.tokenizer.model_max_length)


def load(choice: ModelChoice, cache_dir: Path | None, progress: Progress) -> LoadedModel:
    """Loads `choice` onto its device; `progress` is called with fractions that never go back.

    Raises the `LoadError` family, one sentence each; whatever was allocated by then is given back.
    """
    progress = monotone(progress)
    resolved = fetch(choice, cache_dir, monotone(progress, 0.0, FETCH_SHARE))
    try:
        return load_resolved(resolved, monotone(progress, FETCH_SHARE, 1.0))
    except LoadError:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise


def load_resolved(resolved: ResolvedModel, progress: Progress) -> LoadedModel:
    """Puts what `fetch` found into memory."""
    device = quantize.resolve_device(resolved.choice.device)
    progress = monotone(progress)
    progress(LoadProgress(0.0, f"Opening {resolved.title}"))
    config = read_config(resolved.folder, resolved.title)
    dtype = quantize.compute_dtype(device)
    experts_in_4bit = _experts_in_4bit(resolved, resolved.choice.quantization, dtype)
    beside = 0
    for folder, name in zip(resolved.adapter_folders, resolved.adapter_names, strict=True):
        beside += adapters.adapter_bytes(folder, name, experts_in_4bit, dtype)
    _check_memory(resolved.folder, config, resolved.title, resolved.choice.quantization, device, beside)
    processor = load_processor(resolved.folder, config, resolved.title)
    model, quantization = _load_base(resolved, device, monotone(progress, 0.1, 0.9))
    adapter_title = None
    names, folders = resolved.adapter_names, resolved.adapter_folders
    if folders:
        progress(LoadProgress(0.9, f"Adding the adapter {' + '.join(names)}"))
        with _memory_errors(resolved.title, device):
            if len(folders) > 1:
                model = mixtures.attach_arrow(model, folders, names).eval()
                adapter_title = mixtures.describe_arrow(names, model)
            else:
                steady = resolved.choice.awaker_gate == "steady"
                model = adapters.attach(
                    model, folders[0], names[0], experts_in_4bit=experts_in_4bit, steady=steady
                ).eval()
                adapter_title = adapters.describe(names[0], model.active_peft_config)
    footprint = memory.measure(model)
    progress(LoadProgress(1.0, f"{resolved.title} is ready"))
    return LoadedModel(
        model=model,
        processor=processor,
        choice=resolved.choice,
        device=device,
        title=resolved.title,
        adapter_title=adapter_title,
        base_revision=resolved.revision,
        adapter_revision=resolved.adapter_revision,
        quantization=quantization,
        dtype=str(quantize.compute_dtype(device)).removeprefix("torch."),
        context_length=_context_length(model.config, processor),
        four_bit_share=footprint.four_bit_share,
        memory_bytes=footprint.memory_bytes,
        parameters=footprint.parameters,
        remark=set_noise(model, resolved.choice.moe_llava_noise),
    )
