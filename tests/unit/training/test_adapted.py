"""The adapter learns on weights rounded as they are shipped and on exact ones, and knows where every token stands."""

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from mllm_demo.training import adapted
from mllm_demo.training.adapted import Rounding
from mllm_demo.training.adapters import single_lora
from tests.unit.training.test_chat import Tiny


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
    as_they_are = []
    for step in range(8):
        rounding.begin(step)
        as_they_are.append(torch.equal(frozen.weight, exact))
    assert as_they_are == [True, False, False, False] * 2
    assert torch.equal(learned.weight, untouched) and frozen.weight.data_ptr() == place


def test_positions_that_are_left_out_are_not_closed_up(monkeypatch):
    monkeypatch.setattr(adapted, "PLACED", 0)
    model, ids = single_lora(Tiny()).eval(), torch.tensor([[3, 9, 4, 11, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain, counted, apart = (
            adapted.hidden_states(model, batch | more, None)[0]
            for more in ({}, {"position_ids": torch.arange(5)[None]}, {"position_ids": torch.tensor([[0, 1, 7, 8, 9]])})
        )
    assert torch.equal(plain, counted)
    assert torch.allclose(plain[:, :2], apart[:, :2]) and (plain[:, 2:] - apart[:, 2:]).abs().max() > 1e-3
