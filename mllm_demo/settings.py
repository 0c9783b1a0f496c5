"""Every default of the program in one frozen value.

It knows nothing of the command line: `app.py` and `mllm_demo.ask` turn flags and environment into `Settings`.
"""

from dataclasses import dataclass
from pathlib import Path

from mllm_demo.errors import SettingsError

QUANTIZATIONS = ("nf4", "fp4", "int8", "none")
DEVICES = ("auto", "cuda", "cpu")
EXPERT_QUANTIZATIONS = ("auto", "nf4", "none")
AWAKER_GATES = ("original", "steady")
DEFAULT_MODEL = "bundled"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


def split_adapters(text: str) -> tuple[str, ...]:
    """Adapters separated by commas or line ends, as in MLLM_DEMO_ADAPTER and in the page's field."""
    return tuple(name for part in text.splitlines() for name in map(str.strip, part.split(",")) if name)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 means greedy; `seed` makes a sampled answer repeatable."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(1 <= self.max_new_tokens <= 4096, f"max new tokens must be 1 to 4096, not {self.max_new_tokens}.")
        _check(0 <= self.temperature <= 2, f"temperature must be 0 (greedy) to 2, not {self.temperature}.")
        _check(0 < self.top_p <= 1, f"top-p must be above 0 and at most 1, not {self.top_p}.")
        _check(1 <= self.repetition_penalty <= 2, f"repetition penalty must be 1 to 2, not {self.repetition_penalty}.")
        _check(0 <= self.seed < 2**31, f"seed must be 0 to {2**31 - 1}, not {self.seed}.")


@dataclass(frozen=True)
class ModelChoice:
    """What to load. `model`: preset name, local folder or hub id; `adapter`: folder, hub id or None.

    Several LoRA adapters, as a tuple, become one Arrow mixture; a tuple of one is that one, of none is None.
    `moe_llava_noise`: MoE-LLaVA models draw their second expert with noise, as the original does.
    `expert_quantization`: how a MoE-LoRA adapter's experts are held; "auto": in NF4 where the base is and they would
    take more than a gigabyte. `awaker_gate`: whether an Awaker model makes its second choice, for the answer, as the
    original does, or keeps the prompt's ("steady").
    """

    model: str = DEFAULT_MODEL
    adapter: str | tuple[str, ...] | None = None
    quantization: str = "nf4"
    device: str = "auto"
    moe_llava_noise: bool = False
    expert_quantization: str = "auto"
    awaker_gate: str = "original"

    def __post_init__(self) -> None:
        _check(bool(self.model.strip()), "model must be a preset, a folder or a hub id, not an empty string.")
        _check(
            self.quantization in QUANTIZATIONS,
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {self.quantization!r}.",
        )
        _check(self.device in DEVICES, f"device must be one of {', '.join(DEVICES)}, not {self.device!r}.")
        _check(
            self.expert_quantization in EXPERT_QUANTIZATIONS,
            f"expert quantization must be one of {', '.join(EXPERT_QUANTIZATIONS)}, not {self.expert_quantization!r}.",
        )
        _check(
            self.awaker_gate in AWAKER_GATES,
            f"awaker gate must be one of {', '.join(AWAKER_GATES)}, not {self.awaker_gate!r}.",
        )
        given = self.adapters
        _check(all(name.strip() for name in given), "adapter must be a folder or a hub id, not an empty string.")
        object.__setattr__(self, "adapter", given if len(given) > 1 else given[0] if given else None)

    @property
    def adapters(self) -> tuple[str, ...]:
        """What `adapter` names, one by one."""
        return (self.adapter,) if isinstance(self.adapter, str) else tuple(self.adapter or ())

    @property
    def adapter_text(self) -> str | None:
        """The adapters as one writes them in the page's field or in MLLM_DEMO_ADAPTER; None without any."""
        return ", ".join(self.adapters) or None


@dataclass(frozen=True)
class Settings:
    """One run of the program.

    `timeout_s`: seconds one answer may take; `queue_size`: people who may wait at once;
    `max_upload_mb`, `max_image_megapixels`: what an upload may weigh and decode to;
    `frames`: how many evenly spaced frames of a moving picture the model is shown, each as a picture;
    `cache_dir`: where fetched and quantized weights are kept (None: the user's cache folder).
    """

    choice: ModelChoice = ModelChoice()
    sampling: Sampling = Sampling()
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: tuple[str, str] | None = None
    queue_size: int = 16
    timeout_s: float = 300.0
    max_upload_mb: int = 20
    max_image_megapixels: int = 50
    frames: int = 4
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        _check(1 <= self.port <= 65535, f"port must be 1 to 65535, not {self.port}.")
        _check(1 <= self.queue_size <= 1024, f"queue size must be 1 to 1024, not {self.queue_size}.")
        _check(self.timeout_s > 0, f"timeout must be above 0 seconds, not {self.timeout_s}.")
        _check(self.max_upload_mb >= 1, f"max upload must be at least 1 MB, not {self.max_upload_mb}.")
        _check(self.max_image_megapixels >= 1, "max image size must be at least 1 megapixel.")
        _check(1 <= self.frames <= 32, f"frames of a moving picture must be 1 to 32, not {self.frames}.")

    @property
    def picture_limits(self) -> dict[str, int]:
        """What a picture file may be, in bytes, pixels and frames, as reading it takes them."""
        return {
            "max_bytes": self.max_upload_mb * 10**6,
            "max_pixels": self.max_image_megapixels * 10**6,
            "max_frames": self.frames,
        }
