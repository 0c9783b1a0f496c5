"""How much memory a model takes, counted from its tensors, and how much a device has left.

It knows nothing of files being fetched; `sizes.py` foresees the same from a configuration.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit
from torch import nn

from mllm_demo.errors import OutOfMemoryError
from mllm_demo.models.experts import ExpertWeights4bit

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Footprint:
    """What a loaded model holds.

    `memory_bytes`: all parameters, buffers and quantization statistics; `four_bit_bytes`: the packed 4-bit
    codes alone, without their statistics; `parameters`: values the model has, however they are stored.
    """

    memory_bytes: int
    four_bit_bytes: int
    parameters: int

    @property
    def four_bit_share(self) -> float:
        """Weights (values) held in 4 bit / all weights, 0 to 1."""
        return 2 * self.four_bit_bytes / self.parameters if self.parameters else 0.0


def _statistics(parameter: Params4bit) -> Iterator[torch.Tensor]:
    """The tensors beside the packed codes: block maxima, code book, and the same of their own quantization."""
    state = parameter.quant_state
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = getattr(state, "state2", None)  # gone once bitsandbytes has packed a layer for its fused CPU kernel


def measure(model: nn.Module) -> Footprint:
    """Counts every tensor of `model` once, however many modules share it."""
    sizes: dict[int, int] = {}
    four_bit: dict[int, int] = {}
    parameters = 0
    for parameter in model.parameters():
        sizes[parameter.data_ptr()] = parameter.nbytes
        if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
            four_bit[parameter.data_ptr()] = parameter.nbytes
            sizes.update((t.data_ptr(), t.nbytes) for t in _statistics(parameter))
            parameters += parameter.quant_state.shape.numel()
        else:
            parameters += parameter.numel()
        if isinstance(parameter, Int8Params) and parameter.SCB is not None:
            sizes[parameter.SCB.data_ptr()] = parameter.SCB.nbytes
    for module in model.modules():
        if isinstance(module, ExpertWeights4bit):
            four_bit[module.weight.data_ptr()] = module.weight.nbytes
            parameters += module.weights
        # After its first forward the layer has moved the row scales from the weight to its own state.
        if isinstance(module, Linear8bitLt) and module.state.SCB is not None:
            sizes[module.state.SCB.data_ptr()] = module.state.SCB.nbytes
    sizes.update((buffer.data_ptr(), buffer.nbytes) for buffer in model.buffers())
    return Footprint(sum(sizes.values()), sum(four_bit.values()), parameters)


def _cgroup_free(root: Path) -> int | None:
    """Bytes a container may still take, None without a limit. Page cache that can be dropped counts as free."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return int(limit) - used + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))


def free_bytes(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Bytes `device` can still hand out; on the host also bounded by the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    contained = _cgroup_free(cgroup)
    return free if contained is None else min(free, contained)


def check_fits(title: str, needed: int, device: torch.device, free: int) -> None:
    """Raises `OutOfMemoryError` when `needed` bytes exceed `free`."""
    if needed > free:
        raise OutOfMemoryError(
            f"{title} needs about {needed / 1e9:.1f} GB on {device.type}, where {free / 1e9:.1f} GB is free; "
            "choose a smaller model, --quantization nf4, or a larger machine."
        )
