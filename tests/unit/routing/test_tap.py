"""The tap hears every router at every position, and the model answers as if nobody listened."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mllm_demo.errors import TraceError
from mllm_demo.moe_lora import MoeLoraConfig, MoeLoraRouter
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import Token, TraceImage

PROMPT = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])
NEW = 6
MLP = ["gate_proj", "up_proj", "down_proj"]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def routed(**changes):
    experts = {
        "r": 2,
        "num_experts": 4,
        "target_modules": ["o_proj", *MLP],
        "init_lora_weights": False,
        **changes,
    }
    torch.manual_seed(1)
    model = get_peft_model(base(), MoeLoraConfig(**experts))
    for router in routers(model):
        torch.nn.init.normal_(router.weight)
    return model.eval()


def routers(model) -> list[MoeLoraRouter]:
    return [module for module in model.modules() if isinstance(module, MoeLoraRouter)]


def answer(model, **changes):
    return model.generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        **{
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            **changes,
        },
    )


def tokens(count: int) -> list[Token]:
    return [Token(number, "x", "text", "user", "prefill") for number in range(count)]


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_and_logits_are_the_same_with_the_tap_and_without(sampled):
    model = routed()
    torch.manual_seed(5)
    without = answer(model, do_sample=sampled)
    torch.manual_seed(5)
    with RoutingTap(model):
        listened = answer(model, do_sample=sampled)
    assert torch.equal(without.sequences, listened.sequences)
    assert all(torch.equal(a, b) for a, b in zip(without.logits, listened.logits, strict=True))


def test_positions_are_the_prompt_and_every_token_read_one_by_one():
    model = routed()
    lengths = []
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with RoutingTap(model) as tap:
        answer(model)
    handle.remove()
    assert lengths == [PROMPT.shape[1]] + [1] * (NEW - 1)
    assert tap.positions == PROMPT.shape[1] + NEW - 1


@pytest.mark.parametrize("scope", ["module", "block", "layer", "model"])
@pytest.mark.parametrize("k", [1, 2])
def test_what_was_recorded_step_by_step_equals_one_forward_without_a_cache(scope, k):
    model = routed(router_scope=scope, num_experts_per_tok=k)
    with RoutingTap(model) as tap:
        sequence = answer(model).sequences[:, :-1]
        trace = tap.trace(tokens(tap.positions))
    expected = {}
    handles = [
        router.register_forward_hook(lambda module, args, output: expected.update({module.site_name: output}))
        for router in routers(model)
    ]
    with torch.no_grad():
        model(input_ids=sequence, use_cache=False)
    for handle in handles:
        handle.remove()
    assert {site.name for site in trace.sites} == set(expected)
    for site in trace.sites:
        probs, selected, weights = (
            torch.tensor(array[site.name].copy())
            for array in (trace.router_probs, trace.selected_experts, trace.routing_weights)
        )
        # 1e-3: half precision keeps 11 bits of a probability.
        assert torch.allclose(probs.float(), expected[site.name].router_probs[0], atol=1e-3)
        assert torch.equal(selected.long(), expected[site.name].selected_experts[0])
        assert torch.allclose(weights.float(), expected[site.name].routing_weights[0], atol=1e-3)


def test_sites_say_where_they_are():
    sites = RoutingTap(routed(num_experts_per_tok=2)).sites
    assert len(sites) == 3 * 4
    assert {site.layer_idx for site in sites} == {0, 1, 2}
    assert sum(site.block == "attention" for site in sites) == 3
    assert all(site.num_experts == 4 and site.num_experts_per_tok == 2 for site in sites)


def test_one_choice_for_the_sequence_is_written_at_every_position():
    model = routed(granularity="sequence")
    with RoutingTap(model) as tap:
        answer(model)
        trace = tap.trace(tokens(tap.positions))
    for site in trace.sites:
        assert site.granularity == "sequence"
        assert (trace.selected_experts[site.name] == trace.selected_experts[site.name][0]).all()
        assert (trace.router_probs[site.name] == trace.router_probs[site.name][0]).all()


def test_the_trace_carries_what_it_is_given():
    model = routed()
    with RoutingTap(model) as tap:
        answer(model)
        given = tokens(tap.positions)
        trace = tap.trace(given, [TraceImage(b"x", 2, 3)], {"seed": 4})
    assert trace.tokens == tuple(given) and trace.images[0].width == 2 and trace.provenance == {"seed": 4}


def test_a_live_trace_grows_and_earlier_ones_stay_as_they_were():
    model = routed()
    live = []
    with RoutingTap(model) as tap, torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
        live.append(tap.trace(tokens(tap.positions)))
        kept = {name: array.copy() for name, array in live[0].router_probs.items()}
        model(input_ids=torch.arange(300)[None] % 48, past_key_values=cache, use_cache=True)
        live.append(tap.trace(tokens(tap.positions)))
    assert [len(trace.tokens) for trace in live] == [7, 307]
    for name, array in kept.items():
        assert (live[0].router_probs[name] == array).all()
        assert (live[1].router_probs[name][:7] == array).all()


def test_a_trace_needs_as_many_tokens_as_positions():
    model = routed()
    with RoutingTap(model) as tap:
        answer(model)
        with pytest.raises(TraceError, match=f"11 tokens were given for {tap.positions} recorded positions"):
            tap.trace(tokens(11))


def test_a_router_that_stays_silent_is_an_error_that_names_it():
    model = routed()
    down = model.get_base_model().model.layers[1].mlp.down_proj
    with RoutingTap(model) as tap, torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
        tap.trace(tokens(7))
        # The step runs the frozen layer in place of the adapted one.
        model.get_base_model().model.layers[1].mlp.down_proj = down.get_base_layer()
        model(input_ids=PROMPT[:, :1], past_key_values=cache, use_cache=True)
        model.get_base_model().model.layers[1].mlp.down_proj = down
        with pytest.raises(
            TraceError, match=r"'model\.layers\.1\.mlp\.down_proj' has reported nothing for position 7"
        ):
            tap.trace(tokens(8))
        model(input_ids=PROMPT[:, :1], past_key_values=cache, use_cache=True)
        with pytest.raises(TraceError, match="position 7"):
            tap.trace(tokens(9))


def test_no_hook_outlives_the_with():
    model = routed()
    before = hooks(model)
    tap = RoutingTap(model)
    assert hooks(model) == before
    with tap:
        assert hooks(model) > before
        answer(model)
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="stop"), tap:
        raise RuntimeError("stop")
    assert hooks(model) == before


def test_a_forward_that_fails_leaves_no_rows_and_the_next_one_is_whole():
    model = routed()
    boom = model.get_base_model().model.layers[2]

    def fail(module, args):
        raise RuntimeError("boom")

    with RoutingTap(model) as tap, torch.no_grad():
        model(input_ids=PROMPT)
        handle = boom.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            model(input_ids=PROMPT)
        handle.remove()
        assert tap.positions == 7
        model(input_ids=PROMPT[:, :2])
        trace = tap.trace(tokens(9))
    name = trace.sites[0].name
    assert (trace.selected_experts[name][:2] == trace.selected_experts[name][7:]).all()


def test_a_second_use_starts_afresh_and_a_nested_one_is_refused():
    model = routed()
    with RoutingTap(model) as tap:
        answer(model)
        with pytest.raises(TraceError, match="already recording"), tap:
            pass
        assert tap.trace(tokens(tap.positions)).tokens
    with tap, torch.no_grad():
        assert tap.positions == 0
        model(input_ids=PROMPT)
        assert len(tap.trace(tokens(7)).tokens) == 7


def test_two_taps_hear_the_same():
    model = routed()
    with RoutingTap(model) as outer, RoutingTap(model) as inner:
        answer(model)
    assert outer.trace(tokens(outer.positions)).equals(inner.trace(tokens(inner.positions)))


def test_more_than_one_sequence_is_refused():
    with RoutingTap(model := routed()) as tap, torch.no_grad():
        with pytest.raises(TraceError, match="not for a batch of 2"):
            model(input_ids=PROMPT.repeat(2, 1))
        assert tap.positions == 0


def test_embeddings_in_place_of_ids_are_counted_too():
    model = routed(granularity="sequence")
    with RoutingTap(model) as tap, torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(PROMPT))
    assert tap.positions == 7


@pytest.mark.parametrize(
    "model", [base(), get_peft_model(base(), LoraConfig(target_modules=MLP))], ids=["base", "lora"]
)
def test_a_model_without_routers_has_no_sites_and_no_trace(model):
    with RoutingTap(model) as tap, torch.no_grad():
        model(input_ids=PROMPT)
        assert tap.sites == () and tap.positions == 7
        with pytest.raises(TraceError, match="this model has no router"):
            tap.trace(tokens(7))


def test_only_active_adapters_are_heard():
    model = routed(target_modules=MLP)
    model.add_adapter("other", MoeLoraConfig(r=2, num_experts=2, target_modules=["o_proj"]))
    assert {site.num_experts for site in RoutingTap(model).sites} == {4}
    model.set_adapter("other")
    tap = RoutingTap(model)
    assert [site.num_experts for site in tap.sites] == [2] * 3
    with tap:
        answer(model)
    assert tap.trace(tokens(tap.positions)).num_layers == 3
    with model.disable_adapter():
        assert RoutingTap(model).sites == ()


def test_two_active_adapters_are_told_apart():
    model = routed(target_modules=["o_proj"])
    model.add_adapter("other", MoeLoraConfig(r=2, num_experts=2, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with RoutingTap(model) as tap, torch.no_grad():
        model(input_ids=PROMPT)
    trace = tap.trace(tokens(7))
    assert len(trace.sites) == 6
    assert trace.site("model.layers.0.self_attn.o_proj.other").num_experts == 2
