"""Routers and experts of MoE-LLaVA: every way of computing experts agrees, noise is off, seeded when on, and told."""

import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PhiConfig, Qwen2Config

from mllm_demo.chat.engine import ChatEngine
from mllm_demo.chat.events import Finished
from mllm_demo.chat.images import read_picture
from mllm_demo.chat.messages import Message
from mllm_demo.errors import CheckpointError
from mllm_demo.models import loading
from mllm_demo.models.experts import ExpertWeights4bit
from mllm_demo.models.moe_llava.config import MoePhiConfig, mixture
from mllm_demo.models.moe_llava.experts import GatedExperts, MoeLlavaBlock, PlainExperts, original_draw
from mllm_demo.models.moe_llava.gating import capacity_of, gate
from mllm_demo.settings import ModelChoice, Sampling, Settings
from tests.unit.models.moe_llava.originals import FAMILIES, moe, save_original


def one_by_one(experts, hidden, chosen, weights) -> torch.Tensor:
    """The definition: each token, each choice, as an MLP of its own."""
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for choice, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            if isinstance(experts, GatedExperts):
                middle = experts._apply_gate(experts.gate_up_proj[choice] @ hidden[token])
                answer = experts.down_proj[choice] @ middle
            else:
                middle = experts.act_fn(experts.up_proj[choice] @ hidden[token] + experts.up_proj_bias[choice])
                answer = experts.down_proj[choice] @ middle + experts.down_proj_bias[choice]
            out[token] += weight * answer
    return out


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("kind", "config"), [(GatedExperts, Qwen2Config), (PlainExperts, PhiConfig)])
def test_experts_are_what_they_would_be_one_by_one(kind, config, implementation):
    torch.manual_seed(0)
    config = config(hidden_size=16)
    config._experts_implementation = implementation
    experts = kind(config, 5, 24)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden, logits = torch.randn(9, 16), torch.randn(9, 5)
    decision = gate(logits, 2, 0.4, 0)
    assert not decision.kept.all()
    with torch.no_grad():
        found = experts(hidden, decision.chosen, decision.weights)
        torch.testing.assert_close(found, one_by_one(experts, hidden, decision.chosen, decision.weights))


def test_a_token_that_both_experts_dropped_gets_nothing():
    logits = torch.tensor([[3.0, 2.0, 0.0]] * 4)
    decision = gate(logits, 2, 0.25, 0)
    assert decision.capacity == 1
    assert decision.kept.tolist() == [[True, True], *[[False, False]] * 3]
    assert decision.weights[1:].eq(0).all() and decision.weights[0].sum() == pytest.approx(1)


def test_one_survivor_gets_the_whole_weight():
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0]])
    decision = gate(logits, 2, 0.75, 0)
    assert decision.capacity == 1 and decision.kept.tolist() == [[True, True], [False, True]]
    assert decision.weights[1].tolist() == [0.0, 1.0]


def test_capacity():
    assert capacity_of(100, 4, 2, 2.0, 0) == 100
    assert capacity_of(1, 8, 2, 1.0, 0) == 1
    assert capacity_of(3, 8, 1, 0.5, 4) == 4


def slot_by_slot(logits: torch.Tensor, k: int, factor: float, minimum: int) -> torch.Tensor:
    """Combine weights [S, E] as the rules say them, one token after the other."""
    tokens, experts = logits.shape
    capacity = max(math.ceil(tokens / experts * k * factor), minimum)
    room, probs = [capacity] * experts, logits.softmax(-1)
    weights = torch.zeros_like(logits)
    for choice in range(k):
        for token in range(tokens):
            expert = probs[token].argsort(descending=True)[choice]
            if room[expert] > 0:
                room[expert] -= 1
                weights[token, expert] = probs[token, expert]
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-30) if k == 2 else weights


@pytest.mark.parametrize("seed", range(12))
def test_gating_is_what_filling_slot_by_slot_gives(seed):
    draw = random.Random(seed)
    tokens, experts, k = draw.randint(1, 60), draw.randint(2, 9), draw.choice((1, 2))
    factor, minimum = draw.choice((0.25, 0.5, 1.0, 1.5, 2.0)), draw.choice((0, 1, 4))
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    decision = gate(logits, k, factor, minimum)
    found = torch.zeros_like(logits).scatter_add_(1, decision.chosen, decision.weights)
    torch.testing.assert_close(found, slot_by_slot(logits, k, factor, minimum))


