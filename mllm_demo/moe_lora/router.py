"""The router of MoE-LoRA: which experts serve a token, and with which weight.

`MoeLoraRouter` maps its input to a `RouterOutput`; `RouterSite` lets the modules that share a router run it
once per forward. Neither knows how experts are applied, or what the model around them is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .config import MoeLoraConfig
from .state import IMAGE_MODALITY, RoutingState, masked_mean

_NORM_EPS = 1e-12
_WEIGHTED_NORM_EPS = 1e-6


class RouterOutput(NamedTuple):
    """
    One router's decision. E routed experts, k of them chosen, S = 1 with a shared expert and else 0. The
    leading dimensions are the layer input's, [batch, tokens], or [batch, 1] where a sequence has one choice.

    router_logits     [.., E]    float32, what the softmax is taken of (after temperature and noise)
    router_probs      [.., E]    float32, softmax before top-k
    selected_experts  [.., k]    int64, the most probable first
    routing_weights   [.., k]    float32, what the chosen experts' outputs are multiplied by
    gate              [.., E+S]  float32, the same weights dense, 0 where not chosen; the shared one is last
    """

    router_logits: torch.Tensor
    router_probs: torch.Tensor
    selected_experts: torch.Tensor
    routing_weights: torch.Tensor
    gate: torch.Tensor


class MoeLoraRouter(nn.Module):
    """
    g = topk( softmax( (W_g * norm(z)) / temperature + noise ) ), computed in float32 unless the configuration
    says otherwise: logits in the model's dtype, softmax and top-k in float16.

    `forward` is called exactly once per site and model forward, and a forward hook that returns another
    `RouterOutput` replaces the decision (build one with `build_output`).

    Attributes (plain values that describe the site):
        site_name (`str`): Module path of what the router serves, from the base model's root.
        layer_idx (`int`): Index in the stack of layers; -1 outside any stack.
        block (`str`): "attention", "mlp", "vision", "connector", "layer" or "model".
        num_experts, num_experts_per_tok (`int`), has_shared_expert (`bool`), adapter_name (`str`).
        granularity (`str`): "token", "sequence" or "modality", as choices really differ.
    """

    def __init__(
        self,
        config: MoeLoraConfig,
        in_features: int,
        *,
        site_name: str = "",
        layer_idx: int = -1,
        block: str = "mlp",
        adapter_name: str = "default",
    ) -> None:
        super().__init__()
        self.site_name = site_name
        self.layer_idx = layer_idx
        self.block = block
        self.adapter_name = adapter_name
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.granularity = config.effective_granularity
        self.has_shared_expert = config.use_shared_expert
        self.router_input = config.router_input
        self.decode_choice = config.decode_choice
        self.in_features = in_features
        self.kept_dtype = torch.float32
        self.complement = config.use_shared_expert and config.shared_expert_weighting == "complement"
        self.norm_topk_prob = config.norm_topk_prob
        self.noise_std = config.router_noise_std
        self.temperature = config.router_temperature
        self.rms_norm = config.router_norm == "rms"
        self.softmax_dtype = getattr(torch, config.router_softmax_dtype)
        by_modality = self.granularity == "modality"
        shape = (config.num_modalities, self.num_experts) if by_modality else (self.num_experts, in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.bias = (
            nn.Parameter(torch.zeros(self.num_experts, dtype=torch.float32)) if config.router_bias else None
        )
        weighted = config.router_norm == "rms_weighted"
        self.norm_weight = nn.Parameter(torch.ones(in_features, dtype=torch.float32)) if weighted else None
        nn.init.normal_(self.weight, std=0.02)
        # A gate before any choice: 0 for routed experts, 1 for a shared one of constant weight. Not saved,
        # so never on the meta device.
        gate = torch.zeros(self.num_experts, device="cpu")
        if self.has_shared_expert and not self.complement:
            gate = torch.cat((gate, torch.ones(1, device="cpu")))
        self.register_buffer("empty_gate", gate, persistent=False)

    def forward(self, z: torch.Tensor) -> RouterOutput:
        """`z`: [.., in_features], or with granularity "modality" the ids, int64 [..]."""
        if torch.is_autocast_enabled(z.device.type):
            with torch.autocast(z.device.type, enabled=False):
                return self.decide(self._logits(z))
        return self.decide(self._logits(z))

    def _logits(self, z: torch.Tensor) -> torch.Tensor:
        if self.granularity == "modality":
            logits = F.embedding(z, self.weight.float())
        elif self.norm_weight is not None:
            logits = self._weighted_norm_logits(z)
        else:
            z = z.float()
            logits = F.linear(z, self.weight.float())
            if self.rms_norm:
                # The norm is one number per token: dividing the E logits is dividing the input, only cheaper.
                norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
                logits = logits * math.sqrt(self.in_features) / norm.clamp_min(_NORM_EPS)
            if self.bias is not None:
                logits = logits + self.bias.float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.training and self.noise_std > 0.0:
            logits = logits + torch.randn_like(logits) * self.noise_std
        return logits

    def decide(self, logits: torch.Tensor) -> RouterOutput:
        """The decision for logits [.., E]; an expert whose logit is -inf cannot be chosen while others can."""
        probs = torch.softmax(logits.to(self.softmax_dtype), dim=-1)
        # Half precision makes ties, which `topk` must break as it does for any k.
        if self.num_experts_per_tok == 1 and self.softmax_dtype == torch.float32:
            weights, selected = probs.max(dim=-1, keepdim=True)
        else:
            weights, selected = probs.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.build_output(logits.float(), probs.float(), selected, weights.float())

    def _weighted_norm_logits(self, z: torch.Tensor) -> torch.Tensor:
        """RMSNorm as a decoder's own: statistics in float32, weight and product in the dtype they are kept in."""
        normed = z.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(dim=-1, keepdim=True) + _WEIGHTED_NORM_EPS)
        normed = self.norm_weight * normed.to(z.dtype)
        return F.linear(normed.to(self.weight.dtype), self.weight, self.bias)

    def build_output(
        self,
        router_logits: torch.Tensor,
        router_probs: torch.Tensor,
        selected_experts: torch.Tensor,
        weights: torch.Tensor,
    ) -> RouterOutput:
        """The decision for `selected_experts` [.., k] with `weights` [.., k], the shared expert's added."""
        empty_gate = self.empty_gate.float().expand(*weights.shape[:-1], -1)
        if self.complement:
            top = weights.max(dim=-1, keepdim=True).values
            weights = weights * top
            rest = (1.0 - top.to(self.softmax_dtype)).to(top.dtype)
            gate = torch.cat((empty_gate.scatter(-1, selected_experts, weights), rest), dim=-1)
        else:
            gate = empty_gate.scatter(-1, selected_experts, weights)
        return RouterOutput(router_logits, router_probs, selected_experts, weights, gate)

    def extra_repr(self) -> str:
        return (
            f"site_name={self.site_name!r}, in_features={self.in_features}, num_experts={self.num_experts}, "
            f"num_experts_per_tok={self.num_experts_per_tok}, granularity={self.granularity!r}"
        )


