"""Awaker2.5-VL's experts for every number of experts, k, with and without the shared one, pictures and videos: our
layers against a naive reading of the original's rules, expert by expert, from the original's own tensors.

float32 within 1e-5 of the largest value (the order of sums differs), gates within one unit of float16.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, DynamicCache

from mllm_demo.models import adapters
from mllm_demo.models.checkpoints import awaker
from mllm_demo.moe_lora import MoeLoraLayer
from tests.unit.models import tiny_awaker
from tests.unit.models.test_families import qwen2

MIXTURES = [(experts, shared) for experts in range(1, 7) for shared in (True, False)]
TEMPERATURE, ALPHA, R = 0.7, 6, 2


def build(folder, experts: int, topk: int, shared: bool):
    """Our model from the converted original, and the original's tensors."""
    state = tiny_awaker.state_dict(experts=experts, shared=shared, r=R)
    qwen2().config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config["moe"] = {"lora_alpha": ALPHA, "topk": topk, "gates_tmp": TEMPERATURE}
    (folder / "config.json").write_text(json.dumps(config))
    written = awaker.convert(folder, folder / "out", lambda step: None)
    base = AutoModelForImageTextToText.from_pretrained(written.base)
    return adapters.attach(base, written.adapter, "x").eval(), state


def naive_gates(state: dict, path: str, mean: torch.Tensor, topk: int) -> torch.Tensor:
    """float16 [experts] from the mean embedding [hidden] of one row."""
    normed = mean * torch.rsqrt(mean.pow(2).mean() + 1e-6) * state[f"{path}.ln.weight"]
    logits = state[f"{path}.w_gate.weight"] @ normed + state[f"{path}.w_gate.bias"]
    probs = torch.softmax((logits / TEMPERATURE).half(), dim=-1)
    gates = torch.zeros_like(probs)
    for index in probs.topk(topk).indices:
        gates[index] = probs[index]
    return gates


def naive_module(state: dict, path: str, x: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    """What the module returns for one row `x` [tokens, in]."""
    base = F.linear(x, state[f"{path}.weight"], state.get(f"{path}.bias"))

    def expert(kind: str, name: str) -> torch.Tensor:
        down, up = state[f"{path}.{kind}_A.{name}.weight"], state[f"{path}.{kind}_B.{name}.weight"]
        return x @ down.T @ up.T * (ALPHA / R)

    if gates is None:
        return base + expert("lora", "default")
    routed = sum(float(gates[e]) * expert("lora_moe", str(e)) for e in range(len(gates)) if gates[e] > 0)
    if f"{path}.lora_moe_A.g.weight" not in state:
        return base + routed
    weight = gates.max()
    return base + float(weight) * routed + float(1 - weight) * expert("lora_moe", "g")


def record(model, forward) -> tuple[list, list]:
    """(module path, input, output) of every adapted module and (site, input, decision) of every router."""
    modules, routers, handles = [], [], []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, MoeLoraLayer):
            handles.append(
                module.register_forward_hook(lambda m, args, out, name=name: modules.append((name, args[0], out)))
            )
    for router in model.base_model.routers():
        handles.append(router.register_forward_hook(lambda m, args, out: routers.append((m.site_name, args[0], out))))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return modules, routers


def check(model, state: dict, topk: int, region: torch.Tensor, embeds: torch.Tensor, forward) -> None:
    """Compares one forward whose routers are to read the mean of `embeds` [batch, tokens, hidden] over `region`."""
    modules, routers = record(model, forward)
    means = [rows[mask.bool()].mean(dim=0) for rows, mask in zip(embeds, region, strict=True)]
    for site, given, _ in routers:
        torch.testing.assert_close(given[:, 0], torch.stack(means), atol=1e-6, rtol=1e-5, msg=site)
    assert len(modules) == 7 * model.config.get_text_config().num_hidden_layers
    for name, given, output in modules:
        path = "base_model.model." + name.removeprefix("model.").replace("language_model.", "model.", 1)
        gated = path.rpartition(".")[0] + (".o_proj" if "self_attn" in path else ".gate_proj")
        plain = name.endswith(("q_proj", "k_proj", "v_proj"))
        for row, mean in enumerate(means):
            gates = None if plain else naive_gates(state, gated, mean, topk)
            expected = naive_module(state, path, given[row], gates)
            noise = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(output[row], expected, atol=noise, rtol=0, msg=f"{name}, row {row}")
    for site, given, decision in routers:
        path = "base_model.model.model." + site.removeprefix("model.language_model.")
        path += ".o_proj" if site.endswith("self_attn") else ".gate_proj"
        for row in range(len(means)):
            gates = naive_gates(state, path, given[row, 0], topk)
            chosen = decision.selected_experts[row, 0]
            assert sorted(chosen.tolist()) == sorted(gates.topk(topk).indices.tolist())
            torch.testing.assert_close(decision.router_probs[row, 0, chosen], gates[chosen].float(), atol=5e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("experts", "shared"), MIXTURES)
