"""LoRA adapters for the tiny checkpoint that mix, and an X-LoRA over them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModelForCausalLM, XLoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

TARGETS = r".*language_model.*\.(q_proj|down_proj)"
CLASSIFIER = "base_model.internal_xlora_classifier."


def save_lora(checkpoint: Path, folder: Path, seed: int, **changes) -> Path:
    """A plain LoRA with random weights large enough to change answers."""
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    get_peft_model(base, LoraConfig(**options)).save_pretrained(folder)
    return folder


def save_xlora(checkpoint: Path, folder: Path, experts: Sequence[Path], seed: int = 0, **changes) -> Path:
    """An X-LoRA in the layout of PEFT: experts in subfolders 0, 1, ..., the classifier beside the configuration."""
    torch.manual_seed(seed)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    base.config.use_cache = False
    adapters = {str(index): str(path) for index, path in enumerate(experts)}
    options = {"hidden_size": 128, "xlora_depth": 1, "task_type": "CAUSAL_LM", **changes}
    model = PeftModelForCausalLM(base, XLoraConfig(adapters=adapters, **options))
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        torch.nn.init.normal_(parameter)
    # PEFT 0.21 itself saves neither: it takes the "0" of "layers.0" for the name of an expert.
    model.peft_config["default"].save_pretrained(folder)
    for index, path in enumerate(experts):
        shutil.copytree(path, folder / str(index))
    state = model.base_model.internal_xlora_classifier.state_dict()
    save_file({f"{CLASSIFIER}{key}": value for key, value in state.items()}, folder / "adapter_model.safetensors")
    return folder


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))
