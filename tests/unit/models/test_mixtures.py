"""Several LoRA adapters become one Arrow mixture, an X-LoRA loads; what cannot be mixed is refused in one sentence."""

import json

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mllm_demo.errors import AdapterError
from mllm_demo.models import loading, quantize
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import Token
from mllm_demo.settings import ModelChoice
from tests.unit.models.mixtures import CLASSIFIER, copy, save_lora, save_xlora

NEW = 4


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Sums are compared, so machines that would compute in bfloat16 do not."""
    monkeypatch.setattr(quantize, "compute_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def loras(checkpoint, tmp_path_factory):
    """Three adapters of rank 4 on the same modules."""
    return [save_lora(checkpoint, tmp_path_factory.mktemp("experts") / name, seed) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def xlora(checkpoint, loras, tmp_path_factory):
    return save_xlora(checkpoint, tmp_path_factory.mktemp("xlora") / "x", loras, layerwise_scalings=True)


def load(checkpoint, *adapters, quantization="none"):
    choice = ModelChoice(str(checkpoint), tuple(map(str, adapters)), quantization, "cpu")
    return loading.load(choice, None, lambda step: None)


def ids(loaded) -> torch.Tensor:
    return loaded.processor.tokenizer("what is this a cat", return_tensors="pt")["input_ids"]


def answer(loaded) -> torch.Tensor:
    given = ids(loaded)
    return loaded.model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
    )


def tokens(count: int) -> list[Token]:
    return [Token(number, "x", "text", "user", "prefill") for number in range(count)]


def heard(loaded):
    with RoutingTap(loaded.model) as tap:
        sequence = answer(loaded)
        return sequence, tap.trace(tokens(tap.positions))


def fails(words: str, checkpoint, *adapters, **options) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        load(checkpoint, *adapters, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")


# Arrow


def test_arrow_computes_what_peft_computes(checkpoint, loras, tmp_path):
    """Against `create_arrow_model` on a base whose other modules do not share the targets' names."""
    folders = [
        save_lora(checkpoint, tmp_path / str(seed), seed, target_modules=r".*language_model.*\.down_proj")
        for seed in range(3)
    ]
    ours = load(checkpoint, *folders)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    theirs = create_arrow_model(base, [str(folder) for folder in folders], ArrowConfig(top_k=3, rng_seed=0)).eval()
    with torch.inference_mode():
        expected = theirs(input_ids=ids(ours)).logits
        torch.testing.assert_close(ours.model(input_ids=ids(ours)).logits, expected)


def test_arrow_sits_where_the_adapters_do_and_nowhere_else(checkpoint, loras):
    """The vision tower has modules of the same last name, which `create_arrow_model` would take as well."""
    loaded = load(checkpoint, *loras)
    routers = [path for path, module in loaded.model.named_modules() if isinstance(module, ArrowLoraLinearLayer)]
    assert len(routers) == 4 and all("language_model" in path for path in routers)
    assert loaded.adapter_title == "a + b + c (Arrow, 3 LoRA experts, top-3, r=4)"
    assert loaded.adapter_revision.count("sha256:") == 3
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_weights_shown_are_those_that_arrow_multiplied_by(checkpoint, loras, quantization, count):
    """Sum over shown experts of weight * scale * B A x, computed here, is what Arrow added to the module's output."""
    loaded = load(checkpoint, *loras[:count], quantization=quantization)
    seen, handles = {}, []
    for path, module in loaded.model.get_base_model().named_modules():
        if isinstance(module, ArrowLoraLinearLayer):
            site = path.rsplit(".", 2)[0]
            handles.append(
                module.register_forward_hook(
                    lambda module, args, kwargs, output, site=site: seen.update({site: (args[0], kwargs, output)}),
                    with_kwargs=True,
                )
            )
    with RoutingTap(loaded.model) as tap, torch.no_grad():
        loaded.model(input_ids=ids(loaded))
        trace = tap.trace(tokens(tap.positions))
    for handle in handles:
        handle.remove()
    assert {site.name for site in trace.sites} == set(seen) and len(seen) == 4
    for site in trace.sites:
        assert (site.num_experts, site.num_experts_per_tok, site.granularity) == (count, count, "token")
        x, parts, output = seen[site.name]
        x = x.float()
        experts = torch.stack(
            [
                parts["scaling"][f"task_{e}"]
                * (x @ parts["lora_A"][f"task_{e}"].weight.float().T @ parts["lora_B"][f"task_{e}"].weight.float().T)
                for e in range(count)
            ],
            dim=-2,
        )[0]  # (T, E, out)
        weights = torch.tensor(trace.routing_weights[site.name].copy()).float()
        chosen = torch.tensor(trace.selected_experts[site.name].copy()).long()
        dense = torch.zeros(len(weights), count).scatter(1, chosen, weights)
        expected = torch.einsum("te,teo->to", dense, experts)
        # The trace keeps weights in half precision: 2^-11 of each term.
        torch.testing.assert_close(expected, output[0].float(), atol=2e-3 * float(experts.abs().max()), rtol=0)
        assert (trace.routing_weights[site.name][:, :-1] >= trace.routing_weights[site.name][:, 1:]).all()


