"""Every default is valid, every value out of range is refused in one sentence."""

import dataclasses

import pytest

from mllm_demo.errors import SettingsError
from mllm_demo.settings import ModelChoice, Sampling, Settings


def test_the_defaults_serve_the_bundled_model_in_nf4_on_this_machine_only():
    settings = Settings()
    assert (settings.choice.model, settings.choice.quantization) == ("bundled", "nf4")
    assert (settings.host, settings.port, settings.share, settings.auth) == ("127.0.0.1", 7860, False, None)


@pytest.mark.parametrize("value", [Settings(), Sampling(), ModelChoice()])
def test_settings_cannot_be_changed_after_the_start(value):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Sampling, "max_new_tokens", 0),
        (Sampling, "max_new_tokens", 5000),
        (Sampling, "temperature", -0.1),
        (Sampling, "temperature", float("nan")),
        (Sampling, "top_p", 0),
        (Sampling, "top_p", 1.1),
        (Sampling, "repetition_penalty", 0.9),
        (Sampling, "seed", -1),
        (Sampling, "seed", 2**31),
        (ModelChoice, "model", " "),
        (ModelChoice, "quantization", "int4"),
        (ModelChoice, "device", "tpu"),
        (ModelChoice, "expert_quantization", "int8"),
        (ModelChoice, "awaker_gate", "open"),
        (Settings, "port", 0),
        (Settings, "port", 65536),
        (Settings, "queue_size", 0),
        (Settings, "timeout_s", 0),
        (Settings, "max_upload_mb", 0),
        (Settings, "max_image_megapixels", 0),
        (Settings, "frames", 0),
        (Settings, "frames", 33),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_sentence(kind, field, value):
    with pytest.raises(SettingsError) as refused:
        kind(**{field: value})
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize(("field", "value"), [("max_new_tokens", 4096), ("temperature", 2), ("top_p", 1), ("seed", 0)])
def test_the_ends_of_a_range_belong_to_it(field, value):
    assert getattr(Sampling(**{field: value}), field) == value
