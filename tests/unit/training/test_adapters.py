"""Experts start as copies of a single LoRA, and the mixture starts where that LoRA ended."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_demo.moe_lora.layer import MoeLoraLayer
from mllm_demo.training.adapters import (
    COPY_NOISE,
    EXPERT_MODULES,
    PLAIN_MODULES,
    RANK,
    lora_state,
    mixture,
    single_lora,
)

IDS = torch.arange(12).view(2, 6)


def tiny() -> LlamaConfig:
    """Of a language model that is built at once."""
    return LlamaConfig(
        vocab_size=32, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


class Holder(torch.nn.Module):
    """A language model under the name that it has inside a vision-language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = tiny()
        self.language_model = LlamaForCausalLM(self.config)
        self.tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})  # a name that the decoder has too

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.language_model.prepare_inputs_for_generation(*args, **kwargs)

    def forward(self, input_ids, **kwargs):
        return self.language_model(input_ids)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def trained():
    """A stage I model whose LoRA is not zero any more."""
    model = single_lora(Holder())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_stage_one_adapts_every_linear_layer_of_the_decoder(trained):
    state = lora_state(trained)
    assert len(state) == 2 * 2 * len(EXPERT_MODULES + PLAIN_MODULES)
    assert all(value.shape[0 if ".lora_A" in name else 1] == RANK for name, value in state.items())


def test_one_expert_is_exactly_the_single_lora(trained):
    """Up to the noise on A, an eighth of the spread of A itself."""
    change = (logits(trained) - logits(Holder())).abs().max()
    torch.manual_seed(1)
    grown = mixture(Holder(), 1, lora_state(trained))
    assert (logits(grown) - logits(trained)).abs().max() < 0.25 * change
    rank = {
        m.lora_A["default"].shape[0]
        for m in grown.modules()
        if isinstance(m, MoeLoraLayer) and m.num_experts["default"]
    }
    assert rank == {2 * RANK}  # as many active ranks as a mixture's chosen and shared expert together


def test_a_mixture_starts_near_the_single_lora(trained):
    change = (logits(trained) - logits(Holder())).abs().max()
    torch.manual_seed(1)
    grown = mixture(Holder(), 4, lora_state(trained))
    assert (logits(grown) - logits(trained)).abs().max() < 0.4 * change


def test_experts_are_copies_that_differ_by_noise_alone(trained):
    grown = mixture(Holder(), 4, lora_state(trained))
    for layer in grown.modules():
        if isinstance(layer, MoeLoraLayer) and layer.num_experts["default"]:
            A = layer.lora_A["default"].unflatten(0, (-1, RANK))
            B = layer.lora_B["default"].unflatten(1, (-1, RANK))
            assert (A[0] - A[1]).abs().max() > 0 and (A[0] - A[-1]).std() < 2 * COPY_NOISE
            assert torch.equal(B[:, 0], B[:, 1]) and torch.allclose(B[:, -1], 0.75 * B[:, 0])
