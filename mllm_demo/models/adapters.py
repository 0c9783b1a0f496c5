"""Puts a PEFT adapter, plain LoRA, X-LoRA or our MoE-LoRA, on a loaded model and checks that every tensor arrived.

It knows nothing of hubs or devices. Importing `mllm_demo.moe_lora` registers our method with PEFT.
"""

import math
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, XLoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from mllm_demo.errors import AdapterError
from mllm_demo.models.catalog import NF4_BYTES_PER_WEIGHT
from mllm_demo.models.fetching import ADAPTER_WEIGHTS
from mllm_demo.models.mixtures import attach_xlora
from mllm_demo.moe_lora import MoeLoraConfig

# PEFT asks transformers for an attribute under its old name; nothing that a user could act on.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def adapter_bytes(folder: Path, name: str, experts_in_4bit: bool, dtype: torch.dtype) -> int:
    """Bytes that a MoE-LoRA in `folder` takes in a model of `dtype`, from its shapes alone; 0 for other adapters."""
    config = read_config(folder, name)
    if not isinstance(config, MoeLoraConfig):
        return 0
    blocks = (config.num_experts + config.use_shared_expert) * config.r
    total = 0
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        for key in weights.keys():
            shape = weights.get_slice(key).get_shape()
            stacked = len(shape) == 2 and blocks == shape[0 if key.endswith("lora_A") else 1]
            whole = dtype.itemsize if config.adapter_dtype == "model" else 4
            total += round(math.prod(shape) * ((NF4_BYTES_PER_WEIGHT if experts_in_4bit else whole) if stacked else 4))
    return total


def describe(name: str, config: PeftConfig) -> str:
    """One line for the page, from the adapter's own configuration."""
    if isinstance(config, XLoraConfig):
        number = config.top_k_lora or len(config.adapters)
        return f"{name} (X-LoRA, {len(config.adapters)} LoRA experts, top-{number})"
    if isinstance(config, MoeLoraConfig):
        return (
            f"{name} (MoE-LoRA, {config.num_experts} experts, top-{config.num_experts_per_tok}, r={config.r})"
        )
    kind = str(getattr(config.peft_type, "value", config.peft_type)).replace("LORA", "LoRA")
    rank = getattr(config, "r", None)
    return f"{name} ({kind}, r={rank})" if rank else f"{name} ({kind})"


def read_config(folder: Path, name: str) -> PeftConfig:
    """The adapter's configuration; raises `AdapterError` when PEFT does not know its method."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"The configuration of adapter {name} cannot be read; it may be damaged or made by a newer PEFT."
        ) from error


def attach(
    model: PreTrainedModel, folder: Path, name: str, *, experts_in_4bit: bool = False, steady: bool = False
) -> PeftModel:
    """Returns `model` with the adapter in `folder` active and frozen.

    Of a MoE-LoRA, `experts_in_4bit` packs the experts as NF4, one by one as they are read; `steady` keeps the
    prompt's choice while decoding where the adapter would make a second one.

    Raises `AdapterError` when the file is damaged, a target module or shape does not fit, or any of the
    adapter's tensors found no place or was not in the file.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            stored = set(weights.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{ADAPTER_WEIGHTS} of {name} is damaged; fetch or save the adapter again."
        ) from error
    config = read_config(folder, name)
    if isinstance(config, XLoraConfig):
        return attach_xlora(model, folder, name, config)
    options = {"torch_device": str(model.device)}
    if isinstance(config, MoeLoraConfig):
        config.experts_in_4bit = experts_in_4bit
        config.decode_choice = "kept" if steady else config.decode_choice
        if experts_in_4bit or config.adapter_dtype == "model":
            # Weights stay in the mapped file until each one is moved to its place.
            options = {"torch_device": "cpu", "low_cpu_mem_usage": True}
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=False, **options)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"Adapter {name} does not fit this base model: {_first_line(error)}; load the base it was trained on."
        ) from error
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for keys, complaint in ((expected - stored, "lacks"), (stored - expected, "has no place for")):
        if keys:
            subject = f"Adapter {name}" if complaint == "lacks" else f"The base model under adapter {name}"
            raise AdapterError(
                f"{subject} {complaint} {len(keys)} of {len(expected | stored)} tensors, the first being "
                f"{min(keys)}; load the base it was trained on."
            )
    return adapted


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch lists size mismatches below a headline that names none.
    detail = next(
        (line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__
    )
    return detail[:200].rstrip(".;:")
