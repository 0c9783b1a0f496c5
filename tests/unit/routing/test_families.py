"""Routing of the MoE models of transformers: what the trace says is what the model did, family by family.

Half precision keeps 11 bits of a probability or weight: traces are compared within 2^-10 of the largest value.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mllm_demo.errors import TraceError
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.routing.native import ask, parts
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import RoutingTrace, Token
from tests.unit.routing.moe_families import EXPERTS, FAMILIES

IDS = torch.tensor([[3, 14, 15, 9, 20, 11, 30, 31, 12]])
HALF = 2.0**-10
NEW = 5


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    family = FAMILIES[request.param]()
    return SimpleNamespace(name=request.param, family=family, model=family.model())


def tokens(count: int) -> list[Token]:
    return [Token(number, "x", "text", "user", "prefill") for number in range(count)]


def traced(case, **more) -> RoutingTrace:
    with RoutingTap(case.model) as tap, torch.no_grad():
        case.output = case.model(input_ids=IDS, **case.family.inputs, **more)
        return tap.trace(tokens(IDS.shape[1]))


def arrays(trace: RoutingTrace, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(
        torch.tensor(kind[name].astype(dtype))
        for kind, dtype in (
            (trace.router_probs, np.float32),
            (trace.selected_experts, np.int64),
            (trace.routing_weights, np.float32),
        )
    )


def dense(selected: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(*weights.shape[:-1], experts).scatter(-1, selected, weights.float())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=HALF * max(1.0, theirs.abs().max().item()))


def test_every_router_of_the_language_model_is_a_site(case):
    tap = RoutingTap(case.model)
    assert len(tap.sites) == case.family.sites and tap.unread == ()
    assert {site.num_experts for site in tap.sites} == {case.family.experts}
    assert {site.has_shared_expert for site in tap.sites} == {case.family.shared}
    layers = case.model.config.get_text_config().num_hidden_layers
    assert [site.layer_idx for site in tap.sites] == list(range(layers - case.family.sites, layers))
    assert all(site.name in dict(case.model.named_modules()) for site in tap.sites)


# What the model returns as router logits, where it returns them.


def test_probabilities_are_those_of_the_router_logits_that_the_model_returns(case):
    trace = traced(case, output_router_logits=True)
    logits = getattr(case.output, "router_logits", None)
    if logits is None:
        pytest.skip("this class drops its router logits")
    assert len(logits) == len(trace.sites)
    for site, one in zip(trace.sites, logits, strict=True):
        one = one.reshape(IDS.shape[1], EXPERTS).float()
        if case.name == "gemma-4":  # calls its probabilities logits
            expected = one
        else:
            expected = one.sigmoid() if case.family.scores == "sigmoid" else one.softmax(-1)
        probs, selected, _ = arrays(trace, site.name)
        if site.num_experts != EXPERTS:  # experts of text, then experts of pictures
            vision = case.family.inputs["moe_mm_token_type_ids"][0].bool()
            assert (probs[vision, :EXPERTS] == 0).all() and (probs[~vision, EXPERTS:] == 0).all()
            assert ((selected >= EXPERTS) == vision[:, None]).all()
            probs = probs[:, :EXPERTS] + probs[:, EXPERTS:]
        close(probs, expected)


# What the blocks computed.


def blocks(case, trace: RoutingTrace):
    """(site, module that holds the experts)."""
    for site in trace.sites:
        module = case.model.get_submodule(site.name)
        yield site, module if hasattr(module, "text_moe") else case.model.get_submodule(site.name.rpartition(".")[0])


def one_by_one(experts: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_e w_e expert_e(x): each expert alone, with weight one, on all rows; `weights` [rows, E] are applied here."""
    total = torch.zeros_like(x)
    for expert in range(weights.shape[1]):
        index = torch.full((len(x), 1), expert)
        total += weights[:, expert : expert + 1] * experts(x, index, torch.ones(len(x), 1))
    return total


