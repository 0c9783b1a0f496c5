"""MoE-LLaVA's mixture of MLPs: router, experts, and the block that stands in a decoder layer in an MLP's place.

Experts are fused parameters behind transformers' experts interface, so that its grouped products, or whatever
else is registered there, compute them. It knows nothing of decoders or of files.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from mllm_demo.models.moe_llava.config import Mixture
from mllm_demo.models.moe_llava.gating import gate
from mllm_demo.routing.readers import RouterReader, Routing, register
from mllm_demo.routing.trace import Site

# (router, router_logits float32 [S, E]) -> what `gating.gate` takes as `draws`, or None.
Draw = Callable[["MoeLlavaRouter", torch.Tensor], torch.Tensor | None]


class RouterDecision(NamedTuple):
    """S tokens (all of a batch, in order), E experts, k choices.

    router_logits, router_probs  float32 [S, E]
    selected_experts             int64   [S, k]  before any choice is dropped
    kept                         bool    [S, k]
    gate_weights                 float32 [S, k]  the original's combine weights; 0 for a dropped choice
    routing_weights              float32 [S, k]  what the experts' outputs are multiplied by: the same, but for a
                                                 residual mixture times its coefficient
    residual_weight              float32 [S, 1]  what the dense MLP beside the experts is multiplied by, or None
    """

    router_logits: torch.Tensor
    router_probs: torch.Tensor
    selected_experts: torch.Tensor
    kept: torch.Tensor
    gate_weights: torch.Tensor
    routing_weights: torch.Tensor
    residual_weight: torch.Tensor | None


class MoeLlavaRouter(nn.Module):
    """Linear router without bias, always in float32.

    `draw`: where the randomness of the original comes from; None, the default, leaves it out (`set_draw`).
    The weights are bare parameters, so that no quantizer takes them for a linear layer.
    """

    def __init__(self, mixture: Mixture, hidden_size: int, layer_idx: int) -> None:
        super().__init__()
        self.mixture = mixture
        self.layer_idx = layer_idx
        self.num_experts = mixture.experts[layer_idx]
        self.draw: Draw | None = None
        self.weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        if mixture.use_residual:
            self.coefficient_weight = nn.Parameter(torch.empty(2, hidden_size))
            self.coefficient_bias = nn.Parameter(torch.empty(2))

    def forward(self, hidden_states: torch.Tensor) -> RouterDecision:
        """`hidden_states`: [S, hidden_size]; all S tokens share the experts' capacity."""
        mixture, hidden_states = self.mixture, hidden_states.float()
        logits = nn.functional.linear(hidden_states, self.weight.float())
        draws = self.draw(self, logits) if self.draw is not None else None
        gating = gate(logits, mixture.top_k, mixture.capacity_factor, mixture.min_capacity, draws)
        weights, residual = gating.weights, None
        if mixture.use_residual:
            shares = nn.functional.linear(hidden_states, self.coefficient_weight.float(), self.coefficient_bias.float())
            expert_share, residual = shares.softmax(dim=-1).split(1, dim=-1)
            weights = weights * expert_share
        return RouterDecision(
            logits, gating.router_probs, gating.chosen, gating.kept, gating.weights, weights, residual
        )


def original_draw(router: MoeLlavaRouter, logits: torch.Tensor) -> torch.Tensor:
    """Anew on every pass, from torch's generator: Gumbel noise for the second of two choices (DeepSpeed draws it
    in evaluation too), uniform numbers for top-1."""
    if router.mixture.top_k == 1:
        return torch.rand_like(logits)
    return -torch.empty_like(logits).exponential_().log()


def set_draw(model: nn.Module, draw: Draw | None) -> bool:
    """Gives every MoE-LLaVA router of `model` this source of randomness, None for none; False if it has no such."""
    routers = [module for module in model.modules() if isinstance(module, MoeLlavaRouter)]
    for router in routers:
        router.draw = draw
    return bool(routers)


