"""What the benchmarks share: a random language model of a real one's shape, interleaved timing, one table.

Cases are measured in turns, round after round, so that whatever else the machine does falls on all of them; each
is compared with the first one of the same round. It knows nothing of adapters, traces or quantization.
"""

import copy
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
import transformers
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mllm_demo.cli import Parser
from mllm_demo.errors import SettingsError
from mllm_demo.models.quantize import resolve_device
from mllm_demo.settings import DEVICES

# The language model of the bundled model, SmolLM2-135M.
SHAPE = MappingProxyType(
    {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
)
LAYERS = 30
FULL_SHAPE = f"{LAYERS} layers are a SmolLM2-135M"


@dataclass(frozen=True)
class Options:
    """How much to measure, and where. `threads`: of PyTorch; None leaves its own choice."""

    layers: int
    repeats: int
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    device: torch.device


def options(name: str, description: str, argv: Sequence[str] | None) -> Options:
    """Reads the command line, sets the number of threads and keeps bars off the output; raises `SettingsError`."""
    parser = Parser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of the model ({FULL_SHAPE})")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, each of which measures every case once")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens decoded after it")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    given = parser.parse_args(argv)
    for flag in ("layers", "repeats", "threads", "prompt_tokens", "new_tokens"):
        value = getattr(given, flag)
        if value is not None and value < 1:
            raise SettingsError(f"--{flag.replace('_', '-')} must be at least 1, not {value}.")
    transformers.utils.logging.disable_progress_bar()
    if given.threads:
        torch.set_num_threads(given.threads)
    return Options(**{**vars(given), "device": resolve_device(given.device)})


def random_llama(chosen: Options) -> LlamaForCausalLM:
    """A float32 model with random weights, in eval mode on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=chosen.layers, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval().to(chosen.device)


def twin(model: nn.Module) -> nn.Module:
    """A copy that can be adapted on its own and shares every weight with `model`."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def random_prompt(chosen: Options) -> torch.Tensor:
    """Ids, int64 [1, prompt_tokens]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(SHAPE["vocab_size"], (1, chosen.prompt_tokens), generator=generator)
    return ids.to(chosen.device)


def now(device: torch.device) -> float:
    """Seconds, once everything asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def read_and_write(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and of the decoding of `new_tokens` tokens after it, greedy and with a KV cache."""
    cache = DynamicCache()
    started = now(prompt.device)
    logits = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)  # (1, 1)
    read = now(prompt.device)
    for _ in range(new_tokens):
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return read - started, now(prompt.device) - read


def measure(cases: Mapping[str, Callable[[], Sequence[float]]], repeats: int) -> dict[str, np.ndarray]:
    """Runs every case once unmeasured and then `repeats` rounds of all of them, each round starting with another.

    A case returns the seconds of what it timed; returns float64 [repeats, quantities] for each.
    """
    for case in cases.values():
        case()
    names = list(cases)
    seconds: dict[str, list] = {name: [] for name in names}
    for round_ in range(repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(cases[name]())
    return {name: np.array(rows, dtype=np.float64) for name, rows in seconds.items()}


def setup(chosen: Options, what: str) -> str:
    """One paragraph: what was compared, on what."""
    device = torch.cuda.get_device_name(chosen.device) if chosen.device.type == "cuda" else platform.machine()
    return (
        f"{what}\n"
        f"Random Llama of {chosen.layers} layers ({FULL_SHAPE}), {chosen.prompt_tokens} prompt tokens, "
        f"{chosen.new_tokens} new tokens; {chosen.device.type} ({device}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"median of {chosen.repeats} interleaved rounds."
    )


def table(
    seconds: Mapping[str, np.ndarray], columns: Mapping[str, int], more: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Milliseconds and the ratio to the first case, for each quantity.

    `columns`: the title of each quantity and how many times it was done in one timing; `more`: a title and the
    cells of further columns. A ratio is the median of the rounds' own ratios, with the smallest and largest.
    """
    names = list(seconds)
    header = ["", *(part for title in columns for part in (f"{title} ms", "ratio (least - most)"))]
    header += list(more or {})
    rows = [header]
    for number, name in enumerate(names):
        row = [name]
        for quantity, times in enumerate(columns.values()):
            own = seconds[name][:, quantity]
            ratios = own / seconds[names[0]][:, quantity]
            row.append(f"{np.median(own) / times * 1000:.2f}")
            row.append(f"{np.median(ratios):.2f} ({ratios.min():.2f} - {ratios.max():.2f})" if number else "1")
        rows.append(row + [cells[number] for cells in (more or {}).values()])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
