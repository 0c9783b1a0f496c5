"""Memory is counted from the tensors a model holds, and estimated closely before it holds any."""

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn
from transformers import AutoModelForImageTextToText

from mllm_demo.errors import OutOfMemoryError
from mllm_demo.models import memory, quantize

CPU = torch.device("cpu")


def load(checkpoint, quantization):
    return AutoModelForImageTextToText.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=quantize.bnb_config(quantization, torch.float32),
    )


def test_a_plain_layer_is_its_weights_and_bias():
    footprint = memory.measure(nn.Linear(10, 20))
    assert footprint == memory.Footprint(memory_bytes=(200 + 20) * 4, four_bit_bytes=0, parameters=220)
    assert footprint.four_bit_share == 0


def test_shared_weights_and_buffers_are_counted_once():
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    both = nn.Sequential(first, second)
    both.register_buffer("table", torch.zeros(3))
    assert memory.measure(both) == memory.Footprint(8 * 8 * 4 + 3 * 4, 0, 64)


def test_an_empty_model_has_no_share():
    assert memory.measure(nn.Identity()).four_bit_share == 0


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_four_bit_bytes_are_half_a_byte_for_every_quantized_weight(checkpoint, quantization):
    plain = load(checkpoint, "none")
    quantized_names = {
        name for name, module in load(checkpoint, quantization).named_modules() if type(module).__name__ == "Linear4bit"
    }
    weights = sum(plain.get_submodule(name).weight.numel() for name in quantized_names)
    footprint = memory.measure(load(checkpoint, quantization))
    assert weights > 0
    assert footprint.four_bit_bytes == weights // 2
    assert footprint.parameters == sum(parameter.numel() for parameter in plain.parameters())


def test_quantization_statistics_are_memory_but_not_four_bit(checkpoint):
    model = load(checkpoint, "nf4")
    layer = next(m for m in model.modules() if type(m).__name__ == "Linear4bit")
    state = layer.weight.quant_state
    weights = state.shape.numel()
    nested = state.state2
    statistics = weights // 64 + nested.absmax.nbytes + nested.code.nbytes + state.code.nbytes + state.offset.nbytes
    alone = memory.measure(nn.ModuleList([layer]))
    bias = 0 if layer.bias is None else layer.bias.nbytes
    assert alone.memory_bytes == weights // 2 + statistics + bias
    assert alone.four_bit_bytes == weights // 2


def test_a_forward_does_not_change_what_is_counted(checkpoint):
    for quantization in ("nf4", "int8"):
        model = load(checkpoint, quantization)
        before = memory.measure(model)
        with torch.inference_mode():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        after = memory.measure(model)
        # For its fused CPU kernel bitsandbytes trades 8-bit statistics and their code books for 16-bit ones.
        repacked = quantization == "nf4" and has_avx512bf16()
        assert after.memory_bytes == pytest.approx(before.memory_bytes, rel=0.03 if repacked else 0)
        assert (after.four_bit_bytes, after.parameters) == (before.four_bit_bytes, before.parameters)


def test_what_does_not_fit_is_refused_with_both_numbers():
    memory.check_fits("Model", 10**9, CPU, free=10**9)
    with pytest.raises(OutOfMemoryError, match=r"Model needs about 1\.2 GB on cpu, where 1\.1 GB is free; choose"):
        memory.check_fits("Model", 12 * 10**8, CPU, free=11 * 10**8)


def test_free_memory_respects_the_container(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 150000\nactive_file 50000\n")
    assert memory.free_bytes(CPU, cgroup=tmp_path) == 600_000


def test_free_memory_without_a_container_limit_is_the_machines(tmp_path):
    unlimited = memory.free_bytes(CPU, cgroup=tmp_path / "absent")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    (tmp_path / "memory.stat").write_text("anon 5\n")
    assert memory.free_bytes(CPU, cgroup=tmp_path) == pytest.approx(unlimited, rel=0.2)
