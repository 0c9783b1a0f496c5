"""Keeps what training made of a model as a small file beside it: the differences of their weights, in NF4.

    python -m mllm_demo.training.onward --keep assets/training/onward.safetensors --end runs/more
    python -m mllm_demo.training.onward --go assets/training/onward.safetensors --to runs/onward   # --share 0.5

A run that is not shipped yet is not lost with its machine: differences are small beside the weights, so that four bits
tell them well enough to go on from (a quarter of the size), and any share of the way can be taken again. Both models
have the layout of assets/bundled. It knows nothing of what the weights are for.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mllm_demo.cli import run
from mllm_demo.errors import DataError
from mllm_demo.models.bundled.weights import ADAPTER, ASSETS, VISION_FILE
from mllm_demo.training.base import HEADS_FILE

FILES = (VISION_FILE.name, HEADS_FILE, f"{ADAPTER.name}/adapter_model.safetensors")
BLOCK = 64  # weights that share a scale
EXACT = 4096  # tensors with no more numbers than this are kept in float16
PACKED, SCALES = ".nf4", ".scales"


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / name} cannot be read; name what --export or --keep wrote.") from error


def _packed(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Floats in NF4: uint8 `[values / 2, 1]` and the scale of every block. As one row, whatever their shape: rows of,
    say, 80 bitsandbytes 0.50 unpacks with other blocks' scales on a CPU."""
    packed, state = quantize_4bit(values.flatten(), quant_type="nf4", blocksize=BLOCK)
    return packed, state.absmax


def _unpacked(packed: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The values of `shape` that `_packed` made these of."""
    state = QuantState(scales, (shape.numel(),), get_4bit_type("nf4", packed.device), BLOCK, "nf4", torch.float32)
    return dequantize_4bit(packed, state).view(shape)


def keep(start: Path, end: Path, file: Path) -> None:
    """Writes into `file` how the weights of `end` differ from those of `start`; raises `DataError` where the two are
    not models of one shape."""
    state: dict[str, torch.Tensor] = {}
    for name in FILES:
        first, last = _weights(start, name), _weights(end, name)
        if {key: value.shape for key, value in first.items()} != {key: value.shape for key, value in last.items()}:
            raise DataError(f"{end / name} has other weights than {start / name}; name the model that it began with.")
        for key, value in last.items():
            difference = value.float() - first[key].float()
            if not difference.any():
                continue
            kept = f"{name}:{key}"
            if difference.numel() <= EXACT:
                state[kept] = difference.half()
            else:
                state[kept + PACKED], state[kept + SCALES] = _packed(difference)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"format": "pt"})


def go(start: Path, file: Path, share: float, to: Path) -> None:
    """Writes the model at `share` (1: all) of the way from `start` to what `file` keeps into the folder `to`; raises
    `DataError` where `file` tells of other weights. Of a model of the same shapes it cannot know that it is another."""
    state = _weights(file.parent, file.name)
    models = {name: _weights(start, name) for name in FILES}
    known = {f"{name}:{key}" for name, weights in models.items() for key in weights}
    if not {kept.removesuffix(PACKED).removesuffix(SCALES) for kept in state} <= known:
        raise DataError(f"{file} tells of weights that {start} has not; name the model that it was kept from.")
    shutil.copytree(start, to, dirs_exist_ok=True)
    for name, weights in models.items():
        for key, value in weights.items():
            kept = f"{name}:{key}"
            if kept in state:
                difference = state[kept].float()
            elif kept + PACKED in state:
                difference = _unpacked(state[kept + PACKED], state[kept + SCALES], value.shape)
            else:
                continue
            weights[key] = (value.float() + share * difference).to(value.dtype)
        save_file(weights, to / name, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--keep", type=Path, help="write this file")
    what.add_argument("--go", type=Path, help="go the way that this file keeps")
    parser.add_argument("--start", type=Path, default=ASSETS, help="the model that training began with")
    parser.add_argument("--end", type=Path, help="of --keep: where it arrived")
    parser.add_argument("--share", type=float, default=1.0, help="of --go: how far, 1 is all of the way")
    parser.add_argument("--to", type=Path, help="of --go: the folder to write")
    options = parser.parse_args()
    if not (options.end if options.keep else options.to):
        parser.error("--keep needs --end, the model to keep; --go needs --to, the folder to write.")
    if options.keep:
        keep(options.start, options.end, options.keep)
        print(f"kept in {options.keep}: {options.keep.stat().st_size / 1e6:.1f} MB")
    else:
        go(options.start, options.go, options.share, options.to)
        print(f"{options.to} is {options.share:g} of the way from {options.start}")


if __name__ == "__main__":
    sys.exit(run(main))
