"""Quantizes fused experts while a checkpoint loads: transformers' 4-bit quantizer of bitsandbytes, and experts too.

Importing it registers the method `METHOD` with transformers, so such a model can be saved and loaded again, and the
experts of `models.experts` with its experts interface. Fused experts are known by what transformers' decorator says
of a module (`is_transposed`, `has_gate`, `has_bias`) or by a class listed here, never by their names. It knows
nothing of what a person chose.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from mllm_demo.models.experts import IMPLEMENTATION, ExpertWeights4bit
from mllm_demo.routing.families import router_modules

METHOD = "bitsandbytes_4bit_experts"
# Outputs that bitsandbytes' packed CPU kernel takes at a time.
_CPU_BLOCK = 32
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@register_quantization_config(METHOD)
class ExpertsBitsAndBytesConfig(BitsAndBytesConfig):
    """`BitsAndBytesConfig` in 4 bit that means fused experts as well; double quantization always."""

    def __init__(self, **settings) -> None:
        super().__init__(**{**settings, "load_in_4bit": True, "bnb_4bit_use_double_quant": True})
        self.quant_method = METHOD

    def to_dict(self) -> dict:
        # transformers takes everything that says load_in_4bit for its own method.
        flags = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
        return {name: value for name, value in super().to_dict().items() if name not in flags}

    def of_linear_layers(self) -> BitsAndBytesConfig:
        """The same without experts, as any program reads it."""
        return BitsAndBytesConfig(**self.to_dict(), load_in_4bit=True)


@dataclass(frozen=True)
class FusedWeights:
    """A parameter that holds one projection of all experts: `module`.`name`, [experts, out, in] or transposed."""

    module: nn.Module
    name: str
    is_transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, output features, input features."""
        experts, *sides = getattr(self.module, self.name).shape
        return (experts, *reversed(sides)) if self.is_transposed else (experts, *sides)

    def replace(self, weights: ExpertWeights4bit) -> None:
        self.module._parameters.pop(self.name, None)
        self.module.add_module(self.name, weights)


class Llama4Experts4bit(Llama4TextExperts):
    """Llama 4's experts, which get every token, zero where an expert was not selected, and give zero for it then.

    Rows of zeros are left out. `hidden_states` [experts * tokens, hidden], sorted by expert; the same comes back.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        selected = hidden_states.any(dim=-1)
        counts = selected.view(self.num_experts, -1).sum(dim=1).tolist()
        outputs = torch.zeros_like(hidden_states)
        if sum(counts):
            gate, up = self.gate_up_proj.grouped(hidden_states[selected], counts).chunk(2, dim=-1)
            outputs[selected] = self.down_proj.grouped(up * self.act_fn(gate), counts)
        return outputs


# Fused experts that transformers has not put behind its experts interface: their class with weights in 4 bit.
OUTSIDE_THE_INTERFACE = ((Llama4TextExperts, Llama4Experts4bit),)


def _outside(module: nn.Module) -> type[nn.Module] | None:
    return next((ours for theirs, ours in OUTSIDE_THE_INTERFACE if isinstance(module, theirs)), None)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds fused experts that can be in 4 bit."""
    return (hasattr(module, "is_transposed") and hasattr(module, "has_gate")) or _outside(module) is not None


def fused_weights(model: nn.Module, kept: list[str]) -> Iterator[tuple[str, FusedWeights]]:
    """Every parameter of fused experts outside the modules `kept`, by its full name."""
    for path, module in model.named_modules():
        if not is_experts(module) or not should_convert_module(path, kept):
            continue
        is_transposed = True if _outside(module) else module.is_transposed
        for name in PROJECTIONS:
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.ndim == 3 and parameter.shape[1 if is_transposed else 2] % 2 == 0:
                yield f"{path}.{name}" if path else name, FusedWeights(module, name, is_transposed)


