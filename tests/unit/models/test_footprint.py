"""What a model takes is known from its configuration: to the byte, by part, before anything is loaded."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    Ernie4_5_VLMoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextMLP

from mllm_demo.errors import DownloadError, OutOfMemoryError, SettingsError
from mllm_demo.models import adapters, fetching, footprint, loading, memory, quantize, sizes
from mllm_demo.settings import ModelChoice

CPU = torch.device("cpu")
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}


def medium() -> Qwen3VLMoeConfig:
    """About 30 million weights, most of them in experts."""
    return Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 8000,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rope_parameters": ROPE,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 4,
            "out_hidden_size": 512,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    )


def load(folder, quantization: str, dtype: torch.dtype):
    config = quantize.bnb_config(quantization, dtype)
    given = {"quantization_config": config} if config else {}
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map={"": "cpu"}, **given).eval()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(medium(), dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("kind", "quantization"),
    [*(("checkpoint", name) for name in ("nf4", "fp4", "int8", "none")), ("mixture", "nf4"), ("mixture", "int8")],
)
def test_what_is_foreseen_is_what_is_then_held(kind, quantization, dtype, request):
    folder = request.getfixturevalue(kind)
    parts = sizes.parts(sizes.without_memory(AutoConfig.from_pretrained(folder), dtype), quantization)
    held = memory.measure(load(folder, quantization, dtype))
    # Promised is 3 %; CLIP keeps one table of positions, of int64, where the meta device makes none.
    assert sum(part.bytes_held for part in parts) == pytest.approx(held.memory_bytes, rel=0.005)
    assert sum(part.weights for part in parts) == held.parameters
    assert sum(part.four_bit_bytes for part in parts) == held.four_bit_bytes
    share = sum(part.four_bit_weights for part in parts) / sum(part.weights for part in parts)
    assert share == pytest.approx(held.four_bit_share)


def test_parts_are_told_apart_by_what_the_model_says_of_itself(mixture):
    config = medium()
    parts = {part.name: part for part in sizes.parts(sizes.without_memory(config, torch.bfloat16), "nf4")}
    text = config.text_config
    assert parts["experts"].weights == 3 * text.num_experts * 3 * text.hidden_size * text.moe_intermediate_size
    assert parts["experts"].four_bit_weights == parts["experts"].weights
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    assert parts["attention"].weights == 3 * (heads * text.hidden_size + 2 * text.head_dim)
    model = load(mixture, "none", torch.bfloat16)
    assert parts["vision"].weights == sum(p.numel() for p in model.model.visual.parameters())
    assert parts["embeddings"].weights == 2 * text.vocab_size * text.hidden_size
    assert not parts["embeddings"].four_bit_weights


class Separate(Qwen3VLMoeForConditionalGeneration):
    """The same model with an MLP of `nn.Linear` for every expert, as code that comes with checkpoints has them."""

    def __init__(self, config: Qwen3VLMoeConfig) -> None:
        super().__init__(config)
        text = config.text_config
        for layer in self.model.language_model.layers:
            mlps = (Qwen3VLMoeTextMLP(text, text.moe_intermediate_size) for _ in range(text.num_experts))
            layer.mlp.experts = None
            layer.mlp.members = nn.ModuleList(mlps)


def test_experts_of_separate_linear_layers_are_in_4_bit_and_counted_as_experts(tmp_path):
    Separate(medium()).bfloat16().save_pretrained(tmp_path)
    quantized = quantize.bnb_config("nf4", torch.bfloat16)
    held = memory.measure(
        Separate.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=quantized)
    )
    with torch.device("meta"):
        model = Separate(medium()).bfloat16()
    parts = {part.name: part for part in sizes.parts(model, "nf4")}
    text = medium().text_config
    assert parts["experts"].weights == 3 * text.num_experts * 3 * text.hidden_size * text.moe_intermediate_size
    assert parts["experts"].four_bit_weights == parts["experts"].weights
    # Promised is 3 %.
    assert sum(part.bytes_held for part in parts.values()) == pytest.approx(held.memory_bytes, rel=0.005)
    assert sum(part.four_bit_bytes for part in parts.values()) == held.four_bit_bytes


def test_experts_of_a_checkpoint_that_bitsandbytes_stored_itself_stay_in_16_bit():
    model = sizes.without_memory(medium(), torch.bfloat16)
    by_us, by_them = sizes.parts(model, "nf4"), sizes.parts(model, "nf4", fused=False)
    experts = {part.name: part for part in by_them}["experts"]
    assert experts.bytes_held == experts.bytes_in_16_bit
    assert sum(part.bytes_held for part in by_them) > 1.5 * sum(part.bytes_held for part in by_us)


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_cache_is_as_large_as_the_one_that_a_forward_fills(mixture, tokens):
    model, cache = load(mixture, "none", torch.bfloat16), DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
    filled = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sizes.cache_bytes(sizes.without_memory(medium(), torch.bfloat16), tokens) == filled


def test_a_model_that_does_not_run_without_values_has_a_key_and_a_value_per_head():
    config = Ernie4_5_VLMoeConfig()
    model = sizes.without_memory(config, torch.bfloat16)
    asked = sizes.cache_bytes(model)
    model.forward = None  # not callable: the same by the usual formula
    assert sizes.cache_bytes(model) == asked


@pytest.mark.parametrize("kind", ["lora", "moe_lora"])
def test_an_adapter_is_counted_from_its_description(kind, checkpoint, request):
    folder = request.getfixturevalue(kind)
    model = sizes.without_memory(AutoConfig.from_pretrained(checkpoint), torch.bfloat16)
    part = sizes.adapter_part(model, adapters.read_config(folder, kind), kind)
    adapted = PeftModel.from_pretrained(load(checkpoint, "nf4", torch.bfloat16), folder)
    added = [p for name, p in adapted.named_parameters() if "lora" in name or "router" in name]
    assert part.weights == sum(p.numel() for p in added)
    assert part.bytes_held == sum(p.nbytes for p in added)


# The command and what it is made of


@pytest.fixture
def nothing_cached(monkeypatch):
    def refuse(*args, **kwargs):
        raise DownloadError("no network")

    monkeypatch.setattr(fetching, "_from_hub", refuse)


def test_a_folder_is_described_from_its_configuration_alone(mixture, tmp_path, capsys, nothing_cached):
    AutoConfig.from_pretrained(mixture).save_pretrained(tmp_path)
    footprint.main([str(tmp_path), "--device", "cpu", "--quantization", "nf4"], {})
    said = capsys.readouterr().out
    for word in ("vision", "attention", "experts", "embeddings", "rest", "all"):
        assert any(line.startswith(word) for line in said.splitlines())
    assert "for 1,000 tokens" in said and "8 GB, 12 GB, 16 GB, 24 GB" in said


def test_tokens_of_a_picture_come_from_the_processor(checkpoint, lora):
    seen = footprint.foresee(ModelChoice(str(checkpoint), str(lora), "nf4", "cpu"), None, (80, 40))
    # 16 pixels a side in patches of 8, and one for the class token, which the default strategy drops again.
    assert (seen.image_size, seen.image_tokens) == ((80, 40), 4)
    assert [part.name for part in seen.parts][-1] == "adapter"


def test_what_is_shown_is_what_refuses(mixture, tmp_path, monkeypatch):
    AutoConfig.from_pretrained(mixture).save_pretrained(tmp_path)
    choice = ModelChoice(str(tmp_path), device="cpu")
    seen = footprint.foresee(choice, None)
    monkeypatch.setattr(memory, "free_bytes", lambda device: seen.needs_bytes - 1)
    assert not footprint.foresee(choice, None).fits
    with pytest.raises(OutOfMemoryError, match="GB is free; choose a smaller model"):
        loading.fetch(choice, tmp_path, lambda step: None)


def test_a_preset_without_a_description_here_has_its_catalogue_figures(nothing_cached, tmp_path):
    seen = footprint.foresee(ModelChoice("qwen2-vl-7b", device="cpu"), tmp_path)
    assert seen.parts == () and seen.needs_bytes > 5e9 and seen.cache_bytes > 5e7
    assert "KV cache" in footprint.described(seen)


def test_every_known_configuration_is_json_of_a_preset():
    for name, values in json.loads(footprint.CONFIGURATIONS.read_text("utf-8")).items():
        assert footprint.known_configuration(name).model_type == values["model_type"]


@pytest.mark.parametrize("size", ["big", "10", "0x10", "10x", "-1x5"])
def test_a_size_that_is_none(size):
    with pytest.raises(SettingsError, match="such as 1024x768"):
        footprint.main(["aria", f"--size={size}"], {})
