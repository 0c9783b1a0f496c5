"""In a vision-language model each part has routers of its own kind, and pictures reach the prompt's mean."""

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm_demo.moe_lora import MoeLoraConfig

IMAGE_TOKEN, IMAGE_TOKENS = 31, 4


@pytest.fixture
def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def inputs():
    ids = torch.tensor([[1] + [IMAGE_TOKEN] * IMAGE_TOKENS + [5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 8, 8)}


def adapt(model, randomized, **choices):
    targets = [
        "out_proj",
        "o_proj",
        "fc1",
        "fc2",
        "gate_proj",
        "up_proj",
        "down_proj",
        "linear_1",
        "linear_2",
    ]
    config = MoeLoraConfig(**{"r": 2, "num_experts": 3, "target_modules": targets, **choices})
    return randomized(get_peft_model(model, config)).eval()


@torch.no_grad()
@pytest.mark.parametrize("granularity", ("token", "sequence", "modality"))
@pytest.mark.parametrize(
    ("scope", "blocks"),
    [
        ("module", {"vision": 6, "connector": 2, "attention": 2, "mlp": 6}),
        ("block", {"vision": 4, "connector": 1, "attention": 2, "mlp": 2}),
        ("layer", {"vision": 2, "connector": 1, "layer": 2}),
        ("model", {"vision": 1, "connector": 1, "model": 1}),
    ],
)
def test_every_part_has_its_own_sites(llava, inputs, randomized, scope, blocks, granularity):
    # CLIP's last layer is not read by LLaVA, but it runs, so it reports.
    model = adapt(llava, randomized, router_scope=scope, granularity=granularity)
    routers, calls = model.base_model.routers(), []
    assert {block: sum(r.block == block for r in routers) for block in {r.block for r in routers}} == blocks
    for router in routers:
        router.register_forward_hook(lambda r, _, out: calls.append((r.block, out.router_probs.shape[:-1])))

    model.generate(**inputs, max_new_tokens=2, do_sample=False)

    text = [shape for block, shape in calls if block in ("attention", "mlp", "layer", "model")]
    num_text = sum(
        count for block, count in blocks.items() if block in ("attention", "mlp", "layer", "model")
    )
    tokens = 1 if granularity == "sequence" else 3 + IMAGE_TOKENS
    assert text == [(1, tokens)] * num_text + [(1, 1)] * num_text
    assert sum(block == "vision" for block, _ in calls) == blocks["vision"]
    assert sum(block == "connector" for block, _ in calls) == blocks["connector"]


@torch.no_grad()
def test_the_prompts_mean_sees_the_picture(llava, inputs, randomized):
    targets = r".*language_model.*mlp\..*_proj"
    model = adapt(llava, randomized, router_scope="model", router_input="prompt_mean", target_modules=targets)
    (router,) = model.base_model.routers()
    outputs = []
    router.register_forward_hook(lambda _, __, out: outputs.append(out.router_probs))

    model(**inputs)
    model(**{**inputs, "pixel_values": 3 * inputs["pixel_values"]})
    assert router.granularity == "sequence"
    assert not torch.allclose(outputs[0], outputs[1])


@torch.no_grad()
def test_a_router_in_the_tower_cannot_read_the_prompt(llava, inputs, randomized):
    model = adapt(llava, randomized, target_modules=["fc1"], router_input="prompt_mean")
    with pytest.raises(RuntimeError, match="no prompt was seen"):
        model(**inputs)