def test_a_batch_of_text_for_few_and_all_experts(experts, shared, tmp_path):
    model, state = build(tmp_path, experts, 1, shared)
    generator = torch.Generator().manual_seed(experts)
    ids = torch.randint(1, 200, (2, 9), generator=generator)
    region = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1]])
    embeds = model.get_input_embeddings()(ids)
    with model.base_model.routing_context(prompt_mask=region):
        for topk in sorted({1, min(2, experts), experts}):
            for router in model.base_model.routers():
                router.num_experts_per_tok = topk
            check(model, state, topk, region, embeds, lambda: model(input_ids=ids, use_cache=True))


def pictured(model):
    """Ids of one row with a picture, a video and text, the region from the picture on, and the other inputs."""
    config = model.config
    start, end = config.vision_start_token_id, config.vision_end_token_id
    ids = [1, 2, start, *[config.image_token_id] * 4, end, 3, start, *[config.video_token_id] * 4, end, 4, 5, 6, 7]
    ids = torch.tensor([ids])
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.in_channels * config.vision_config.temporal_patch_size
    side *= config.vision_config.patch_size**2
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int(),
        "pixel_values": torch.randn(16, side, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(16, side, generator=generator),
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    region = torch.zeros_like(ids)
    region[:, 2:-2] = 1
    return inputs, region


def features(model, inputs: dict, *, image: bool, video: bool) -> torch.Tensor:
    """Embeddings [1, tokens, hidden] with the features of what is asked for in place of its placeholders."""
    inner = model.get_base_model().model
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    if image:
        found = inner.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        embeds[ids == model.config.image_token_id] = torch.cat(tuple(found.pooler_output))
    if video:
        found = inner.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
        embeds[ids == model.config.video_token_id] = torch.cat(tuple(found.pooler_output))
    return embeds


@torch.no_grad()
def test_pictures_and_videos_with_and_without_the_cache(tmp_path):
    """With a cache the original's gate sees pictures at prefill and neither while decoding; without one, both."""
    model, state = build(tmp_path, 4, 2, True)
    inputs, region = pictured(model)
    both = features(model, inputs, image=True, video=True)
    with model.base_model.routing_context(prompt_mask=region):
        check(model, state, 2, region, both, lambda: model(**inputs, use_cache=False))
        step = None

        def prefill() -> None:
            nonlocal step
            step = model(**inputs, use_cache=True, past_key_values=cache)

        cache = DynamicCache(config=model.config)
        check(model, state, 2, region, features(model, inputs, image=True, video=False), prefill)
        raw = features(model, inputs, image=False, video=False)
        following = step.logits[:, -1:].argmax(-1)
        check(
            model,
            state,
            2,
            region,
            raw,
            lambda: model(input_ids=following, past_key_values=step.past_key_values, use_cache=True),
        )


@torch.no_grad()
@pytest.mark.parametrize("choice", ["kept", "recomputed"])
def test_generating_with_beams_and_without_the_cache(choice, tmp_path):
    """Rows that share a prompt share its choice; kept, the cache changes nothing."""
    model, _ = build(tmp_path, 4, 1, True)
    for router in model.base_model.routers():
        router.decode_choice = choice
    model.active_peft_config.decode_choice = choice
    inputs, region = pictured(model)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.base_model.routing_context(prompt_mask=region):
        greedy = model.generate(**inputs, **options)
        uncached = model.generate(**inputs, **options, use_cache=False)
        beams = model.generate(**inputs, **options, num_beams=3)
    assert beams.shape == greedy.shape
    if choice == "kept":
        assert torch.equal(greedy, uncached)
