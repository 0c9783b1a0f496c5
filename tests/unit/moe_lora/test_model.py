"""MoE-LoRA behaves as any PEFT method does: wrap, save, load, switch, disable, delete, unload."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from mllm_demo.moe_lora import MoeLoraLayer


@torch.no_grad()
@pytest.mark.parametrize("scope", ("module", "block", "layer", "model"))
@pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
def test_saved_adapter_gives_bit_equal_logits(
    llama, moe_llama, input_ids, tmp_path, scope, low_cpu_mem_usage
):
    model = moe_llama(router_scope=scope, router_bias=True)
    expected = model(input_ids=input_ids).logits
    model.save_pretrained(tmp_path)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOE_LORA"
    assert all(".lora_" in name for name in tensors)
    assert sum("lora_router.weight" in name for name in tensors) == len(model.base_model.routers())
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(input_ids=input_ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_several_adapters_switch(llama, moe_llama, moe_config, randomized, input_ids, tmp_path):
    first, second = moe_llama(), moe_llama(num_experts=2, router_scope="layer", plain_target_modules=None)
    randomized(second, seed=9)
    base = llama()(input_ids=input_ids).logits
    a, b = first(input_ids=input_ids).logits, second(input_ids=input_ids).logits
    second.save_pretrained(tmp_path)

    first.load_adapter(tmp_path, "second")
    assert torch.equal(first(input_ids=input_ids).logits, a)
    first.set_adapter("second")
    assert torch.equal(first(input_ids=input_ids).logits, b)
    assert {r.adapter_name for r in first.base_model.routers()} == {"second"}
    with first.disable_adapter():
        assert torch.equal(first(input_ids=input_ids).logits, base)
    assert torch.equal(first(input_ids=input_ids).logits, b)

    first.add_adapter("third", moe_config())
    first.set_adapter("third")
    torch.testing.assert_close(first(input_ids=input_ids).logits, base)
    first.set_adapter("default")
    first.delete_adapter("third")
    first.delete_adapter("second")
    assert torch.equal(first(input_ids=input_ids).logits, a)
    assert not any("second" in name or "third" in name for name in first.state_dict())


@torch.no_grad()
def test_two_adapters_active_at_once_add_up(moe_llama, moe_config, randomized, input_ids):
    model = moe_llama(target_modules=["down_proj"], plain_target_modules=None, layers_to_transform=[1])
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    model.add_adapter("other", model.peft_config["default"].__class__(target_modules=["down_proj"], r=2))
    randomized(model, "other")
    x = torch.randn(1, 4, 24)
    outputs = {}
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        outputs[str(active)] = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(outputs["default"] + outputs["other"], outputs["['default', 'other']"])


def test_only_adapter_and_modules_to_save_train(llama, moe_config, input_ids, tmp_path):
    model = get_peft_model(llama(), moe_config(modules_to_save=["lm_head"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or "lm_head.modules_to_save" in name for name in trained)
    assert sum("lora_router" in name for name in trained) == 4
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        expected = model.eval()(input_ids=input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=input_ids).logits, expected)


def test_an_added_adapter_is_not_trained_until_it_is_active(moe_llama, moe_config):
    model = moe_llama()
    model.add_adapter("second", moe_config())
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second" in name)
    model.set_adapter("second")
    assert all(p.requires_grad for name, p in model.named_parameters() if ".second" in name)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default" in name)


def test_layers_and_exclusions_are_honoured(llama, moe_config):
    model = get_peft_model(llama(), moe_config(layers_to_transform=[1], exclude_modules=["up_proj"]))
    adapted = [
        name for name, module in model.get_base_model().named_modules() if isinstance(module, MoeLoraLayer)
    ]
    assert sorted(name.rpartition(".")[2] for name in adapted) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    )
    assert all(name.startswith("model.layers.1.") for name in adapted)
    regex = get_peft_model(
        llama(), moe_config(target_modules=r".*\.0\.mlp\..*_proj", plain_target_modules=None)
    )
    assert [r.site_name for r in regex.base_model.routers()] == ["model.layers.0.mlp"]


def test_a_module_cannot_be_both_plain_and_expert(llama, moe_config):
    with pytest.raises(ValueError, match="q_proj' matches both `target_modules` and `plain_target_modules`"):
        get_peft_model(llama(), moe_config(target_modules=["q_proj"]))


def test_a_refused_config_leaves_no_hook_on_the_base(llama, moe_config):
    base = llama()
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, moe_config(target_modules=["nothing"], plain_target_modules=None))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_merging_is_refused(moe_llama):
    model = moe_llama()
    for merge in (model.merge_adapter, model.merge_and_unload, model.unmerge_adapter):
        with pytest.raises(ValueError, match="MoE-LoRA cannot be merged"):
            merge()


@torch.no_grad()
def test_unload_returns_the_bare_base(llama, moe_llama, input_ids):
    base = moe_llama().unload()
    assert torch.equal(base(input_ids=input_ids).logits, llama()(input_ids=input_ids).logits)
    assert not any(isinstance(module, MoeLoraLayer) for module in base.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@torch.no_grad()
def test_a_deep_copy_is_independent(moe_llama, randomized, input_ids):
    model = moe_llama(router_input="prompt_mean")
    expected = model(input_ids=input_ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=input_ids).logits, expected)
    randomized(twin, seed=5)
    assert not torch.equal(twin(input_ids=input_ids).logits, expected)
    assert torch.equal(model(input_ids=input_ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("scope", ("module", "block", "layer", "model"))
def test_decoding_with_cache_equals_the_full_forward(moe_llama, input_ids, scope):
    # In float64: a float32 sum depends on the number of threads, and these random layers magnify it to 5e-5. Routers
    # stay in float32 all the same, and one row is summed in another order than six: 3e-5 on a processor with AVX512.
    model = moe_llama(router_scope=scope, num_experts_per_tok=2).double()
    full = model(input_ids=input_ids).logits
    cached = model(input_ids=input_ids[:, :3], use_cache=True)
    steps = [cached.logits]
    for t in range(3, 6):
        cached = model(
            input_ids=input_ids[:, t : t + 1], past_key_values=cached.past_key_values, use_cache=True
        )
        steps.append(cached.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-5)


class Mlp(nn.Module):
    """Defines its modules in another order than it runs them, and has no config, cache or layers."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(6, 4)
        self.up = nn.Linear(4, 6)

    def forward(self, x):
        return self.down(self.up(x))