class RouterSite:
    """
    The modules that share one router. The member that runs first computes the decision, the others reuse it;
    when the first runs again (gradient checkpointing recomputes a layer in backward), it decides again.
    """

    def __init__(self, router: MoeLoraRouter, r: int, state: RoutingState, in_decoder: bool) -> None:
        self.router = router
        self.r = r
        self.state = state
        self.in_decoder = in_decoder
        self.leader: Any = None
        self.decision: RouterOutput | None = None
        self.rank_gate: torch.Tensor | None = None
        self.kept_input: torch.Tensor | None = None
        self.recorded: tuple[RouterOutput, torch.Tensor | None] | None = None

    def begin_forward(self) -> None:
        """Forgets the last forward's decision, and at a prefill also what was kept for decode steps."""
        self.end_forward()
        self.recorded = None
        if self.state.is_prefill:
            self.kept_input = None

    def end_forward(self) -> None:
        self.leader = None
        self.decision = None
        self.rank_gate = None

    def decide(self, x: torch.Tensor, member: object) -> None:
        """Makes the decision for `member`, whose input is `x` [.., in_features], or keeps another member's."""
        if self.leader is None or self.leader is member:
            self.decision = self.router(self._router_input(x))
            self.leader = member
            self.rank_gate = None
            if self.state.in_forward and self.router.training and torch.is_grad_enabled():
                self.recorded = (self.decision, self._token_mask(self.decision.router_probs.shape[:-1]))

    def chosen(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where each sequence of `x` [batch, T, n] has one choice, its experts and their weights.

        int64 and float32 [batch, k+S], the shared expert last; None where tokens choose for themselves.
        """
        gate, blocks = self.decision.gate, self.decision.selected_experts
        if self.router.granularity != "sequence" or x.dim() != 3 or gate.shape[:-1] != (x.shape[0], 1):
            return None
        gate, blocks = gate[:, 0].to(x.device), blocks[:, 0].to(x.device)
        if self.router.has_shared_expert:
            blocks = torch.cat((blocks, torch.full_like(blocks[:, :1], self.router.num_experts)), dim=-1)
        return blocks, gate.gather(-1, blocks)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """What a member multiplies its ranks by, for its input `x` [.., in_features]: [.., (E+S)*r]."""
        if self.rank_gate is None:
            # Once for all members: each weight repeated over its expert's r ranks.
            gate = self.decision.gate
            self.rank_gate = gate.unsqueeze(-1).expand(*gate.shape, self.r).flatten(-2)
        gate = self.rank_gate
        if gate.device != x.device:
            gate = gate.to(x.device)
        return gate if gate.dim() == x.dim() else _fit(gate, x)

    def aux_loss(self) -> torch.Tensor | None:
        """The balance loss of the Switch Transformer (eq. 4) for the recorded forward, which it frees."""
        if self.recorded is None:
            return None
        (_, probs, selected, _, _), mask = self.recorded
        self.recorded = None
        num_experts = probs.shape[-1]
        probs = probs.reshape(-1, num_experts)  # (N, E)
        chosen = torch.zeros_like(probs).scatter(-1, selected.reshape(-1, selected.shape[-1]), 1.0)
        chosen = chosen / selected.shape[-1]  # each token counts once, however many experts serve it
        if mask is None:
            return num_experts * (chosen.mean(dim=0) * probs.mean(dim=0)).sum()
        mask = mask.reshape(-1, 1).to(probs)
        count = mask.sum().clamp_min(1.0)
        return num_experts * ((chosen * mask).sum(dim=0) * (probs * mask).sum(dim=0)).sum() / count**2

    def _router_input(self, x: torch.Tensor) -> torch.Tensor:
        granularity = self.router.granularity
        if granularity == "modality":
            return self._modality_ids(x)
        if self.router.router_input == "prompt_mean":
            mean = self.state.mean_for(self.router.decode_choice)
            if mean is None:
                raise RuntimeError(self._missing(self.state.why_no_mean))
            return mean
        if granularity == "sequence" and not self.state.is_prefill and self.in_decoder:
            if self.kept_input is None:
                raise RuntimeError(self._missing("a decode step came before any prefill"))
            return self.kept_input
        if x.shape[-1] != self.router.in_features:
            raise RuntimeError(
                self._missing(
                    f"expected {self.router.in_features} input features in the first module to run, "
                    f"got {x.shape[-1]}; a module ran before the one whose input the router reads"
                )
            )
        if granularity == "token":
            return x
        pooled = masked_mean(x, self._prompt_mask(x))
        self.kept_input = pooled.detach()
        return pooled

    def _modality_ids(self, x: torch.Tensor) -> torch.Tensor:
        if not self.in_decoder:
            return torch.full(x.shape[:-1], IMAGE_MODALITY, dtype=torch.long, device=x.device)
        ids = self.state.modality_ids
        if ids is None:
            raise RuntimeError(
                self._missing("the tokens' modality is unknown; pass modality_ids to routing_context")
            )
        return ids.to(x.device)

    def _prompt_mask(self, x: torch.Tensor) -> torch.Tensor | None:
        if not self.in_decoder:
            return None
        if x.dim() != 3:
            raise RuntimeError(self._missing(f"expected an input [batch, tokens, n], got {tuple(x.shape)}"))
        mask = self.state.prompt_mask if self.state.prompt_mask is not None else self.state.attention_mask
        if mask is not None and mask.shape != x.shape[:-1]:
            raise RuntimeError(
                self._missing(f"expected a mask of shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
            )
        return mask

    def _token_mask(self, shape: torch.Size) -> torch.Tensor | None:
        mask = self.state.attention_mask
        if mask is None or not self.in_decoder or mask.numel() != math.prod(shape):
            return None
        return mask

    def _missing(self, what: str) -> str:
        return f"The router of {self.router.site_name!r} (adapter {self.router.adapter_name!r}): {what}."


def _fit(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshapes a gate made for [batch, T] to an input whose tokens are flattened, or the other way round."""
    tokens = x.shape[:-1]
    if gate.dim() == 3 and gate.shape[1] == 1 and tokens.numel() != gate.shape[0]:
        gate = gate.expand(-1, tokens.numel() // gate.shape[0], -1)  # one choice per sequence
    return gate.reshape(*tokens, -1)
