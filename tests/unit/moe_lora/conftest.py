"""Tiny models for the MoE-LoRA tests: random, built in milliseconds, nothing downloaded."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_demo.moe_lora import MoeLoraConfig


def build_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def build_config(**choices):
    defaults = {
        "r": 2,
        "num_experts": 3,
        "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
        "plain_target_modules": ["q_proj", "k_proj", "v_proj"],
        "router_scope": "block",
    }
    return MoeLoraConfig(**{**defaults, **choices})


def randomize(model, adapter_name="default", seed=1):
    """Gives an adapter weights that matter: its effect is visible, and tokens choose different experts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter_name}" in name:
                std = 1.0 if "router" in name else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@pytest.fixture
def llama():
    return build_llama


@pytest.fixture
def moe_llama():
    """Builds a Llama with one randomized adapter, in eval mode: `moe_llama(**config_choices)`."""
    return lambda **choices: randomize(get_peft_model(build_llama(), build_config(**choices)).eval())


@pytest.fixture
def moe_config():
    return build_config


@pytest.fixture
def randomized():
    return randomize


@pytest.fixture
def input_ids():
    return torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(3))