def test_the_noise_moves_second_choices_alone_and_its_seed_repeats_it():
    class Router:
        mixture = mixture(MoePhiConfig(num_hidden_layers=3, moe=moe()))

    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    quiet = gate(logits, 2, 2.0, 0)
    noisy = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        noisy.append(gate(logits, 2, 2.0, 0, original_draw(Router, logits)))
    assert torch.equal(noisy[0].chosen, noisy[1].chosen) and not torch.equal(noisy[0].chosen, noisy[2].chosen)
    assert torch.equal(noisy[0].chosen[:, 0], quiet.chosen[:, 0])
    assert torch.equal(noisy[0].router_probs, quiet.router_probs)
    # Gumbel noise makes the second choice a sample of the softmax without the first.
    rest = quiet.router_probs.scatter(1, quiet.chosen[:, :1], 0)
    expected = (rest / rest.sum(1, keepdim=True)).mean(0)
    found = torch.bincount(noisy[0].chosen[:, 1], minlength=4) / len(logits)
    torch.testing.assert_close(found, expected, atol=0.08, rtol=0)


@pytest.mark.parametrize(
    ("table", "layers"),
    [
        ({"moe_layers_idx": None}, {0: 4, 2: 4}),
        ({"moe_layers_idx": None, "moe_mode": "second_half", "num_experts": [8]}, {1: 8, 2: 8}),
        ({"num_experts": [4, 3]}, {0: 4, 2: 3}),
        ({"moe_enable": False}, {}),
    ],
)
def test_which_layers_are_mixtures(table, layers):
    assert mixture(MoePhiConfig(num_hidden_layers=3, moe=moe(**table))).experts == layers


def test_a_table_that_contradicts_itself():
    with pytest.raises(CheckpointError, match="3 numbers of experts for the layers"):
        mixture(MoePhiConfig(num_hidden_layers=3, moe=moe(num_experts=[1, 2, 3])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Two experts' capacity for four: choices are dropped.
    return save_original(
        tmp_path_factory.mktemp("original") / "phi", moe=moe(eval_capacity_factor=0.5, use_residual=True)
    )


def answers(folder, noisy: bool, seeds: tuple[int, ...]) -> tuple[str, list[Finished]]:
    engine = ChatEngine(Settings(cache_dir=folder.parent / "cache"))
    list(engine.load(ModelChoice(str(folder), None, "none", "cpu", moe_llava_noise=noisy)))
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
    shown = read_picture(png.getvalue(), max_bytes=10**6, max_pixels=10**6)
    asked = (Message("user", (shown, "What?")),)
    made = [list(engine.answer(asked, Sampling(max_new_tokens=3, seed=seed)))[-1] for seed in seeds]
    return engine.status().remark, made


def test_without_noise_no_seed_matters_and_dropped_choices_weigh_nothing(folder):
    remark, (one, two) = answers(folder, False, (1, 2))
    assert "--moe-llava-noise" in remark and one.trace.provenance["remark"] == remark
    assert one.trace.sites[0].has_shared_expert
    dropped = 0
    for site in one.trace.sites:
        assert np.array_equal(one.trace.selected_experts[site.name], two.trace.selected_experts[site.name])
        weights = one.trace.routing_weights[site.name]
        # A residual mixture weighs its experts by a share; half precision may round it up to one.
        assert (weights.sum(1) <= 1).all() and (weights.sum(1) < 0.9).any()
        dropped += int((weights == 0).sum())
    assert dropped > 0


def test_with_noise_the_seed_repeats_an_answer(folder):
    remark, (one, same, other) = answers(folder, True, (1, 1, 2))
    assert "with noise" in remark
    name = one.trace.sites[0].name
    assert np.array_equal(one.trace.selected_experts[name], same.trace.selected_experts[name])
    assert not np.array_equal(one.trace.selected_experts[name], other.trace.selected_experts[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_held_in_four_bit_and_routers_are_not_and_stay_so_on_disk(family, tmp_path):
    folder = save_original(tmp_path / family, family)
    loaded = loading.load(ModelChoice(str(folder), None, "nf4", "cpu"), tmp_path / "cache", lambda step: None)
    blocks = [module for module in loaded.model.modules() if isinstance(module, MoeLlavaBlock)]
    assert len(blocks) == 2
    for block in blocks:
        assert isinstance(block.experts.down_proj, ExpertWeights4bit)
        assert block.router.weight.is_floating_point()
    held = sum(block.experts.down_proj.weights for block in blocks)
    assert loaded.four_bit_share > held / loaded.parameters
    assert loaded.four_bit_share > 0.85
    # Before it computes: bitsandbytes repacks linear layers for the CPU at their first product, with rounding.
    for part in (loaded.model, loaded.processor):
        part.save_pretrained(tmp_path / "saved")
    again = loading.load(ModelChoice(str(tmp_path / "saved"), None, "nf4", "cpu"), None, lambda step: None)
    assert again.four_bit_share == loaded.four_bit_share
    with torch.no_grad():
        one, two = (held.model(input_ids=torch.arange(1, 9)[None]).logits[..., :-1] for held in (loaded, again))
    assert torch.isfinite(one).all() and torch.equal(one, two)
