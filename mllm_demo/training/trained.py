"""A trained model to measure: the shipped one, or another in the same layout, as `chat --export --to` writes it.

It knows nothing of questions or of how the model was trained.
"""

from pathlib import Path

from mllm_demo.errors import CheckpointError
from mllm_demo.models.bundled.assembly import load_vision, vision_config
from mllm_demo.models.bundled.tower import TesseraVisionModel
from mllm_demo.models.bundled.weights import ADAPTER, VISION_FILE
from mllm_demo.models.loading import LoadedModel, load
from mllm_demo.settings import ModelChoice

HELP = "folder of another model in the layout of assets/bundled, as `training.chat --export --to` writes it"


def load_trained(quantization: str, bundle: Path | None = None) -> LoadedModel:
    """The model in `bundle`, put on the shipped one's language model.

    Raises `CheckpointError` when it sees pictures of another size.
    """
    adapter = None if bundle is None else str(bundle / ADAPTER.name)
    loaded = load(ModelChoice(quantization=quantization, adapter=adapter), None, lambda step: None)
    if bundle is not None:
        shape, base = vision_config(bundle / VISION_FILE.name), loaded.model.base_model.model
        shipped = base.model.vision_tower
        if shape.image_size != shipped.config.image_size:
            raise CheckpointError(f"{bundle} sees pictures of another size than the shipped model; put it there.")
        base.model.vision_tower = TesseraVisionModel(shape).to(shipped.device, shipped.dtype).eval()
        load_vision(base, bundle / VISION_FILE.name)
    return loaded
