"""A model whose tower has another shape than the shipped one's is measured as what it is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mllm_demo.errors import CheckpointError
from mllm_demo.models.bundled.assembly import save_vision, vision_config
from mllm_demo.models.bundled.tower import TesseraVisionConfig, TesseraVisionModel
from mllm_demo.models.bundled.weights import VISION_FILE
from mllm_demo.training import trained
from tests.unit.models.test_bundled import Holder


def whole(config: TesseraVisionConfig) -> Holder:
    """The two parts of a whole model that its vision file holds; no part of the tower is silent."""
    torch.manual_seed(0)
    tower = TesseraVisionModel(config)
    for part in tower.context.silent:
        nn.init.normal_(part.weight, std=0.02)
    return Holder(tower).eval()


@pytest.fixture
def shipped(monkeypatch) -> Holder:
    """What a bundle is put on."""
    model = whole(vision_config(None))
    loaded = SimpleNamespace(model=SimpleNamespace(base_model=SimpleNamespace(model=model)))
    monkeypatch.setattr(trained, "load", lambda *arguments: loaded)
    return model


@pytest.mark.parametrize(
    "other",
    [{"num_hidden_layers": 4, "detail_residuals": True}, {"num_hidden_layers": 4}, {"num_hidden_layers": 5}],
)
def test_a_tower_of_another_shape_sees_what_it_saw(shipped, tmp_path, other):
    former = whole(TesseraVisionConfig(**other))
    save_vision(former, tmp_path / VISION_FILE.name)
    trained.load_trained("none", tmp_path)
    pixels = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        wanted, seen = (m.model.vision_tower(pixels).last_hidden_state for m in (former, shipped))
    assert len(shipped.model.vision_tower.context.layers) == other["num_hidden_layers"]
    assert torch.allclose(seen, wanted, atol=0.01)  # float16 in the file


def test_a_model_of_pictures_of_another_size_is_refused(shipped, tmp_path):
    config = vision_config(None)
    config.image_size = 288
    save_vision(whole(config), tmp_path / VISION_FILE.name)
    with pytest.raises(CheckpointError, match="another size"):
        trained.load_trained("none", tmp_path)
