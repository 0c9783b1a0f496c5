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
from .four_bit import is_four_bit, linear, pack
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
    other_param_names = ("r", "scaling", "num_experts", "dropout_p", "kept_dtype", "packed", "router_sites")

    def __init__(
        self,
        base_layer: nn.Linear,
        adapter_name: str,
        config: MoeLoraConfig,
        plain: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}  # routed ones; 0 in a plain module
        self.dropout_p: dict[str, float] = {}
        self.kept_dtype: dict[str, torch.dtype | None] = {}  # None: as PEFT keeps adapters
        self.packed: dict[str, bool] = {}  # whether real weights are to be held in 4 bit
        self.router_sites: dict[str, RouterSite] = {}
        self.lora_A = nn.ParameterDict({})
        self.lora_B = nn.ParameterDict({})
        # Holds the router of a site at one of its modules only, so that it is saved once.
        self.lora_router = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, plain, dtype)

    def update_layer(
        self, adapter_name: str, config: MoeLoraConfig, plain: bool, dtype: torch.dtype | None = None
    ) -> None:
        """Adds an adapter kept in `dtype`; the router, which may be shared, is attached by the model."""
        r = (config.plain_r or config.r) if plain else config.r
        num_blocks = 1 if plain else config.num_experts + config.use_shared_expert
        self.r[adapter_name] = r
        self.scaling[adapter_name] = config.lora_alpha / r
        self.num_experts[adapter_name] = 0 if plain else config.num_experts
        self.dropout_p[adapter_name] = config.lora_dropout
        self.kept_dtype[adapter_name] = dtype
        self.packed[adapter_name] = config.experts_in_4bit and not plain
        # Weights that will be packed exist only once they are loaded.
        kind = {"dtype": dtype, "device": "meta" if self.packed[adapter_name] else None}
        self.lora_A[adapter_name] = nn.Parameter(torch.empty(num_blocks * r, self.in_features, **kind))
        self.lora_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, num_blocks * r, **kind))
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
            lora_A, lora_B = self.lora_A[adapter_name], self.lora_B[adapter_name]
            z = self._cast_input_dtype(x, self.compute_dtype(adapter_name))
            site = self.router_sites.get(adapter_name)
            chosen = gate = None
            if site is not None:
                site.decide(z, self)
                chosen = None if is_four_bit(lora_A) else site.chosen(z)
                gate = site.gate(z) if chosen is None else None  # (.., (E+S) * r)
            dropout_p = self.dropout_p[adapter_name]
            if dropout_p and self.training:
                z = F.dropout(z, dropout_p)
            if chosen is not None:
                result = result + self._of_sequences(z, adapter_name, *chosen)
                continue
            middle = linear(z, lora_A)  # (.., (E+S) * r)
            if gate is not None:
                middle = middle * (gate if gate.dtype == middle.dtype else gate.to(middle.dtype))
            delta = linear(middle, lora_B)
            result = torch.add(result, delta, alpha=self.scaling[adapter_name])
        return result if result.dtype == base_dtype else result.to(base_dtype)

    def _of_sequences(
        self, z: torch.Tensor, adapter_name: str, blocks: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What the experts of whole sequences add, each multiplied apart and summed in float32.

        `z` [batch, T, in]; `blocks` and `weights` [batch, n], n = k+S; returns float32 [batch, T, out]. Taking the
        blocks by index needs no answer from the device, and the other experts are not computed.
        """
        r = self.r[adapter_name]
        lora_A = self.lora_A[adapter_name].unflatten(0, (-1, r))[blocks]  # (batch, n, r, in)
        lora_B = self.lora_B[adapter_name].unflatten(1, (-1, r))[:, blocks]  # (out, batch, n, r)
        middle = torch.matmul(z, lora_A.flatten(1, 2).transpose(1, 2))  # (batch, T, n * r)
        middle = middle.unflatten(-1, (-1, r)).transpose(1, 2)  # (batch, n, T, r)
        outputs = torch.matmul(middle, lora_B.permute(1, 2, 3, 0)) * self.scaling[adapter_name]  # (batch, n, T, out)
        return (outputs * weights[:, :, None, None]).sum(dim=1)

    def compute_dtype(self, adapter_name: str) -> torch.dtype:
        """What the adapter multiplies in: the dtype of its weights, or the one 4-bit weights unpack to."""
        weight = self.lora_A[adapter_name]
        return weight.quant_state.dtype if is_four_bit(weight) else weight.dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        dtype = self.kept_dtype.get(adapter_name)
        if dtype is None:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        device = device or self.get_base_layer().weight.device
        for held in (self.lora_A, self.lora_B):
            weight = held[adapter_name]
            if weight.is_meta or is_four_bit(weight):
                continue
            if self.packed[adapter_name]:
                held[adapter_name] = pack(weight, dtype, device)
            else:
                moved = weight.detach().to(device, dtype)
                held[adapter_name] = nn.Parameter(moved, requires_grad=weight.requires_grad)
        router = self.lora_router[adapter_name] if adapter_name in self.lora_router else None
        if router is not None and not router.weight.is_meta:
            router.to(device, router.kept_dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
