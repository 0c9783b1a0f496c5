"""One LoRA of the same active rank comes as near to what experts do as a LoRA can."""

import pytest
import torch

from mllm_demo.moe_lora.layer import MoeLoraLayer
from mllm_demo.training.adapters import EXPERT_MODULES, RANK, lora_state, mixture, single_lora
from mllm_demo.training.one_lora import Added, one_lora
from tests.unit.training.test_adapters import Holder

IDS = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(3))


def said(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def grown(spread: float):
    """A mixture whose experts are `spread` away from being alike."""
    stage_one = single_lora(Holder())
    for name, parameter in stage_one.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.manual_seed(1)
    model = mixture(Holder(), 4, lora_state(stage_one))
    for module in model.modules():
        if isinstance(module, MoeLoraLayer) and module.num_experts["default"]:
            with torch.no_grad():
                module.lora_B["default"] += spread * torch.randn_like(module.lora_B["default"])
    return model


@pytest.mark.parametrize("spread, left", [(0.0, 0.1), (0.05, 0.8)])
def test_it_keeps_what_experts_have_in_common_and_loses_what_only_a_choice_can_do(spread, left):
    """`left`: of the experts' change of what is said, how much may be lost; nearly nothing where they are alike."""
    model = grown(spread)
    wanted, without = said(model), said(Holder())
    single = one_lora(model, [{"input_ids": IDS}])
    off = (said(single) - wanted).norm() / (without - wanted).norm()
    assert off < left
    assert (off > 0.1) == (spread > 0)


def test_it_has_the_rank_that_a_token_met_before_and_ordinary_lora_stays():
    model = grown(0.05)
    of_q = {n: p.clone() for n, p in model.named_parameters() if "q_proj" in n and "lora_" in n}
    single = one_lora(model, [{"input_ids": IDS}])
    layers = {n: m for n, m in single.named_modules() if isinstance(m, MoeLoraLayer)}
    of_experts = [m for n, m in layers.items() if n.rsplit(".", 1)[-1] in EXPERT_MODULES]
    assert {m.lora_A["default"].shape[0] for m in of_experts} == {2 * RANK}
    assert {m.num_experts["default"] for m in of_experts} == {1}
    kept = dict(single.named_parameters())
    assert of_q and all(torch.equal(kept[name], value) for name, value in of_q.items())


def test_no_lora_of_the_rank_is_nearer_over_the_tokens_read():
    """Against the truncated decomposition of the least-squares map itself, which takes no notice of the tokens."""
    torch.manual_seed(0)
    layer = next(m for m in grown(0.05).modules() if isinstance(m, MoeLoraLayer) and m.num_experts["default"])
    x = torch.randn(500, layer.in_features) * torch.logspace(-1, 1, layer.in_features)
    added = x @ torch.randn(layer.in_features, layer.out_features)
    fit = Added(layer)
    with torch.no_grad():
        fit(layer, (x,), layer.base_layer(x) + added)
    A, B = fit.closest(RANK)
    U, S, V = torch.linalg.svd(torch.linalg.lstsq(x, added).solution, full_matrices=False)
    plain = x @ (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    # Eckart and Young: what `added` itself cannot have in that rank.
    least = torch.linalg.svdvals(added)[RANK:].norm()
    off = (x @ A.T @ B.T - added).norm()
    assert off < 1.02 * least
    assert off < 0.9 * (plain - added).norm()
