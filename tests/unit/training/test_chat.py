"""The adapter learns on weights rounded as they are shipped and on exact ones, in turn."""

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from mllm_demo.training.chat import Rounding


def test_frozen_linear_weights_change_between_exact_and_rounded_in_place():
    torch.manual_seed(0)
    frozen, learned = nn.Linear(64, 32, bias=False).bfloat16(), nn.Linear(64, 32, bias=False).bfloat16()
    model = nn.Sequential(frozen.requires_grad_(False), learned, nn.LayerNorm(32))
    exact, untouched, place = frozen.weight.clone(), learned.weight.clone(), frozen.weight.data_ptr()
    packed, state = quantize_4bit(exact, quant_type="nf4", compress_statistics=True)
    rounding = Rounding(model)
    rounding.use(rounded=True)
    assert torch.equal(frozen.weight, dequantize_4bit(packed, state)) and not torch.equal(frozen.weight, exact)
    rounding.use(rounded=False)
    assert torch.equal(frozen.weight, exact)
    assert torch.equal(learned.weight, untouched) and frozen.weight.data_ptr() == place
