"""Causal attention that learns fast on a CPU: pieces of the queries, each against the keys up to its end.

Plain attention writes every score of a layer to memory several times over, and half of them only to mask them; the
fused one of torch takes four times its forward's time backwards. Here a piece's scores stay in the cache, backward
takes the probabilities that forward kept, and what lies right of the last query of a piece is never computed.
It knows no mask but the causal one, so batches must be padded on the right, where no answer looks.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "causal_pieces"  # for `set_attn_implementation`
PIECE = 64  # queries


def _pieces(length: int) -> list[tuple[int, int]]:
    """(start, end) of every piece."""
    return [*pairwise([*range(0, length, PIECE), length])]


def _kept(rows: int, length: int) -> int:
    """How many probabilities forward keeps; `rows`: batch times query heads. Whole pieces, so that a compiler, too, can
    tell the number from a length it does not know yet."""
    pieces = (length + PIECE - 1) // PIECE
    return rows * PIECE * PIECE * pieces * (pieces + 1) // 2


def _part(kept: torch.Tensor, rows: int, groups: int, start: int, end: int) -> torch.Tensor:
    """A piece's probabilities in `kept` [`_kept`]: `[rows / groups, groups * queries, keys]`."""
    shape = (rows // groups, groups * (end - start), end)
    return kept[_kept(rows, start) :][: math.prod(shape)].view(shape)


@torch.library.custom_op("mllm_demo::causal_attention", mutates_args=())
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query [B, H, T, D]`, `key`, `value` `[B, K, T, D]` → output as `query`, and the probabilities, flat."""
    batch, heads, length, width = query.shape
    rows, held = batch * heads, batch * key.shape[1]
    groups = rows // held
    query = (query * scaling).reshape(held, groups, length, width)
    key, value = key.reshape(held, length, width), value.reshape(held, length, width)
    output, kept = query.new_empty(query.shape), query.new_empty(_kept(rows, length))
    later = query.new_full((PIECE, PIECE), -math.inf).triu_(1)
    for start, end in _pieces(length):
        size = end - start
        scores = torch.bmm(query[:, :, start:end].reshape(held, groups * size, width), key[:, :end].transpose(1, 2))
        scores.view(held, groups, size, end)[..., start:] += later[:size, :size]
        shares = torch.ops.aten._softmax.out(scores, -1, False, out=_part(kept, rows, groups, start, end))
        output[:, :, start:end] = torch.bmm(shares, value[:, :end]).view(held, groups, size, width)
    return output.view(batch, heads, length, width), kept


@_forward.register_fake
def _(query, key, value, scaling):
    batch, heads, length, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(_kept(batch * heads, length))


@torch.library.custom_op("mllm_demo::causal_attention_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor, kept: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`gradient [B, H, T, D]` of the output → gradients of `query`, `key` and `value`."""
    shape, (batch, heads, length, width) = key.shape, query.shape
    rows, held = batch * heads, batch * key.shape[1]
    groups = rows // held
    query, gradient = (array.reshape(held, groups, length, width) for array in (query, gradient))
    key, value = key.reshape(held, length, width), value.reshape(held, length, width)
    of_query = query.new_empty(query.shape)
    of_key, of_value = (key.new_zeros(key.shape, dtype=torch.float32) for _ in range(2))  # sums over pieces
    for start, end in _pieces(length):
        size = end - start
        asked, wanted = (a[:, :, start:end].reshape(held, groups * size, width) for a in (query, gradient))
        shares = _part(kept, rows, groups, start, end)
        of_value[:, :end] += torch.bmm(shares.transpose(1, 2), wanted)
        of_shares = torch.bmm(wanted, value[:, :end].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_query[:, :, start:end] = torch.bmm(of_scores, key[:, :end]).view(held, groups, size, width)
        of_key[:, :end] += torch.bmm(of_scores.transpose(1, 2), asked)
    of_key, of_value = (of_key * scaling).to(key.dtype).view(shape), of_value.to(value.dtype).view(shape)
    return (of_query * scaling).view(batch, heads, length, width), of_key, of_value


@_backward.register_fake
def _(gradient, kept, query, key, value, scaling):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    query, key, value, ctx.scaling = inputs
    ctx.save_for_backward(output[1], query, key, value)


def _gradients(ctx, gradient: torch.Tensor, _) -> tuple:
    return *_backward(gradient, *ctx.saved_tensors, ctx.scaling), None


_forward.register_autograd(_gradients, setup_context=_save)


def causal_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    scaling: float, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls: `query [B, H, T, D]`, `key`, `value` `[B, K, T, D]` → output `[B, T, H, D]`."""
    output, _ = _forward(query, key, value, scaling)
    return output.transpose(1, 2).contiguous(), None


# Without a function of its own that makes masks, the model makes none.
AttentionInterface.register(NAME, causal_attention)