def llama4_one_by_one(experts: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Its experts take one batch each; the gates multiply what goes in."""
    return experts((x[None] * weights.T[:, :, None]).reshape(-1, x.shape[-1])).reshape(len(weights.T), *x.shape).sum(0)


def record(module: nn.Module, into: dict, name: str):
    def hook(module, args, kwargs, output):
        into[name] = (args, kwargs, output)

    return module.register_forward_hook(hook, with_kwargs=True)


def test_applying_the_trace_to_the_experts_gives_what_the_block_added(case):
    plain = FAMILIES[case.name]().model()  # another of the same weights, so that no hook is in the way
    seen: dict = {}
    trace = traced(case)
    handles = [record(plain.get_submodule(site.name), seen, site.name) for site in trace.sites]
    handles += [record(block, seen, f"{site.name}/block") for site, block in blocks(case_of(case, plain), trace)]
    for site, block in blocks(case_of(case, plain), trace):
        for name in ("experts", "text_moe.experts", "vision_moe.experts"):
            if name in dict(block.named_modules()):
                handles.append(record(block.get_submodule(name), seen, f"{site.name}/{name}"))
    with torch.no_grad():
        plain(input_ids=IDS, **case.family.inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for site, block in blocks(case_of(case, plain), trace):
            _, selected, weights = arrays(trace, site.name)
            table = dense(selected, weights, site.num_experts)
            ours, theirs = again(case.name, block, seen, site.name, table, case.family)
            assert theirs.abs().max() > 1e-3
            close(ours, theirs)


def case_of(case, model):
    return SimpleNamespace(name=case.name, family=case.family, model=model)


def again(name: str, block: nn.Module, seen: dict, site: str, table: torch.Tensor, family):
    """(ours, theirs) [rows, hidden]: what the routed experts of one block contribute, by the trace and by the model.

    Theirs is the block's output less what it gives when its routed experts give nothing.
    """
    if name == "ernie-4.5-vl":
        vision = family.inputs["moe_mm_token_type_ids"][0].bool()
        x = seen[site][0][0][0]
        theirs = routed(block, seen[f"{site}/block"], [block.text_moe.experts, block.vision_moe.experts])
        text = one_by_one(block.text_moe.experts, x, table[:, :EXPERTS])
        return torch.where(vision[:, None], one_by_one(block.vision_moe.experts, x, table[:, EXPERTS:]), text), theirs
    if name == "gemma-4":  # its block is the whole layer, which normalises the sum
        (x, _, _), _, theirs = seen[f"{site}/experts"]
        return one_by_one(block.experts, x, table), theirs
    theirs = routed(block, seen[f"{site}/block"], [block.experts])
    if name == "llama-4":
        return llama4_one_by_one(block.experts, seen[site][0][0], table), theirs
    if name == "muse-spark":  # experts of another width, between two projections
        x = seen[f"{site}/experts"][0][0]
        return block.post_expert_proj(one_by_one(block.experts, x, table)), theirs
    return one_by_one(block.experts, seen[f"{site}/experts"][0][0], table), theirs


def routed(block: nn.Module, call: tuple, experts: list[nn.Module]) -> torch.Tensor:
    args, kwargs, output = call
    handles = [one.register_forward_hook(lambda module, args, output: torch.zeros_like(output)) for one in experts]
    without = block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    pair = [one[0] if isinstance(one, tuple) else one for one in (output, without)]
    return (pair[0] - pair[1]).reshape(-1, pair[0].shape[-1])


def test_the_first_selected_expert_has_the_largest_weight(case):
    trace = traced(case)
    for site in trace.sites:
        weights = trace.routing_weights[site.name]
        if case.name != "gemma-4":  # in order of probability, before each expert's scale
            assert (np.diff(weights.astype(np.float32), axis=-1) <= 0).all()
        selected = trace.selected_experts[site.name]
        assert all(len(set(row)) == len(row) for row in selected.tolist())


# While answering.


def answer(model, family):
    more = {} if "moe_mm_token_type_ids" not in family.inputs else family.inputs
    return model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **more,
    )


def test_tokens_are_the_same_with_the_tap_and_the_cache_stays_on(case):
    lengths = []
    handle = case.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    without = answer(case.model, case.family)
    with RoutingTap(case.model) as tap:
        listened = answer(case.model, case.family)
        trace = tap.trace(tokens(tap.positions))
    handle.remove()
    assert torch.equal(without.sequences, listened.sequences)
    assert all(torch.equal(a, b) for a, b in zip(without.logits, listened.logits, strict=True))
    assert lengths == 2 * [IDS.shape[1], *[1] * (NEW - 1)]
    assert len(trace.tokens) == IDS.shape[1] + NEW - 1


# What is not known.


class Strange(nn.Module):
    """A router whose weights are no probabilities of its logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        logits = x @ self.weight.T
        weights, selected = torch.nn.functional.softplus(logits).sqrt().topk(2)
        return logits, weights, selected


def test_a_router_is_believed_only_if_its_weights_are_its_probabilities():
    torch.manual_seed(0)
    assert ask(Strange(), 0, 8) is None
    assert ask(nn.Linear(8, 4), 0, 8) is None
    assert parts(torch.zeros(3, 4), 0) is None


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


def test_experts_whose_router_cannot_be_read_are_reported_by_the_name_of_their_class(monkeypatch):
    model = mixtral()
    monkeypatch.setattr(type(model.model), "_can_record_outputs", {})
    with RoutingTap(model) as tap, torch.no_grad():
        model(input_ids=IDS)
    assert tap.sites == () and tap.unread == ("MixtralSparseMoeBlock",)
    with pytest.raises(TraceError, match="nothing here can read the routers of MixtralSparseMoeBlock"):
        tap.trace(tokens(9))


def test_a_dense_model_has_nothing_unread():
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    assert RoutingTap(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))).unread == ()


def test_experts_of_an_adapter_and_of_the_model_are_told_side_by_side():
    model = mixtral()

    adapted = get_peft_model(model, MoeLoraConfig(r=2, num_experts=2, target_modules=["o_proj"])).eval()
    with RoutingTap(adapted) as tap, torch.no_grad():
        adapted(input_ids=IDS)
    trace = tap.trace(tokens(9))
    assert {(site.block, site.num_experts) for site in trace.sites} == {("attention", 2), ("mlp", 4)}


def test_one_of_many_experts_and_weights_in_bfloat16_are_read():
    config = mixtral().config
    config.num_experts_per_tok = 1
    model = MixtralForCausalLM(config).bfloat16().eval()
    with RoutingTap(model) as tap, torch.no_grad():
        model(input_ids=IDS)
    assert [site.num_experts_per_tok for site in tap.trace(tokens(9)).sites] == [1, 1]
