"""The catalogue names what can be loaded and what it needs, by one formula."""

import pytest

from mllm_demo.models import catalog
from mllm_demo.settings import DEFAULT_MODEL


def test_the_bundled_model_comes_first_and_is_the_only_one_that_is_not_on_the_hub():
    first, *others = catalog.CATALOGUE
    assert first.name == DEFAULT_MODEL and first.hub_id is None
    assert all(entry.hub_id and entry.hub_id.count("/") == 1 for entry in others)


def test_names_are_unique_and_found():
    names = [entry.name for entry in catalog.CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(catalog.find(name).name == name for name in names)


def test_what_is_no_preset_is_not_found():
    assert catalog.find("someone/else") is None


def test_every_preset_states_its_licence_and_need():
    for preset in catalog.presets():
        assert preset.title and preset.licence and preset.note
        assert 0 < preset.needs_gb < 24


def test_need_follows_the_formula():
    entry = catalog.CatalogueEntry("x", "X", None, parameters=1000, unquantized=100, licence="", note="")
    nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)
    weights_gb = 0.9 * nf4_bits / 8 + 0.1 * 2
    assert entry.needs_gb == pytest.approx(weights_gb * 1.2 + 0.3, abs=0.051)


def test_a_larger_model_of_a_family_needs_more():
    by_name = {preset.name: preset.needs_gb for preset in catalog.presets()}
    assert by_name["qwen2-vl-2b"] < by_name["qwen2-vl-7b"]
    assert by_name["qwen3-vl-2b"] < by_name["qwen3-vl-4b"] < by_name["qwen3-vl-8b"]