class _Experts(nn.Module):
    """Fused experts. `hidden_states` [S, H], `top_k_index` int64 [S, k], `top_k_weights` [S, k] -> [S, H]."""

    def __init__(self, config: PretrainedConfig, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = width
        self.act_fn = ACT2FN[config.hidden_act]

    def _weighted(self, outputs: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The outputs of all experts [S, E, H], summed with the weights of the chosen ones."""
        dense = outputs.new_zeros(outputs.shape[:2]).scatter_add_(1, top_k_index, top_k_weights.to(outputs.dtype))
        return (outputs * dense[..., None]).sum(dim=1)


@use_experts_implementation
class GatedExperts(_Experts):
    """down(act(gate x) * up x), the MLP of StableLM and both Qwen; gate_up_proj [E, 2I, H], down_proj [E, H, I]."""

    def __init__(self, config: PretrainedConfig, num_experts: int, width: int) -> None:
        super().__init__(config, num_experts, width)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.hidden_dim, width))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        middle = self._apply_gate(torch.einsum("sh,eih->sei", hidden_states, self.gate_up_proj))
        outputs = torch.einsum("sei,ehi->seh", middle, self.down_proj)
        return self._weighted(outputs, top_k_index, top_k_weights)


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainExperts(_Experts):
    """down(act(up x)) with biases, the MLP of Phi; up_proj [E, I, H], down_proj [E, H, I], biases [E, I], [E, H]."""

    def __init__(self, config: PretrainedConfig, num_experts: int, width: int) -> None:
        super().__init__(config, num_experts, width)
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, self.hidden_dim))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.hidden_dim, width))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, self.hidden_dim))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        middle = self.act_fn(torch.einsum("sh,eih->sei", hidden_states, self.up_proj) + self.up_proj_bias)
        outputs = torch.einsum("sei,ehi->seh", middle, self.down_proj) + self.down_proj_bias
        return self._weighted(outputs, top_k_index, top_k_weights)


class MoeLlavaBlock(nn.Module):
    """Takes the place of `mlp`, one decoder layer's MLP: the same from [B, S, H] to [B, S, H].

    A residual mixture keeps `mlp` and adds its output, both weighted by the router's coefficient.
    """

    def __init__(self, config: PretrainedConfig, mixture: Mixture, layer_idx: int, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.router = MoeLlavaRouter(mixture, config.hidden_size, layer_idx)
        kind = GatedExperts if hasattr(mlp, "gate_proj") else PlainExperts
        self.experts = kind(config, mixture.experts[layer_idx], width)
        self.mlp = mlp if mixture.use_residual else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)  # (B * S, H)
        decision = self.router(tokens)
        weights = decision.routing_weights.to(tokens.dtype)
        output = self.experts(tokens, decision.selected_experts, weights)
        if self.mlp is not None:
            output = output + self.mlp(tokens) * decision.residual_weight.to(tokens.dtype)
        return output.view_as(hidden_states)


def put_in_place(model: nn.Module, mixture: Mixture, width: int) -> None:
    """Replaces the MLPs of the mixture's layers of a decoder; `width`: one expert's intermediate size."""
    for layer_idx in mixture.experts:
        layer = model.layers[layer_idx]
        layer.mlp = MoeLlavaBlock(model.config, mixture, layer_idx, layer.mlp, width)


def init_weights(module: nn.Module, std: float) -> bool:
    """Random weights for a router or experts; False for any other module."""
    if not isinstance(module, MoeLlavaRouter | _Experts):
        return False
    for name, parameter in module.named_parameters(recurse=False):
        init.zeros_(parameter) if name.endswith("bias") else init.normal_(parameter, std=std)
    return True


def _site(path: str, router: MoeLlavaRouter, root: nn.Module) -> Site:
    return Site(
        name=path,
        layer_idx=router.layer_idx,
        block="mlp",
        num_experts=router.num_experts,
        num_experts_per_tok=router.mixture.top_k,
        has_shared_expert=router.mixture.use_residual,
    )


def _read(module: nn.Module, args: tuple, kwargs: dict, output: RouterDecision) -> Routing:
    return Routing(output.router_probs, output.selected_experts, output.routing_weights)


register(RouterReader(MoeLlavaRouter, _site, _read))
