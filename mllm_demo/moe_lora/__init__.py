"""MoE-LoRA as a PEFT method: import this package, then use `get_peft_model` and `PeftModel` as ever."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import MoeLoraConfig, MoeLoraType
from .layer import MoeLoraLayer
from .model import MoeLoraModel
from .router import MoeLoraRouter, RouterOutput

__all__ = ["MoeLoraConfig", "MoeLoraLayer", "MoeLoraModel", "MoeLoraRouter", "RouterOutput"]

# `register_peft_method` takes only names of the `PeftType` enum; the mappings compare keys as strings.
PEFT_TYPE_TO_CONFIG_MAPPING[MoeLoraType.MOE_LORA] = MoeLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[MoeLoraType.MOE_LORA] = MoeLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[MoeLoraType.MOE_LORA] = MoeLoraModel.prefix