def test_fewer_than_all_are_chosen_when_there_are_more_than_three(checkpoint, loras, tmp_path):
    loaded = load(checkpoint, *loras, save_lora(checkpoint, tmp_path / "d", 3))
    _, trace = heard(loaded)
    for site in trace.sites:
        assert (site.num_experts, site.num_experts_per_tok) == (4, 3)
        assert abs(trace.routing_weights[site.name].astype(float).sum(1) - 1).max() < 3e-3
        assert abs(trace.router_probs[site.name].astype(float).sum(1) - 1).max() < 3e-3


def test_sites_of_arrow_say_where_they_are(checkpoint, loras):
    sites = RoutingTap(load(checkpoint, *loras).model).sites
    assert [(site.layer_idx, site.block) for site in sites] == [
        (0, "attention"),
        (0, "mlp"),
        (1, "attention"),
        (1, "mlp"),
    ]


def test_an_arrow_mixture_that_is_switched_off_has_no_sites(checkpoint, loras):
    model = load(checkpoint, *loras).model
    with model.disable_adapter():
        assert RoutingTap(model).sites == ()


def test_adapters_of_different_rank(checkpoint, loras, tmp_path):
    fails("have ranks 4 and 8", checkpoint, loras[0], save_lora(checkpoint, tmp_path / "r", 5, r=8))


def test_adapters_of_different_targets(checkpoint, loras, tmp_path):
    other = save_lora(checkpoint, tmp_path / "t", 5, target_modules=r".*language_model.*\.q_proj")
    fails("adapt different modules .*down_proj", checkpoint, loras[0], other)


def test_adapters_of_different_bases(checkpoint, loras, tmp_path):
    other = copy(loras[1], tmp_path / "width")
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :7].contiguous()
    save_file(tensors, other / "adapter_model.safetensors")
    fails("different base models", checkpoint, loras[0], other)


def test_a_mixture_of_what_is_not_lora(checkpoint, loras, moe_lora, xlora):
    fails("of type MOE_LORA, not LoRA", checkpoint, loras[0], moe_lora)
    fails("of type XLORA, not LoRA", checkpoint, loras[0], xlora)


@pytest.mark.parametrize(
    ("changes", "words"), [({"use_dora": True}, "DoRA"), ({"bias": "lora_only"}, "trained biases")]
)
def test_a_mixture_of_more_than_plain_lora(checkpoint, loras, tmp_path, changes, words):
    other = copy(loras[1], tmp_path / "more")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    fails(f"has {words}; only plain LoRA", checkpoint, loras[0], other)


def test_a_mixture_of_which_one_is_missing(checkpoint, loras, tmp_path):
    fails("nowhere does not exist", checkpoint, loras[0], tmp_path / "nowhere")


def test_a_mixture_for_modules_that_the_base_lacks(checkpoint, loras, tmp_path):
    others = []
    for folder in loras[:2]:
        other = copy(folder, tmp_path / folder.name)
        tensors = load_file(other / "adapter_model.safetensors")
        tensors.update({key.replace(".layers.1.", ".layers.9."): value.clone() for key, value in tensors.items()})
        save_file(tensors, other / "adapter_model.safetensors")
        others.append(other)
    fails("no place for 2 of its modules.*layers.9", checkpoint, *others)


# X-LoRA


def test_an_xlora_adapter_tells_what_it_is(checkpoint, xlora):
    loaded = load(checkpoint, xlora)
    assert loaded.adapter_title == "x (X-LoRA, 3 LoRA experts, top-3)"
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_weights_shown_are_those_that_xlora_multiplied_by(checkpoint, xlora, quantization):
    """What each module added to its base layer's output, again from the trace, in the second pass over the model."""
    loaded = load(checkpoint, xlora, quantization=quantization)
    seen, handles = {}, []
    for path, module in loaded.model.get_base_model().named_modules():
        owner = getattr(getattr(module, "forward", None), "__self__", None)
        if isinstance(owner, XLoraLinearLayer):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, kwargs, output, path=path: seen.update({path: (module, args[0], output)}),
                    with_kwargs=True,
                )
            )
    with RoutingTap(loaded.model) as tap, torch.no_grad():
        loaded.model(input_ids=ids(loaded))
        trace = tap.trace(tokens(tap.positions))
    for handle in handles:
        handle.remove()
    assert {site.name for site in trace.sites} == set(seen) and len(seen) == 4
    assert [site.layer_idx for site in trace.sites] == [0, 0, 1, 1]
    for site in trace.sites:
        layer, x, output = seen[site.name]
        with torch.no_grad():
            base = layer.base_layer(x).float()
            experts = torch.stack(
                [layer.scaling[e] * layer.lora_B[e](layer.lora_A[e](x.float())) for e in ("0", "1", "2")], dim=-2
            )[0]
        weights = torch.tensor(trace.routing_weights[site.name].copy()).float()
        chosen = torch.tensor(trace.selected_experts[site.name].copy()).long()
        dense = torch.zeros(len(weights), 3).scatter(1, chosen, weights)
        expected = torch.einsum("te,teo->to", dense, experts)
        assert expected.abs().max() > 0.05 * experts.abs().max()
        # The trace keeps weights in half precision: 2^-11 of each term.
        torch.testing.assert_close(expected, (output.float() - base)[0], atol=2e-3 * float(experts.abs().max()), rtol=0)


