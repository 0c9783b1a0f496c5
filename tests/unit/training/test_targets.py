"""Experts go on the linear layers of the language decoder and nowhere else, whatever a family calls them."""

import pytest
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from mllm_demo.errors import SettingsError
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.moe_lora.layer import MoeLoraLayer
from mllm_demo.training.targets import decoder_path, find_targets
from tests.unit.models.test_families import FAMILIES, LAYERS


@pytest.fixture(params=FAMILIES)
def model(request):
    return AutoModelForImageTextToText.from_config(FAMILIES[request.param]().config)


def test_experts_are_found_in_the_decoder_of_every_family(model):
    experts, plain = find_targets(model, None, None, "a model")
    inside = decoder_path(model) + "."
    adapted = get_peft_model(
        model, MoeLoraConfig(r=2, num_experts=3, target_modules=experts, plain_target_modules=plain)
    )
    found = {name: module for name, module in adapted.base_model.model.named_modules()
             if isinstance(module, MoeLoraLayer)}  # fmt: skip
    assert all(name.startswith(inside) for name in found)
    kinds = {routed: sorted(n.rsplit(".")[-1] for n, m in found.items() if (m.num_experts["default"] > 0) is routed)
             for routed in (True, False)}  # fmt: skip
    assert kinds[True] == sorted(["o_proj", "gate_proj", "up_proj", "down_proj"] * LAYERS)
    assert kinds[False] == sorted(["q_proj", "k_proj", "v_proj"] * LAYERS)


class OtherNames(nn.Module):
    """A decoder whose family has fused projections, beside a vision part with layers of the same names."""

    def __init__(self):
        super().__init__()

        def layer():
            parts = {"Wqkv": nn.Linear(4, 12), "dense": nn.Linear(4, 4), "fc1": nn.Linear(4, 8)}
            others = {"norm": nn.LayerNorm(4), "router": nn.Linear(4, 2)}
            return nn.ModuleDict({"mixer": nn.ModuleDict({**parts, **others})})

        self.eyes = nn.ModuleDict({"layers": nn.ModuleList([layer()])})
        self.mind = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()]), "top": nn.Linear(4, 4)})

    def get_decoder(self):
        return self.mind


def matching(pattern):
    config = MoeLoraConfig(target_modules=pattern, num_experts=2, r=1)
    adapted = get_peft_model(OtherNames(), config).base_model.model
    return {name for name, module in adapted.named_modules() if isinstance(module, MoeLoraLayer)}


def test_fused_projections_are_plain_and_routers_and_the_output_of_the_stack_are_left_alone():
    experts, plain = find_targets(OtherNames(), None, None, "a model")
    assert matching(experts) == {f"mind.layers.{n}.mixer.{name}" for n in range(2) for name in ("dense", "fc1")}
    assert matching(plain) == {f"mind.layers.{n}.mixer.Wqkv" for n in range(2)}


def test_named_layers_are_taken_as_named():
    experts, plain = find_targets(OtherNames(), ["fc1"], None, "a model")
    assert matching(experts) == {"mind.layers.0.mixer.fc1", "mind.layers.1.mixer.fc1"}
    assert plain is None


@pytest.mark.parametrize(
    ("wanted", "plain", "said"),
    [
        (["fc9"], None, "no linear layer 'fc9' in its language decoder; it has Wqkv, dense, fc1"),
        (["fc1"], ["fc1"], "name it in one of them"),
        (None, ["Wqkv", "dense", "fc1"], "has only Wqkv, dense, fc1, router"),
    ],
)
def test_names_that_cannot_be_used_are_answered_with_those_there_are(wanted, plain, said):
    with pytest.raises(SettingsError, match=said):
        find_targets(OtherNames(), wanted, plain, "a model")


def test_a_decoder_without_linear_layers_says_so():
    bare = OtherNames()
    bare.mind = nn.ModuleDict({"layers": nn.ModuleList([nn.Conv1d(2, 2, 1)])})
    with pytest.raises(SettingsError, match="no linear layers in its language decoder"):
        find_targets(bare, None, None, "a model")
