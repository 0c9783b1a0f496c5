"""One layer: on full and 4-bit base weights, in any dtype, with dropout, and as an ordinary LoRA."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model
from torch import nn

from mllm_demo.moe_lora import MoeLoraConfig, MoeLoraLayer

IN, OUT, EXPERTS, R, ALPHA = 64, 32, 3, 4, 6.0


class Net(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def adapt(linear, **choices):
    config = MoeLoraConfig(
        r=R,
        lora_alpha=ALPHA,
        num_experts=EXPERTS,
        target_modules=["linear"],
        init_lora_weights=False,
        **choices,
    )
    return get_peft_model(Net(linear), config).eval()


def linear_4bit(weight, compute_dtype):
    linear = bnb.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return linear.to("cpu")


def naive(layer, weight, x):
    """Every token and expert on its own, from the layer's own tensors."""
    router, lora_A, lora_B = layer.lora_router["default"], layer.lora_A["default"], layer.lora_B["default"]
    rows = []
    for token in x.reshape(-1, IN).float():
        z = token / token.square().mean().sqrt()
        probs = torch.softmax(router.weight @ z, dim=-1)
        best = int(probs.argmax())
        y = weight @ token
        for e, g in ((best, probs[best]), (EXPERTS, 1.0)):
            block = slice(e * R, (e + 1) * R)
            y = y + ALPHA / R * g * (lora_B[:, block].float() @ (lora_A[block].float() @ token))
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], OUT)


@torch.no_grad()
def test_linear4bit_equals_naive_on_dequantized_weight():
    torch.manual_seed(0)
    base = linear_4bit(torch.randn(OUT, IN) / 8, torch.float32)
    model = adapt(base)
    layer = model.base_model.model.linear
    x = torch.randn(2, 5, IN)
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)

    # Where the processor has AVX512-BF16, bitsandbytes multiplies in bfloat16 (8 bits of mantissa) whatever is asked.
    tolerance = 2e-2 if has_avx512bf16() else 1e-5
    assert isinstance(layer, MoeLoraLayer) and isinstance(layer.base_layer, bnb.nn.Linear4bit)
    base_output, exact = layer.base_layer(x), nn.functional.linear(x, weight)
    torch.testing.assert_close(base_output, exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(model(x) - base_output, naive(layer, weight, x) - exact, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@torch.no_grad()
def test_linear8bit_adds_what_the_experts_add_elsewhere():
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, IN) / 8, torch.randn(2, 5, IN)
    base = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    base.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    base = base.to("cpu").eval()  # training mode multiplies in another way
    expected = base(x)
    model = adapt(base)
    layer = model.base_model.model.linear

    assert isinstance(layer, MoeLoraLayer) and base.weight.dtype == torch.int8
    delta = naive(layer, torch.zeros(OUT, IN), x)
    torch.testing.assert_close(model(x) - expected, delta, atol=1e-5, rtol=1e-5)


def test_linear4bit_trains_adapter_and_router_but_not_the_base():
    torch.manual_seed(0)
    model = adapt(linear_4bit(torch.randn(OUT, IN), torch.float32)).train()
    model(torch.randn(2, 5, IN)).square().sum().backward()

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("linear.")[2] for name in trained} == {
        "lora_A.default",
        "lora_B.default",
        "lora_router.default.weight",
    }
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("autocast_adapter_dtype", (True, False))
def test_bfloat16_base_keeps_its_output_dtype(autocast_adapter_dtype):
    torch.manual_seed(0)
    config = MoeLoraConfig(r=R, lora_alpha=ALPHA, num_experts=EXPERTS, target_modules=["linear"])
    config.init_lora_weights = False
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
    model = get_peft_model(Net(linear), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    layer, x = model.base_model.model.linear, torch.randn(2, 5, IN).bfloat16()

    assert layer.lora_A["default"].dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    assert layer.lora_router["default"].weight.dtype == torch.float32
    y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), naive(layer, linear.weight.float(), x), atol=3e-2, rtol=3e-2)


@torch.no_grad()
def test_runs_in_inference_mode_and_under_autocast():
    model, x = adapt(nn.Linear(IN, OUT)), torch.randn(2, 5, IN)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, atol=3e-2, rtol=3e-2)


@torch.no_grad()
def test_dropout_only_while_training():
    torch.manual_seed(0)
    model, x = adapt(nn.Linear(IN, OUT), lora_dropout=0.5), torch.randn(2, 5, IN)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@torch.no_grad()
def test_plain_module_is_an_ordinary_lora():
    torch.manual_seed(0)
    linear, x = nn.Linear(IN, OUT), torch.randn(2, 5, IN)
    config = MoeLoraConfig(
        lora_alpha=ALPHA, plain_r=R, target_modules=["nothing"], plain_target_modules=["linear"]
    )
    model = get_peft_model(Net(linear), config).eval()
    layer = model.base_model.model.linear
    layer.lora_B["default"].normal_()
    ours = model(x)
    lora = get_peft_model(Net(linear), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["linear"])).eval()
    lora_layer = lora.base_model.model.linear
    lora_layer.lora_A["default"].weight.copy_(layer.lora_A["default"])
    lora_layer.lora_B["default"].weight.copy_(layer.lora_B["default"])

    assert model.base_model.routers() == []
    torch.testing.assert_close(ours, lora(x), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_fresh_adapter_changes_nothing():
    torch.manual_seed(0)
    linear, x = nn.Linear(IN, OUT), torch.randn(2, 5, IN)
    expected = linear(x)
    model = get_peft_model(Net(linear), MoeLoraConfig(target_modules=["linear"]))
    assert torch.equal(model(x), expected)


def test_other_modules_are_refused():
    config = MoeLoraConfig(target_modules=["linear"])
    with pytest.raises(TypeError, match="'linear' must be a torch.nn.Linear .* got Embedding"):
        get_peft_model(Net(nn.Embedding(3, 4)), config)
