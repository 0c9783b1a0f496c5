"""Qwen's first generation beyond its trained length, and with its cache."""

import math

import pytest
import torch
from transformers.cache_utils import DynamicCache

from mllm_demo.models.moe_llava.config import MoeQwenConfig
from mllm_demo.models.moe_llava.qwen import QwenModel

TRAINED = 16


@pytest.fixture(scope="module")
def model() -> QwenModel:
    torch.manual_seed(0)
    config = MoeQwenConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        seq_length=TRAINED,
        initializer_range=0.3,
    )
    return QwenModel(config).eval()


def ids(length: int) -> torch.Tensor:
    return torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(1))


def stepwise(model: QwenModel, tokens: torch.Tensor, prompt: int) -> tuple[torch.Tensor, DynamicCache]:
    """Hidden states of `tokens`, the first `prompt` at once and the others one by one."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        states = [model(tokens[:, :prompt], past_key_values=cache).last_hidden_state]
        for place in range(prompt, tokens.shape[1]):
            states.append(model(tokens[:, place : place + 1], past_key_values=cache).last_hidden_state)
    return torch.cat(states, dim=1), cache


def test_the_cache_changes_nothing_within_the_trained_length(model):
    tokens = ids(TRAINED)
    with torch.no_grad():
        at_once = model(tokens).last_hidden_state
    torch.testing.assert_close(stepwise(model, tokens, 5)[0], at_once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "stretch"), [(TRAINED, 1), (TRAINED + 1, 3), (2 * TRAINED, 3), (2 * TRAINED + 1, 7)]
)
def test_rotary_angles_are_stretched_with_the_prompt(model, length, stretch):
    _, cache = stepwise(model, ids(length), length)
    assert cache.rotary_stretch.tolist() == [stretch]
    cos, _ = model._angles(torch.tensor([1]), torch.tensor([float(stretch)]), torch.float32)
    turned = model.config.hidden_size // model.config.num_attention_heads
    base = model.config.rope_theta * stretch ** (turned / (turned - 2))
    expected = [math.cos(base ** (-2 * index / turned)) for index in range(turned // 2)]
    assert cos[0, 0].tolist() == pytest.approx(expected * 2, abs=1e-6)


def test_the_prompt_decides_for_its_answer(model):
    """Keys in the cache were turned with the prompt's angles, so an answer that grows longer keeps them."""
    _, cache = stepwise(model, ids(TRAINED + 3), TRAINED - 1)
    assert cache.rotary_stretch.tolist() == [1]


def test_queries_grow_by_the_logarithm_of_their_place(model):
    scale = model._query_scale(torch.arange(2 * TRAINED), 2 * TRAINED, torch.float32)[:, 0]
    assert scale[:TRAINED].tolist() == [1] * TRAINED
    assert scale[-1].item() == pytest.approx(math.log(2 * TRAINED) / math.log(TRAINED))
    assert model._query_scale(torch.arange(TRAINED), TRAINED, torch.float32) is None