def test_a_module_that_runs_before_the_routers_input_exists_is_an_error(moe_config):
    model = get_peft_model(Mlp(), moe_config(target_modules=["down", "up"], plain_target_modules=None))
    with pytest.raises(RuntimeError, match="expected 6 input features in the first module to run, got 4"):
        model(torch.randn(2, 3, 4))
    free = get_peft_model(
        Mlp(), moe_config(target_modules=["down", "up"], plain_target_modules=None, router_scope="module")
    )
    assert free(torch.randn(2, 3, 4)).shape == (2, 3, 4)
    assert free(torch.randn(5, 4)).shape == (5, 4)


@torch.no_grad()
def test_experts_start_as_copies_of_the_shared_one(moe_llama, input_ids):
    model = moe_llama(num_experts=3)
    model.base_model.copy_experts_from_shared()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    blocks_A = layer.lora_A["default"].unflatten(0, (4, 2))
    blocks_B = layer.lora_B["default"].unflatten(1, (4, 2))
    assert all(
        torch.equal(blocks_A[e], blocks_A[3]) and torch.equal(blocks_B[:, e], blocks_B[:, 3])
        for e in range(3)
    )
    model.base_model.copy_experts_from_shared(noise_std=0.1)
    assert not torch.equal(blocks_A[0], blocks_A[1])

    with pytest.raises(ValueError, match="needs a shared expert"):
        moe_llama(use_shared_expert=False).base_model.copy_experts_from_shared()
