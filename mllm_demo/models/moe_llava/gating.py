"""MoE-LLaVA's choice of experts: top-1 or top-2 with a capacity, as array operations, without a device sync.

MoE-LLaVA (arXiv:2401.15947, section 3.3) takes the gating of DeepSpeed-MoE, which is that of GShard
(arXiv:2006.16668, algorithm 1): every expert serves at most `capacity` choices of all tokens that are routed
together; what comes later is dropped. It knows nothing of layers, experts' weights or models.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional


class Gating(NamedTuple):
    """The decision for S tokens among E experts, k choices each.

    router_probs  float32 [S, E]  softmax, always without noise
    chosen        int64   [S, k]  first and second choice, before any is dropped
    kept          bool    [S, k]  False: the expert was full
    weights       float32 [S, k]  of the kept choices, which sum to 1 for k = 2; 0 for a dropped one
    capacity      choices that one expert may serve
    """

    router_probs: torch.Tensor
    chosen: torch.Tensor
    kept: torch.Tensor
    weights: torch.Tensor
    capacity: int


def capacity_of(tokens: int, experts: int, k: int, factor: float, minimum: int) -> int:
    """Choices that one expert may serve; not bounded by `tokens`. Single precision, as the original computes it."""
    exact = np.float32(tokens / experts) * np.float32(factor * k)
    return max(int(np.ceil(exact)), minimum)


def gate(
    logits: torch.Tensor, k: int, capacity_factor: float, min_capacity: int, draws: torch.Tensor | None = None
) -> Gating:
    """`logits`: float32 [S, E], all tokens of a batch, padding included.

    `draws`: what the original draws anew on every pass, float32 [S, E], or None for none of it. For k = 2 Gumbel
    noise, which moves the second choice but no weight; for k = 1 uniform numbers, which say whose choice is kept
    when an expert overflows (without them the first in the sequence).
    """
    tokens, experts = logits.shape
    capacity = capacity_of(tokens, experts, k, capacity_factor, min_capacity)
    probs = torch.softmax(logits, dim=-1)
    first = probs.argmax(dim=-1)
    taken = functional.one_hot(first, experts)  # (S, E)
    if k == 1:
        kept = _within(taken, capacity, draws).gather(1, first[:, None])
        weights = probs.gather(1, first[:, None]) * kept
        return Gating(probs, first[:, None], kept, weights, capacity)
    noisy = logits if draws is None else logits + draws
    second = noisy.masked_fill(taken.bool(), float("-inf")).argmax(dim=-1)
    chosen = torch.stack((first, second), dim=1)  # (S, 2)
    # All first choices queue before any second one.
    queue = torch.cat((taken, functional.one_hot(second, experts)))  # (2S, E)
    places = (queue.cumsum(0) - 1).gather(1, torch.cat((first, second))[:, None])
    kept = (places < capacity).reshape(2, tokens).T
    weights = probs.gather(1, chosen) * kept
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
    return Gating(probs, chosen, kept, weights, capacity)


def _within(taken: torch.Tensor, capacity: int, draws: torch.Tensor | None) -> torch.Tensor:
    """bool [S, E]: the choices `taken` (one-hot [S, E]) that fit, by largest draw or in the tokens' order."""
    if draws is None:
        return (taken.cumsum(0) <= capacity) & taken.bool()
    winners = (taken * draws).topk(min(capacity, taken.shape[0]), dim=0).indices
    return torch.zeros_like(taken, dtype=torch.bool).scatter_(0, winners, True) & taken.bool()
