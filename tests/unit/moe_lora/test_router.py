"""What a router returns, what is known about its site, and how often it is asked."""

import pytest
import torch

from mllm_demo.moe_lora import MoeLoraConfig, MoeLoraRouter, RouterOutput


def tap(model):
    """Records every router's outputs by site, as an observer would: a forward hook found by type."""
    outputs = {}
    for module in model.modules():
        if isinstance(module, MoeLoraRouter):
            module.register_forward_hook(lambda m, _, out: outputs.setdefault(m.site_name, []).append(out))
    return outputs


@pytest.mark.parametrize("k", (1, 2, 3))
@pytest.mark.parametrize("shared", (None, "constant", "complement"))
def test_output_shapes_and_meaning(k, shared):
    config = MoeLoraConfig(
        num_experts=3,
        num_experts_per_tok=k,
        use_shared_expert=shared is not None,
        shared_expert_weighting=shared or "constant",
    )
    router = MoeLoraRouter(config, in_features=5).eval()
    output = router(torch.randn(2, 4, 5, dtype=torch.bfloat16))

    assert isinstance(output, RouterOutput)
    assert [tuple(t.shape) for t in output] == [(2, 4, n) for n in (3, 3, k, k, 3 + (shared is not None))]
    assert output.selected_experts.dtype == torch.int64
    assert all(t.dtype == torch.float32 for t in output if t is not output.selected_experts)
    torch.testing.assert_close(output.router_probs, output.router_logits.softmax(-1))
    torch.testing.assert_close(
        output.gate[..., :3].gather(-1, output.selected_experts), output.routing_weights
    )
    assert (output.gate[..., :3] != 0).sum(-1).eq(k).all()
    top = output.router_probs.max(-1).values
    expected = output.router_probs.gather(-1, output.selected_experts)
    if shared == "complement":
        expected = expected * top[..., None]
        torch.testing.assert_close(output.gate[..., 3], 1 - top)
    elif shared == "constant":
        assert output.gate[..., 3].eq(1).all()
    torch.testing.assert_close(output.routing_weights, expected)


def test_computes_in_float32_under_autocast_and_after_a_cast():
    router = MoeLoraRouter(MoeLoraConfig(), in_features=8).eval()
    z = torch.randn(1, 3, 8)
    expected = router(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(router(z).router_logits, expected.router_logits, rtol=0, atol=0)
    assert router.to(torch.bfloat16)(z.bfloat16()).router_logits.dtype == torch.float32


def test_scale_of_the_input_matters_only_without_the_norm():
    z = torch.randn(1, 3, 8)
    for norm, same in (("rms", True), ("none", False)):
        router = MoeLoraRouter(MoeLoraConfig(router_norm=norm), in_features=8).eval()
        assert torch.allclose(router(z).router_logits, router(9 * z).router_logits, atol=1e-6) is same


def test_zero_input_gives_equal_probabilities_and_finite_gradients():
    router = MoeLoraRouter(MoeLoraConfig(), in_features=8)
    z = torch.zeros(1, 2, 8, requires_grad=True)
    output = router(z)
    output.routing_weights.sum().backward()
    torch.testing.assert_close(output.router_probs, torch.full((1, 2, 4), 0.25))
    assert torch.isfinite(z.grad).all()


def test_noise_only_while_training():
    router = MoeLoraRouter(MoeLoraConfig(router_noise_std=1.0), in_features=8)
    z = torch.randn(1, 3, 8)
    assert not torch.equal(router(z).router_logits, router(z).router_logits)
    router.eval()
    assert torch.equal(router(z).router_logits, router(z).router_logits)


def test_bias_moves_the_choice():
    router = MoeLoraRouter(MoeLoraConfig(router_bias=True), in_features=8).eval()
    with torch.no_grad():
        router.bias[2] = 100.0
    assert router(torch.randn(1, 3, 8)).selected_experts.eq(2).all()


@pytest.mark.parametrize(
    ("scope", "sites"),
    [
        (
            "module",
            [("model.layers.0.self_attn.o_proj", 0, "attention"), ("model.layers.0.mlp.gate_proj", 0, "mlp")],
        ),
        ("block", [("model.layers.0.self_attn", 0, "attention"), ("model.layers.0.mlp", 0, "mlp")]),
        ("layer", [("model.layers.0", 0, "layer"), ("model.layers.1", 1, "layer")]),
        ("model", [("model.layers", 0, "model")]),
    ],
)
def test_sites_describe_themselves(moe_llama, scope, sites):
    routers = moe_llama(router_scope=scope).base_model.routers()
    assert [(r.site_name, r.layer_idx, r.block) for r in routers][: len(sites)] == sites
    assert len(routers) == {"module": 8, "block": 4, "layer": 2, "model": 1}[scope]
    assert len({r.site_name for r in routers}) == len(routers)
    assert {(r.num_experts, r.num_experts_per_tok, r.has_shared_expert) for r in routers} == {(3, 1, True)}
    assert {(r.granularity, r.adapter_name) for r in routers} == {("token", "default")}


@pytest.mark.parametrize("scope", ("module", "block", "layer", "model"))
@pytest.mark.parametrize("granularity", ("token", "sequence", "modality"))
def test_each_router_runs_once_per_forward_also_while_decoding(moe_llama, input_ids, scope, granularity):
    model = moe_llama(router_scope=scope, granularity=granularity)
    outputs = tap(model)
    model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=3, do_sample=False
    )

    tokens = 1 if granularity == "sequence" else 6
    assert len(outputs) == len(model.base_model.routers())
    for steps in outputs.values():
        assert [step.router_probs.shape[1] for step in steps] == [tokens, 1, 1]
        if granularity == "sequence":
            assert torch.equal(steps[0].selected_experts, steps[2].selected_experts)
            assert torch.equal(steps[0].routing_weights, steps[2].routing_weights)


def test_a_hook_may_replace_the_decision(moe_llama, input_ids):
    model = moe_llama(target_modules=["down_proj"], plain_target_modules=None)

    def force_expert_1(router, _, output):
        selected = torch.full_like(output.selected_experts, 1)
        weights = output.router_probs.gather(-1, selected)
        return router.build_output(output.router_logits, output.router_probs, selected, weights)

    free = model(input_ids=input_ids).logits
    handles = [r.register_forward_hook(force_expert_1) for r in model.base_model.routers()]
    outputs = tap(model)
    forced = model(input_ids=input_ids).logits
    for handle in handles:
        handle.remove()

    assert all(step.selected_experts.eq(1).all() for steps in outputs.values() for step in steps)
    assert not torch.allclose(forced, free)
    assert torch.equal(model(input_ids=input_ids).logits, free)
