"""What a choice will take before anything of it is loaded, for the page and for the shell.

    python -m mllm_demo.models.footprint MODEL [--adapter ADAPTER] [--quantization nf4] [--size 1024x768]

Only descriptions are read: a folder's or hub repository's configuration, or, for presets that were never fetched,
the one that comes with the program. It knows nothing of weights.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from mllm_demo.chat.events import Footprint
from mllm_demo.cli import Parser, add_model_flags, run, settings_from
from mllm_demo.errors import CheckpointError, DownloadError, SettingsError
from mllm_demo.models import adapters, catalog, fetching, loading, memory, quantize, sizes
from mllm_demo.models.bundled import weights as bundled_weights
from mllm_demo.models.processors import load_processor
from mllm_demo.settings import QUANTIZATIONS, ModelChoice

CONFIGURATIONS = Path(__file__).with_name("configurations.json")
PICTURE = (1024, 768)


def known_configuration(name: str) -> PretrainedConfig | None:
    """The configuration of preset `name` that comes with the program, or None."""
    values = json.loads(CONFIGURATIONS.read_text("utf-8")).get(name)
    return AutoConfig.for_model(**values) if values else None


def _describe(choice: ModelChoice, cache_dir: Path, title: str) -> tuple[Path | None, PretrainedConfig | None]:
    """The folder with the descriptions of `choice`, where there is one, and the configuration, where it is known."""
    entry = catalog.find(choice.model)
    if entry is not None and entry.hub_id is None:
        folder = bundled_weights.place(choice.quantization, cache_dir)
        return (folder, loading.read_config(folder, title)) if folder.is_dir() else (None, None)
    if entry is not None and (known := known_configuration(entry.name)) is not None:
        return None, known
    try:
        source = entry.hub_id if entry else choice.model
        folder = fetching.fetch_descriptions(source, cache_dir, lambda step: None).folder
    except DownloadError:
        if entry is None:
            raise
        return None, None
    return folder, loading.read_config(folder, title)


def foresee(choice: ModelChoice, cache_dir: Path | None, picture: tuple[int, int] = PICTURE) -> Footprint:
    """What `choice` will take; `picture` is the (width, height) whose tokens are counted, where a processor is there.

    Raises the `LoadError` family for what cannot be known, as loading would.
    """
    cache_dir = cache_dir or fetching.default_cache_dir()
    device = quantize.resolve_device(choice.device)
    entry = catalog.find(choice.model)
    title = entry.title if entry else Path(choice.model).name
    free = memory.free_bytes(device)
    folder, config = _describe(choice, cache_dir, title)
    if config is None:
        needs, cache = round(entry.needs_gb * 1e9), round(entry.cache_mb * 1e6)
        return Footprint(title, "nf4", device.type, (), cache, needs, free)
    stored = quantize.stored_quantization(config)
    quantization = stored or choice.quantization
    if quantization not in QUANTIZATIONS:
        needs = loading.needed_bytes(folder, config, quantization, device)
        return Footprint(title, quantization, device.type, (), 0, needs, free)
    model = sizes.without_memory(config, quantize.compute_dtype(device))
    parts = sizes.parts(model, quantization, **quantize.stored_exceptions(config))
    cache = sizes.cache_bytes(model)
    adapter = choice.adapter or (str(bundled_weights.ADAPTER) if entry and entry.hub_id is None else None)
    if adapter:
        files = fetching.fetch_files(adapter, (fetching.ADAPTER_CONFIG,), cache_dir, lambda step: None)
        parts += (sizes.adapter_part(model, adapters.read_config(files.folder, adapter), Path(adapter).name),)
    needs = catalog.needed(sum(part.bytes_held for part in parts), cache)
    tokens = _image_tokens(folder, config, title, picture)
    return Footprint(title, quantization, device.type, parts, cache, needs, free, picture if tokens else None, tokens)


def _image_tokens(folder: Path | None, config: PretrainedConfig, title: str, picture: tuple[int, int]) -> int | None:
    try:
        return sizes.image_tokens(load_processor(folder, config, title), *picture) if folder else None
    except (CheckpointError, AttributeError, NotImplementedError):
        return None


def described(footprint: Footprint) -> str:
    """The footprint as a table and sentences for a terminal."""
    lines = [f"{footprint.title}, {footprint.quantization}, on {footprint.device}"]
    if footprint.parts:
        rows = [
            (part.name, part.weights, part.bytes_in_16_bit, part.bytes_held, part.four_bit_weights)
            for part in footprint.parts
        ]
        rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
        lines.append(f"{'':12}{'weights':>12}{'in 16 bit':>14}{'as loaded':>14}{'in 4 bit':>10}")
        for name, weights, in_16_bit, held, four_bit in rows:
            share = f"{four_bit / weights:.0%}" if weights else ""
            lines.append(f"{name:12}{weights / 1e6:>10,.1f} M{_size(in_16_bit):>14}{_size(held):>14}{share:>10}")
        lines.append(
            f"In 4 bit: {footprint.four_bit_share:.1%} of the weights, "
            f"{footprint.four_bit_share_of_bytes:.1%} of the bytes held."
        )
    lines.append(f"KV cache: {_size(footprint.cache_bytes)} for 1,000 tokens.")
    if footprint.image_tokens:
        lines.append("A picture of {} x {} takes {} tokens.".format(*footprint.image_size, footprint.image_tokens))
    lines.append(
        f"It needs about {_size(footprint.needs_bytes)} with {catalog.CONVERSATION_TOKENS:,} tokens of conversation; "
        f"{_size(footprint.free_bytes)} is free here."
    )
    cards = ", ".join(f"{size} GB" for size in footprint.cards_gb)
    lines.append(f"Graphics cards that hold it: {cards}." if cards else "No graphics card of up to 24 GB holds it.")
    return "\n".join(lines)


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _picture(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise SettingsError(f"--size must be a width and a height such as 1024x768, not {text!r}.")
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    what = "What a model will take, before it is loaded."
    parser = Parser(prog="python -m mllm_demo.models.footprint", description=what)
    parser.add_argument("name", nargs="?", default=None, help="preset, folder or hub id; the same as --model")
    add_model_flags(parser, environ)
    parser.add_argument("--size", default="{}x{}".format(*PICTURE), help="the picture whose tokens are counted")
    arguments = parser.parse_args(argv)
    if arguments.name:
        arguments.model = arguments.name
    settings = settings_from(arguments)
    print(described(foresee(settings.choice, settings.cache_dir, _picture(arguments.size))))


if __name__ == "__main__":
    sys.exit(run(main))
