"""Makes the bundled model ready on this machine, once: fetch, assemble, quantize, save; afterwards only a path.

    python -m mllm_demo.models.bundled.weights [nf4|fp4|int8|none]

The folder that it returns is an ordinary checkpoint for `AutoModelForImageTextToText` and `AutoProcessor`.
It knows nothing of adapters or of what is loaded later.
"""

import gc
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import LlavaForConditionalGeneration

from mllm_demo.chat.events import LoadProgress
from mllm_demo.errors import CheckpointError, DemoError, LoadError
from mllm_demo.models.bundled.assembly import VISION_CONFIG, assemble, make_processor, vision_config
from mllm_demo.models.bundled.fetch import WHEEL_SHA256, language_model
from mllm_demo.models.fetching import Progress, default_cache_dir, monotone
from mllm_demo.models.progress import bars_as_progress
from mllm_demo.models.quantize import bnb_config

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "bundled"
VISION_FILE = ASSETS / "vision.safetensors"
ADAPTER = ASSETS / "adapter"
# The parts that stay in full precision: small, and trained as such.
FULL_PRECISION = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
LAYOUT_VERSION = 3  # raise when the saved folder changes shape


def _key(quantization: str) -> str:
    """Changes whenever anything that the saved folder is made of changes."""
    digest = hashlib.sha256(f"{LAYOUT_VERSION} {WHEEL_SHA256}".encode())
    for file in (VISION_FILE, VISION_FILE.with_name(VISION_CONFIG)):
        if not file.exists():
            raise CheckpointError(f"{file.name} of the bundled model is missing; get the whole repository again.")
        digest.update(file.read_bytes())
    return f"tessera-{digest.hexdigest()[:12]}-{quantization}"


def place(quantization: str, cache_dir: Path | None) -> Path:
    """The folder that `prepare` makes or has made."""
    return Path(cache_dir or default_cache_dir()) / "bundled" / _key(quantization)


def prepare(quantization: str, cache_dir: Path | None, progress: Progress) -> Path:
    """Folder of the bundled model in `quantization`; raises `DownloadError` or `LoadError`.

    Nothing is fetched or computed when the folder exists; a half-made one never stays. Of several starts at once on
    one cache the first makes it and the others wait.
    """
    progress = monotone(progress)
    cache = Path(cache_dir or default_cache_dir())
    target = place(quantization, cache)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, progress):
            if not target.exists():
                _make(target, quantization, cache, progress)
    except OSError as error:
        raise LoadError(
            f"Could not write the model to {cache} ({error.strerror}); choose another --cache-dir."
        ) from error
    progress(LoadProgress(1.0, "The model is on disk"))
    return target


@contextmanager
def _alone(target: Path, progress: Progress) -> Iterator[None]:
    """Held by one process at a time; one that is killed holds it no longer."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(LoadProgress(0.0, "Another start of the program is making the model ready; waiting for it"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, quantization: str, cache: Path, progress: Progress) -> None:
    def fetched(done: int, total: int) -> None:
        fraction = 0.6 * done / max(total, 1)
        progress(LoadProgress(fraction, f"Fetching SmolLM2-135M-Instruct: {done / 1e6:.0f} of {total / 1e6:.0f} MB"))

    gguf = language_model(cache / "bundled", fetched)
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder,
        bars_as_progress(monotone(progress, 0.6, 0.8)),
    ):
        full, ready = Path(folder) / "full", Path(folder) / "ready"
        processor = make_processor(gguf, vision_config(VISION_FILE))
        model = assemble(gguf, processor, VISION_FILE)
        progress(LoadProgress(0.8, "Saving the language model joined to its eyes"))
        _halve(model.model.language_model)
        model.save_pretrained(full)
        del model
        gc.collect()
        if quantization == "none":
            ready = full
        else:
            progress(LoadProgress(0.9, f"Quantizing it to {quantization.upper()}, once"))
            _quantize(full, ready, quantization)
        processor.save_pretrained(ready)
        ready.rename(target)


def _halve(language_model: nn.Module) -> None:
    """Large matrices in bfloat16, what is small in float32, so that no norm or batch statistic is rounded."""
    for module in language_model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.is_floating_point():
            module.weight.data = module.weight.data.bfloat16()


def _quantize(source: Path, target: Path, quantization: str) -> None:
    config = bnb_config(quantization, torch.bfloat16)
    config.llm_int8_skip_modules = list(FULL_PRECISION)
    model = LlavaForConditionalGeneration.from_pretrained(
        source, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    _halve(model.model.language_model)
    model.save_pretrained(target)


def main() -> int:
    quantization = sys.argv[1] if len(sys.argv) > 1 else "nf4"
    try:
        print(prepare(quantization, None, lambda step: print(f"{step.fraction:4.0%} {step.note}", flush=True)))
    except DemoError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