def kept_precise(model: PreTrainedModel) -> list[str]:
    """Paths of linear layers that 4 bit would break or whose rounding is felt out of proportion to their size.

    Routers, which decide rather than compute; layers of fewer outputs than a block of bitsandbytes' CPU kernel, such
    as the gate of a shared expert; and layers that read pixels, since several classes cast pixels to the dtype of
    that layer's weight, which in 4 bit is a byte.
    """
    # A class that declares a whole block as its router has experts in it, which are to be in 4 bit.
    routers = {path for path, router in router_modules(model) if not any(map(is_experts, router.modules()))}
    pixels = _pixels_of_a_patch(model.config)
    kept = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            in_router = any(f"{path}.".startswith(f"{router}.") for router in routers)
            if in_router or module.out_features % _CPU_BLOCK or module.in_features in pixels:
                kept.append(path)
    return kept


def _pixels_of_a_patch(config) -> set[int]:
    """How many numbers a patch of a picture or of a pair of video frames is, by the vision configuration."""
    vision = getattr(config, "vision_config", None)
    sides = getattr(vision, "patch_size", None)
    if sides is None:
        return set()
    sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
    channels = next((n for name in ("in_channels", "num_channels") if (n := getattr(vision, name, None))), 3)
    frames = getattr(vision, "temporal_patch_size", None) or 1
    patch = channels * sides[-1] * sides[-2]
    return {patch, patch * frames} if isinstance(frames, int) else {patch}


def compute_in_four_bit(module: nn.Module) -> None:
    """Makes an experts module compute with `ExpertWeights4bit` in the place of its parameters."""
    if ours := _outside(module):
        module.__class__ = ours
    else:
        module.config._experts_implementation = IMPLEMENTATION


class _Quantize(ConversionOps):
    """The last step of loading a tensor: linear layers as transformers does them, fused experts as we do."""

    def __init__(self, quantizer: "ExpertsBnb4BitHfQuantizer") -> None:
        self._quantizer = quantizer
        self._linear = Bnb4bitQuantize(quantizer)

    def convert(self, input_dict, model=None, missing_keys=None, **given):
        kept = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            fused = self._quantizer.fused.get(name)
            if fused is not None:
                quant_type = self._quantizer.quantization_config.bnb_4bit_quant_type
                fused.replace(ExpertWeights4bit.quantize(value, quant_type, is_transposed=fused.is_transposed))
                missing_keys.discard(name)
            elif self._quantizer.param_needs_quantization(model, name):
                kept.update(self._linear.convert({name: value}, model=model, missing_keys=missing_keys, **given))
            else:
                kept[name] = value
        return kept


@register_quantizer(METHOD)
class ExpertsBnb4BitHfQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer of linear layers, with fused experts in 4 bit as well."""

    quantization_config: ExpertsBitsAndBytesConfig
    fused: dict[str, FusedWeights]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **given) -> bool:
        return param_name in self.fused or super().param_needs_quantization(model, param_name, **given)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    @staticmethod
    def get_modules_to_not_convert(model: PreTrainedModel, *given, **more) -> list[str]:
        found = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *given, **more)
        return [*found, *(path for path in kept_precise(model) if path not in found)]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map=None, **given) -> None:
        super()._process_model_before_weight_loading(model, device_map, **given)
        self.fused = dict(fused_weights(model, self.modules_to_not_convert))
        for weights in self.fused.values():
            compute_in_four_bit(weights.module)
            if self.pre_quantized:
                with torch.device("meta"):
                    weights.replace(ExpertWeights4bit(*weights.shape, self.quantization_config.bnb_4bit_quant_type))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **given) -> PreTrainedModel:
        if not self.fused:
            model.config.quantization_config = self.quantization_config.of_linear_layers()
        # Saving would take the checkpoint's way back, which splits experts in 16 bit.
        model._weight_conversions = self._without_experts(model._weight_conversions)
        return super()._process_model_after_weight_loading(model, **given)

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        steps = super().update_weight_conversions(weight_conversions, model)
        return self._without_experts(steps) if self.pre_quantized else steps

    def _without_experts(self, steps: list) -> list:
        """`steps` of loading without those that make fused experts, which are made already."""
        projections = {name.rpartition(".")[2] for name in self.fused}

        def makes_experts(step: object) -> bool:
            targets = step.target_patterns if isinstance(step, WeightConverter) else ()
            return any(target.rstrip("$").rpartition(".")[2] in projections for target in targets)

        return [step for step in steps if not makes_experts(step)]
