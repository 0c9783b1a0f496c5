"""bitsandbytes' kernels called directly write what its operators return, and its operators step in where they lack."""

import pytest
import torch
from bitsandbytes import functional as bnb

from mllm_demo.models import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["the library", "no library"])
def library(request, monkeypatch):
    if request.param == "no library":
        monkeypatch.setattr(kernels, "_kernel", lambda *_: None)
    elif not hasattr(bnb.lib, "_lib"):
        pytest.skip("bitsandbytes came without its library")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(6, 128), (4, 10), (64, 3)], ids=["blocks", "a rest", "odd rows"])
def test_values_of_four_bits_are_the_operators(shape, quant_type, dtype, library):
    codes, state = bnb.quantize_4bit(torch.randn(shape), blocksize=64, quant_type=quant_type)
    out = torch.full(shape, torch.nan, dtype=dtype)
    kernels.dequantize_4bit(codes.flatten(), state.absmax, 64, quant_type, out)
    expected = torch.ops.bitsandbytes.dequantize_4bit(codes, state.absmax, 64, quant_type, shape, dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_eight_bits_are_the_operators(dtype, library):
    codes, state = bnb.quantize_blockwise(torch.randn(700), blocksize=256)
    out = torch.full((700,), torch.nan, dtype=dtype)
    kernels.dequantize_8bit(codes, state.absmax, state.code, 256, out)
    assert torch.equal(out, torch.ops.bitsandbytes.dequantize_blockwise(codes, state.absmax, state.code, 256, dtype))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_products_of_packed_codes_are_the_operators(quant_type):
    inputs = torch.randn(2, 128).bfloat16()
    if not kernels.multiplies(quant_type, inputs):
        pytest.skip("no AVX512-BF16")
    codes, maxima = torch.randint(0, 256, (64 * 64,), dtype=torch.uint8), torch.rand(4, 64).bfloat16()
    code = bnb.get_4bit_type(quant_type, device="cpu")
    expected = torch.ops.bitsandbytes.gemv_4bit(inputs, codes, (64, 128), maxima, code, 32)
    assert torch.equal(kernels.gemv_4bit(inputs, codes, maxima, 32, quant_type, 64), expected)


def test_float32_inputs_are_not_multiplied_in_sixteen_bit():
    assert not kernels.multiplies("nf4", torch.randn(1, 64))
