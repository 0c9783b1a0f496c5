"""Experts packed while an adapter loads answer as their own unpacked values do, and take an eighth of the room."""

import pytest
import torch
from peft import PeftConfig, PeftModel

from mllm_demo.moe_lora import MoeLoraLayer
from mllm_demo.moe_lora.four_bit import is_four_bit, linear, pack, unpack

GATED = ("o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def saved(moe_llama, tmp_path):
    def save(**choices):
        moe_llama(**choices).save_pretrained(tmp_path)
        return tmp_path

    return save


def load(base, folder, packed: bool) -> PeftModel:
    config = PeftConfig.from_pretrained(str(folder))
    config.experts_in_4bit = packed
    options = {"config": config, "low_cpu_mem_usage": packed, "torch_device": "cpu"}
    return PeftModel.from_pretrained(base, str(folder), **options).eval()


@torch.no_grad()
def unpacked(model: PeftModel) -> PeftModel:
    """Puts the values that the packed experts stand for in their place."""
    for module in model.modules():
        if isinstance(module, MoeLoraLayer):
            for held in (module.lora_A, module.lora_B):
                if is_four_bit(held["default"]):
                    held["default"] = torch.nn.Parameter(unpack(held["default"]), requires_grad=False)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "choices",
    [
        {"num_experts_per_tok": 2},
        {"granularity": "sequence", "shared_expert_weighting": "complement"},
        {"router_input": "prompt_mean", "router_softmax_dtype": "float16", "adapter_dtype": "model"},
    ],
)
def test_packed_experts_are_their_unpacked_values(llama, saved, input_ids, choices):
    """Within 1e-5 of float32: the same numbers, multiplied in another order."""
    folder = saved(**choices)
    packed = load(llama(), folder, True)
    ours = packed(input_ids=input_ids).logits
    torch.testing.assert_close(ours, unpacked(packed)(input_ids=input_ids).logits, atol=1e-5, rtol=1e-4)
    whole = load(llama(), folder, False)(input_ids=input_ids).logits
    assert (ours - whole).abs().max() > 1e-4  # so it was the packed weights that answered


def test_only_experts_are_packed(llama, saved):
    model = load(llama(), saved(), True)
    kinds = {name: is_four_bit(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    assert kinds
    for name, packed in kinds.items():
        assert packed == (any(part in name for part in GATED) and "router" not in name), name
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


def test_a_packed_weight_takes_an_eighth_of_float32():
    weight = torch.randn(256, 512)
    held = pack(weight, torch.float32, torch.device("cpu"))
    assert held.nbytes == weight.nbytes // 8
    x = torch.randn(3, 512)
    torch.testing.assert_close(linear(x, held), x @ unpack(held).T, atol=1e-3, rtol=1e-4)
    # NF4's coarsest step is 0.3 of a block's largest value; half of it is the most that a value can be off.
    assert (unpack(held) - weight).abs().max() < 0.16 * weight.abs().max()


@torch.no_grad()
def test_adapters_in_the_models_dtype_keep_plain_lora_in_float32(llama, moe_llama, tmp_path):
    moe_llama(adapter_dtype="model").save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        model = PeftModel.from_pretrained(llama().bfloat16(), str(tmp_path), **options)
        dtypes = {
            (name.split(".lora_")[0].rpartition(".")[2] in GATED): parameter.dtype
            for name, parameter in model.named_parameters()
            if "lora_" in name
        }
        assert dtypes == {True: torch.bfloat16, False: torch.float32}
