"""State around a forward: balance loss, checkpointing, prompts kept while decoding, nothing left behind."""

import pytest
import torch
from peft import get_peft_model

from mllm_demo.moe_lora import MoeLoraRouter


def naive_aux_loss(outputs, mask):
    """Switch Transformer, eq. 4-6, over tokens that are not padding, one by one."""
    losses = []
    for output in outputs:
        num_experts, k = output.router_probs.shape[-1], output.selected_experts.shape[-1]
        f, p, count = [0.0] * num_experts, [0.0] * num_experts, 0
        for row in range(mask.shape[0]):
            for t in range(mask.shape[1]):
                if mask[row, t]:
                    count += 1
                    for e in range(num_experts):
                        p[e] += output.router_probs[row, t, e].item()
                        f[e] += (output.selected_experts[row, t] == e).sum().item() / k
        losses.append(num_experts * sum(f[e] / count * p[e] / count for e in range(num_experts)))
    return sum(losses) / len(losses)


def kept_tensors(model):
    """Everything the routing state holds that is a tensor."""
    found = []
    for sites in model.base_model._sites.values():
        for site in sites:
            found += [site.leader, site.rank_gate, site.recorded]
    return [value for value in found if value is not None]


@pytest.mark.parametrize("k", (1, 2))
@pytest.mark.parametrize("padded", (False, True))
def test_aux_loss_equals_naive(moe_llama, input_ids, k, padded):
    model = moe_llama(num_experts_per_tok=k).train()
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :2] = 0
    outputs = []
    handles = [
        m.register_forward_hook(lambda _, __, out: outputs.append(out))
        for m in model.modules()
        if isinstance(m, MoeLoraRouter)
    ]
    model(input_ids=input_ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    loss = model.base_model.router_aux_loss()

    assert loss.item() == pytest.approx(naive_aux_loss(outputs, mask), rel=1e-5)
    loss.backward()
    assert all(r.weight.grad.abs().max() > 0 for r in model.base_model.routers())
    with pytest.raises(RuntimeError, match="There is no balance loss"):
        model.base_model.router_aux_loss()


def test_aux_loss_is_one_when_balanced_and_takes_the_given_mask(moe_llama, input_ids):
    model = moe_llama(num_experts_per_tok=3).train()
    model(input_ids=input_ids)
    assert model.base_model.router_aux_loss().item() == pytest.approx(1.0, abs=1e-6)

    model = moe_llama().train()
    mask = torch.ones_like(input_ids)
    mask[:, :2] = 0
    model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    everything = model.base_model.router_aux_loss()
    with model.base_model.routing_context(attention_mask=mask):
        model(input_ids=input_ids)
    assert model.base_model.router_aux_loss() != everything


def test_nothing_is_kept_in_eval_or_without_gradients(moe_llama, input_ids):
    model = moe_llama()
    model(input_ids=input_ids)
    with pytest.raises(RuntimeError, match="There is no balance loss"):
        model.base_model.router_aux_loss()
    with torch.no_grad():
        model.train()(input_ids=input_ids)
    assert kept_tensors(model) == []


@pytest.mark.parametrize("scope", ("module", "block", "layer", "model"))
@pytest.mark.parametrize("router_input", ("hidden", "prompt_mean"))
def test_gradient_checkpointing_gives_the_same_gradients(moe_llama, input_ids, scope, router_input):
    gradients = []
    for checkpointing in (False, True):
        model = moe_llama(
            router_scope=scope, router_input=router_input, router_noise_std=0.1, lora_dropout=0.1
        ).train()
        calls = []
        model.base_model.routers()[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        (loss + 0.1 * model.base_model.router_aux_loss()).backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and "lora_" in n})
        with pytest.raises(RuntimeError, match="no balance loss"):  # the recomputation recorded nothing
            model.base_model.router_aux_loss()

    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_behind(moe_llama, input_ids):
    model = moe_llama(router_scope="model")
    expected = model(input_ids=input_ids).logits
    broken = model.base_model.model.model.layers[1].mlp
    original, broken.forward = broken.forward, lambda x: 1 / 0
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ZeroDivisionError):
            model.train(grad)(input_ids=input_ids)
        assert kept_tensors(model) == []
        assert not model.base_model._state.in_forward
    broken.forward = original
    assert torch.equal(model.eval()(input_ids=input_ids).logits, expected)


