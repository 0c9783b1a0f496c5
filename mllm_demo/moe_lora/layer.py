"""A frozen linear layer with stacked LoRA experts: two matrix products, and a gate between them.

It knows its router only as a `RouterSite` that answers with a gate; without one, its single block is an
ordinary LoRA.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import MoeLoraConfig
from .router import RouterSite

MERGE_REFUSED = (
    "MoE-LoRA cannot be merged: its routers weight the experts anew for every token or sequence, so there is "
    "no one weight to add to the base layer. Use the model with the adapter, or `unload()` it."
)


class MoeLoraLayer(nn.Module, BaseTunerLayer):
    """
    Experts on one linear layer: `nn.Linear` or a subclass (bitsandbytes' `Linear4bit`, `Linear8bitLt`).

    A mixture of LoRAs is one LoRA of rank (E+S)*r whose rank blocks are multiplied by the gate:

        lora_A [(E+S)*r, in_features],  lora_B [out_features, (E+S)*r],  the shared expert's block last.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_router")
    # PEFT looks it up in every forward; found on the class, it costs nothing.
    cast_input_dtype_enabled = True
    other_param_names = ("r", "scaling", "num_experts", "dropout_p", "router_sites")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: MoeLoraConfig, plain: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}  # routed ones; 0 in a plain module
        self.dropout_p: dict[str, float] = {}
        self.router_sites: dict[str, RouterSite] = {}
        self.lora_A = nn.ParameterDict({})
        self.lora_B = nn.ParameterDict({})
        # Holds the router of a site at one of its modules only, so that it is saved once.
        self.lora_router = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, plain)

    def update_layer(self, adapter_name: str, config: MoeLoraConfig, plain: bool) -> None:
        """Adds an adapter; the router, which may be shared, is attached by the model."""
        r = (config.plain_r or config.r) if plain else config.r
        num_blocks = 1 if plain else config.num_experts + config.use_shared_expert
        self.r[adapter_name] = r
        self.scaling[adapter_name] = config.lora_alpha / r
        self.num_experts[adapter_name] = 0 if plain else config.num_experts
        self.dropout_p[adapter_name] = config.lora_dropout
        self.lora_A[adapter_name] = nn.Parameter(torch.empty(num_blocks * r, self.in_features))
        self.lora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, num_blocks * r))
        # The bound depends on in_features alone, so the stack is initialised as each expert would be.
        nn.init.kaiming_uniform_(self.lora_A[adapter_name], a=math.sqrt(5))
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_B[adapter_name])
        else:
            nn.init.normal_(self.lora_B[adapter_name], std=0.02)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """`x`: [.., in_features]; returns [.., out_features] in the base layer's output dtype."""
        result = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result

        base_dtype = result.dtype
        for adapter_name in self.active_adapters:
            if adapter_name not in self.scaling:
                continue
            lora_A = self.lora_A[adapter_name]
            z = self._cast_input_dtype(x, lora_A.dtype)
            site = self.router_sites.get(adapter_name)
            gate = None if site is None else site.gate(z, self)  # (.., (E+S) * r)
            dropout_p = self.dropout_p[adapter_name]
            if dropout_p and self.training:
                z = F.dropout(z, dropout_p)
            middle = F.linear(z, lora_A)  # (.., (E+S) * r)
            if gate is not None:
                middle = middle * (gate if gate.dtype == middle.dtype else gate.to(middle.dtype))
            delta = F.linear(middle, self.lora_B[adapter_name])
            result = torch.add(result, delta, alpha=self.scaling[adapter_name])
        return result if result.dtype == base_dtype else result.to(base_dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