def test_one_decision_for_all_modules_is_one_site(checkpoint, loras, tmp_path):
    loaded = load(checkpoint, save_xlora(checkpoint, tmp_path / "one", loras, layerwise_scalings=False, top_k_lora=2))
    _, trace = heard(loaded)
    (site,) = trace.sites
    assert (site.layer_idx, site.block, site.granularity) == (-1, "model", "token")
    assert (site.num_experts, site.num_experts_per_tok) == (3, 2)
    scalings = loaded.model.base_model.internal_xlora_scalings[0, :, 0].float()
    chosen = torch.tensor(trace.selected_experts[site.name].copy()).long()
    assert torch.equal(chosen, scalings.topk(2, dim=-1).indices)
    weights = torch.tensor(trace.routing_weights[site.name].copy()).float()
    torch.testing.assert_close(weights, scalings.gather(1, chosen), atol=1e-3, rtol=0)


def test_xlora_reads_twice_and_without_a_cache_but_every_position_is_there_once(checkpoint, xlora):
    loaded = load(checkpoint, xlora)
    sequence, trace = heard(loaded)
    assert len(trace.tokens) == sequence.shape[1] - 1
    with RoutingTap(loaded.model) as tap, torch.no_grad():
        loaded.model(input_ids=sequence[:, :-1], use_cache=False)
        whole = tap.trace(tokens(tap.positions))
    for site in trace.sites:
        assert (trace.selected_experts[site.name] == whole.selected_experts[site.name]).all()
        # Half precision keeps 11 bits; a shorter sequence sums in another order.
        assert abs(trace.router_probs[site.name].astype(float) - whole.router_probs[site.name]).max() < 1e-3


def test_experts_are_found_under_any_name(checkpoint, loras, xlora, tmp_path):
    folder = copy(xlora, tmp_path / "named")
    config = json.loads((folder / "adapter_config.json").read_text())
    names = {"reading": "0", "counting": "1", "naming": "2"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "adapters": dict.fromkeys(names, "/elsewhere")}))
    with torch.no_grad():
        plain, named = load(checkpoint, xlora), load(checkpoint, folder)
        expected = plain.model(input_ids=ids(plain)).logits
        assert torch.equal(expected, named.model(input_ids=ids(named)).logits)
    for name, number in names.items():
        (folder / number).rename(folder / name)
    renamed = load(checkpoint, folder)
    with torch.no_grad():
        assert torch.equal(expected, renamed.model(input_ids=ids(renamed)).logits)


def test_an_xlora_without_its_classifier(checkpoint, xlora, tmp_path):
    folder = copy(xlora, tmp_path / "bare")
    save_file({}, folder / "adapter_model.safetensors")
    fails(f"lacks {CLASSIFIER}layers.0.weight", checkpoint, folder)


def test_an_xlora_without_one_of_its_experts(checkpoint, xlora, tmp_path):
    folder = copy(xlora, tmp_path / "lost")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["adapters"] = dict.fromkeys(config["adapters"], "/elsewhere")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "1").rename(folder / "gone")
    fails("Expert 1 of X-LoRA adapter .*lost is not in its folder", checkpoint, folder)


def test_an_xlora_whose_expert_lacks_a_tensor(checkpoint, xlora, tmp_path):
    folder = copy(xlora, tmp_path / "partial")
    tensors = load_file(folder / "1" / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "1" / "adapter_model.safetensors")
    fails("Expert 1 of X-LoRA adapter partial", checkpoint, folder)


def test_an_xlora_of_another_width(checkpoint, xlora, tmp_path):
    folder = copy(xlora, tmp_path / "width")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    fails("load the base it was trained on", checkpoint, folder)


# Both


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["arrow", "xlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_with_the_tap_and_without(checkpoint, loras, xlora, quantization, kind, dtype, monkeypatch):
    monkeypatch.setattr(quantize, "compute_dtype", lambda device: dtype)
    loaded = load(checkpoint, *(loras if kind == "arrow" else [xlora]), quantization=quantization)
    without = answer(loaded)
    listened, trace = heard(loaded)
    assert torch.equal(without, listened)
    assert len(trace.tokens) == listened.shape[1] - 1


def test_arrow_keeps_the_cache(checkpoint, loras):
    loaded = load(checkpoint, *loras)
    lengths = []
    root = loaded.model.get_base_model()
    handle = root.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    heard(loaded)
    handle.remove()
    assert lengths == [ids(loaded).shape[1]] + [1] * (NEW - 1)
