"""Experts held in 4 bit: a LoRA weight as bitsandbytes' NF4, and the product with it.

A stack of experts is one matrix, so one packed weight holds them all, and a token's product reads it packed. It knows
nothing of experts, routers or layers.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Params4bit
from torch import nn

BLOCK_SIZE = 64


def is_four_bit(weight: torch.Tensor) -> bool:
    """Whether `weight` is packed."""
    return isinstance(weight, Params4bit) and weight.quant_state is not None


def pack(weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """`weight` [out, in] as NF4 with double quantization on `device`, unpacking to `dtype`."""
    held = Params4bit(
        weight.detach().to(device, dtype).contiguous(),
        requires_grad=False,
        quant_type="nf4",
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
    )
    return held.to(device)


def unpack(weight: Params4bit) -> torch.Tensor:
    """The matrix [out, in] that a packed weight stands for."""
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [.., in] times `weight` [out, in], packed or not: [.., out]."""
    if not is_four_bit(weight):
        return F.linear(x, weight)
    return bnb.matmul_4bit(x, weight.data.t(), quant_state=weight.quant_state)
