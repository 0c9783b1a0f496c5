"""A masked expert is never chosen, the rest is a softmax over the others, and nothing stays behind."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_demo.errors import RoutingError
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.routing.controls import masked_experts
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import Token

IDS = torch.arange(9)[None]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    adapter = MoeLoraConfig(
        r=2, num_experts=3, target_modules=["gate_proj", "up_proj", "down_proj"], router_scope="block",
        init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), adapter).eval()


@torch.no_grad()
def run(model):
    with RoutingTap(model) as tap:
        logits = model(input_ids=IDS).logits
        return logits, tap.trace([Token(int(i), "", "text", "user", "prefill") for i in IDS[0]])


def test_a_masked_expert_is_never_chosen_and_the_others_share_its_probability(model):
    logits, trace = run(model)
    first, second = (site.name for site in trace.sites)
    with masked_experts(model, {first: [1]}):
        changed, masked = run(model)
    assert (trace.selected_experts[first] == 1).any() and not (masked.selected_experts[first] == 1).any()
    assert not torch.allclose(changed, logits)
    # The first router sees what it saw before: its probabilities are the old ones over the experts that are left.
    left = torch.tensor(trace.router_probs[first]).float()
    left[:, 1] = 0
    wanted = left / left.sum(-1, keepdim=True)
    assert torch.allclose(torch.tensor(masked.router_probs[first]).float(), wanted, atol=2e-3)  # float16 in the trace


def test_nothing_is_left_behind(model):
    before, _ = run(model)
    name = run(model)[1].sites[0].name
    with pytest.raises(ZeroDivisionError), masked_experts(model, {name: [0]}):
        raise ZeroDivisionError
    with masked_experts(model, {name: [0, 2]}):
        assert set(run(model)[1].selected_experts[name].ravel()) == {1}
    after, _ = run(model)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("site", "experts", "words"),
    [("nowhere", [0], "no router called"), (None, [3], "experts 0 to 2"), (None, [0, 1, 2], "too few")],
)
def test_what_cannot_be_masked_is_one_sentence(model, site, experts, words):
    name = site or run(model)[1].sites[0].name
    with pytest.raises(RoutingError, match=words), masked_experts(model, {name: experts}):
        pass
    with torch.no_grad():
        model(input_ids=IDS)
