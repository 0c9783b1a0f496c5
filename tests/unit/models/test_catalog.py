"""The catalogue names what can be loaded and what it needs, by one formula."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mllm_demo.models import catalog, footprint, sizes
from mllm_demo.models.moe_llava import model as _  # noqa: F401  registers its classes
from mllm_demo.models.moe_llava.config import MoeLlavaPhiConfig, MoeLlavaQwenConfig, MoeLlavaStableLmConfig
from mllm_demo.settings import DEFAULT_MODEL, ModelChoice


def test_the_bundled_model_comes_first_and_is_the_only_one_that_is_not_on_the_hub():
    first, *others = catalog.CATALOGUE
    assert first.name == DEFAULT_MODEL and first.hub_id is None
    assert all(entry.hub_id and entry.hub_id.count("/") == 1 for entry in others)


def test_names_are_unique_and_found():
    names = [entry.name for entry in catalog.CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(catalog.find(name).name == name for name in names)


def test_the_sizes_of_the_mixtures_are_those_of_their_shapes():
    """The shapes are those that the bases' published configurations state; the original's paper counts 5.3, 2.9 and
    3.1 billion without the vision tower's 0.3 (arXiv:2401.15947, table 1)."""
    shapes = {
        "phi2": (MoeLlavaPhiConfig, 50295, 2560, 10240, 32, 32),
        "stablelm": (MoeLlavaStableLmConfig, 100289, 2048, 5632, 24, 32),
        "qwen": (MoeLlavaQwenConfig, 151851, 2048, 11008, 24, 16),
    }
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for entry in catalog.MOE_LLAVA:
        family, *sizes = shapes[entry.name.split("-")[2]]
        config = family.from_dict(
            {
                **dict(zip(names, sizes, strict=True)),
                "num_key_value_heads": sizes[-1],
                "image_projector_type": "mlp2x_gelu",
                "moe": {"num_experts": [4], "moe_mode": "sparse"},
                "mm_image_tower": "siglip" if entry.name.endswith("384") else "clip",
            }
        )
        config.vision_config.vision_use_head = False
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        multiplied = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if type(module) is torch.nn.Linear and name != "lm_head"
        ) + sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3)
        assert round(total / 1e6) == entry.parameters
        assert round((total - multiplied) / 1e6) == entry.unquantized


def test_what_is_no_preset_is_not_found():
    assert catalog.find("someone/else") is None


def test_every_preset_states_its_licence_and_need():
    for preset in catalog.presets():
        assert preset.title and preset.licence and preset.note
        assert 0 < preset.needs_gb < 80


def test_need_follows_the_formula():
    entry = catalog.CatalogueEntry(
        "x", "X", None, parameters=1000, unquantized=100, cache_mb=50, licence="", note=""
    )
    nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)
    weights_gb = 0.9 * nf4_bits / 8 + 0.1 * 2
    assert entry.needs_gb == pytest.approx(weights_gb + 4 * 0.05 + 0.5, abs=0.051)


@pytest.mark.parametrize("name", json.loads(footprint.CONFIGURATIONS.read_text("utf-8")))
def test_figures_of_a_preset_are_those_of_its_configuration(name):
    entry = catalog.find(name)
    model = sizes.without_memory(footprint.known_configuration(name), torch.bfloat16)
    parts = sizes.parts(model, "nf4")
    weights = sum(part.weights for part in parts)
    left = weights - sum(part.four_bit_weights for part in parts)
    assert entry.parameters == pytest.approx(weights / 1e6, rel=0.001)
    assert entry.unquantized == pytest.approx(left / 1e6, rel=0.01)
    assert entry.cache_mb == pytest.approx(sizes.cache_bytes(model) / 1e6, rel=0.01)
    held = sum(part.bytes_held for part in parts)
    assert entry.needs_gb == pytest.approx(catalog.needed(held, entry.cache_mb * 1e6) / 1e9, rel=0.01)


def test_thirty_billion_weights_in_experts_fit_a_card_of_24_gb():
    seen = footprint.foresee(ModelChoice("qwen3-vl-30b-a3b", device="cpu"), None)
    assert seen.bytes_in_16_bit > 60e9 and seen.needs_bytes < 20e9
    assert seen.cards_gb == (24,)
    assert seen.four_bit_share > 0.97


@pytest.mark.parametrize("name", json.loads(footprint.CONFIGURATIONS.read_text("utf-8")))
def test_the_card_that_a_note_names_is_the_smallest_that_holds_the_model(name):
    entry = catalog.find(name)
    smallest = min(size for size in (8, 12, 16, 24, 80) if entry.needs_gb <= size)
    assert f"{smallest} GB GPU" in entry.note


def test_a_larger_model_of_a_family_needs_more():
    by_name = {preset.name: preset.needs_gb for preset in catalog.presets()}
    assert by_name["qwen2-vl-2b"] < by_name["qwen2-vl-7b"]
    assert by_name["qwen3-vl-2b"] < by_name["qwen3-vl-4b"] < by_name["qwen3-vl-8b"]