def test_routing_context_ends_with_its_with(moe_llama, input_ids):
    model = moe_llama(granularity="modality")
    ids = torch.ones_like(input_ids)
    with pytest.raises(ZeroDivisionError), model.base_model.routing_context(modality_ids=ids):
        with model.base_model.routing_context(attention_mask=ids):
            assert set(model.base_model._state.given) == {"modality_ids", "attention_mask"}
        assert set(model.base_model._state.given) == {"modality_ids"}
        raise ZeroDivisionError
    assert model.base_model._state.given == {}


@torch.no_grad()
@pytest.mark.parametrize("router_input", ("hidden", "prompt_mean"))
def test_a_sequences_choice_is_made_at_prefill_and_kept(moe_llama, input_ids, router_input):
    model = moe_llama(router_input=router_input, granularity="sequence")
    outputs = []
    router = model.base_model.routers()[-1]
    router.register_forward_hook(lambda _, __, out: outputs.append(out.router_probs))

    step = model(input_ids=input_ids, use_cache=True)
    for _ in range(2):
        step = model(input_ids=input_ids[:, :1], past_key_values=step.past_key_values, use_cache=True)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    model(input_ids=input_ids[:, 3:])
    assert not torch.allclose(outputs[3], outputs[0])
    model(input_ids=input_ids[:, :1])  # a prompt of one token is a prefill too
    assert not torch.allclose(outputs[4], outputs[3])


@torch.no_grad()
def test_a_decode_step_without_prefill_is_an_error(llama, moe_llama, input_ids):
    cache = llama()(input_ids=input_ids, use_cache=True).past_key_values
    for router_input, message in (("hidden", "before any prefill"), ("prompt_mean", "no prompt was seen")):
        model = moe_llama(router_input=router_input, granularity="sequence")
        with pytest.raises(RuntimeError, match=message):
            model(input_ids=input_ids[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("router_input", ("hidden", "prompt_mean"))
def test_left_padding_does_not_change_a_sequences_choice(moe_llama, input_ids, router_input):
    model = moe_llama(router_input=router_input, granularity="sequence", router_scope="layer")
    router, outputs = model.base_model.routers()[0], []
    router.register_forward_hook(lambda _, __, out: outputs.append(out.router_probs))
    padded = torch.cat((torch.zeros_like(input_ids[:, :2]), input_ids), dim=1)
    mask = (padded != 0).long()

    model(input_ids=input_ids)
    model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_prompt_mask_hides_the_answer(moe_llama, input_ids):
    model = moe_llama(router_input="prompt_mean")
    router, outputs = model.base_model.routers()[0], []
    router.register_forward_hook(lambda _, __, out: outputs.append(out.router_probs))
    prompt_mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    with model.base_model.routing_context(prompt_mask=prompt_mask):
        model(input_ids=input_ids)
    model(input_ids=input_ids[:, :3])
    torch.testing.assert_close(outputs[0], outputs[1])

    with (
        model.base_model.routing_context(prompt_mask=prompt_mask[:, :2]),
        pytest.raises(ValueError, match=r"must have shape \(2, 6\), got \(2, 2\)"),
    ):
        model(input_ids=input_ids)


@torch.no_grad()
def test_modality_comes_from_the_context_the_token_ids_or_an_error(moe_llama, input_ids):
    model = moe_llama(granularity="modality")
    outputs = []
    model.base_model.routers()[0].register_forward_hook(lambda _, __, out: outputs.append(out.router_logits))
    table = model.base_model.routers()[0].weight
    given = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 1, 1]])

    with model.base_model.routing_context(modality_ids=given):
        model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=2, do_sample=False
        )
    assert torch.equal(outputs[0], table[given])
    assert torch.equal(outputs[1], table[torch.zeros(2, 1, dtype=torch.long)])

    model.get_base_model().config.image_token_id = 7
    pictured = input_ids.clone()
    pictured[:, 2] = 7
    model(input_ids=pictured)
    assert torch.equal(outputs[2], table[(pictured == 7).long()])
    embeds = model.get_input_embeddings()(pictured)
    with pytest.raises(RuntimeError, match="modality is unknown; pass modality_ids"):
        model(inputs_embeds=embeds)
    with model.base_model.routing_context(modality_ids=(pictured == 7).long()):
        model(inputs_embeds=embeds)
    assert torch.equal(outputs[3], outputs[2])


@torch.no_grad()
def test_two_models_never_share_state(llama, moe_config, input_ids):
    first, second = (get_peft_model(llama(), moe_config(granularity="modality")) for _ in range(2))
    with first.base_model.routing_context(modality_ids=torch.ones_like(input_ids)):
        assert second.base_model._state.given == {}
    assert first.base_model._state is not second.base_model._state
