"""What an engine tells its listener while it loads and answers, and the engine's face as the page sees it.

It knows nothing of torch or Gradio, so the page can be tested on a fake engine.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mllm_demo.chat.messages import Conversation
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import ModelChoice, Sampling


@dataclass(frozen=True)
class Queued:
    """Waiting; `ahead` people will be answered first."""

    ahead: int


@dataclass(frozen=True)
class Started:
    """The prompt was read: `prompt_tokens` of which `image_tokens` come from pictures."""

    prompt_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class TextDelta:
    """The whole answer so far (not only what is new) after `new_tokens` tokens."""

    text: str
    new_tokens: int


@dataclass(frozen=True)
class TraceUpdate:
    """The routing of everything processed so far; sent every few hundred milliseconds while answering."""

    trace: RoutingTrace


@dataclass(frozen=True)
class Finished:
    """The end. `reason`: "end" (the model stopped), "length", or "stopped" (a person did)."""

    text: str
    trace: RoutingTrace | None
    reason: str
    new_tokens: int
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.decode_s if self.decode_s > 0 else 0.0


Event = Queued | Started | TextDelta | TraceUpdate | Finished


@dataclass(frozen=True)
class LoadProgress:
    """One step of loading: `fraction` 0 to 1, `note` for the person who waits."""

    fraction: float
    note: str


@dataclass(frozen=True)
class EngineStatus:
    """What is loaded. `state`: "empty", "loading", "ready" or "failed" (then `error` says why).

    `four_bit_share`: weights held in 4 bit / all weights, counted from the tensors themselves;
    `memory_bytes`: what the weights take on `device`; `unread_experts`: names of the model's classes that hold
    experts whose router this program cannot read; `remark`: what to know about how the model is run.
    """

    state: str
    model: str = ""
    adapter: str | None = None
    device: str = ""
    quantization: str = ""
    four_bit_share: float = 0.0
    memory_bytes: int = 0
    parameters: int = 0
    context_length: int = 0
    has_routing: bool = False
    unread_experts: tuple[str, ...] = ()
    note: str = ""
    error: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Preset:
    """A catalogue entry as the page shows it. `needs_gb`: memory in NF4, measured or estimated."""

    name: str
    title: str
    needs_gb: float
    licence: str
    note: str


@dataclass(frozen=True)
class FootprintPart:
    """A part of a model: `weights` values of which `four_bit_weights` are held in 4 bit, and bytes: in 16 bit, as
    held, and of the 4-bit codes alone."""

    name: str
    weights: int
    four_bit_weights: int
    bytes_in_16_bit: int
    bytes_held: int
    four_bit_bytes: int


@dataclass(frozen=True)
class Footprint:
    """What a model will take, known before it is loaded.

    `parts`: none where the model's configuration is not on this machine; `cache_bytes`: its KV cache for 1,000
    tokens; `needs_bytes`: weights, a cache of a few thousand tokens and room to work; `free_bytes`: what `device`
    can still hand out; `image_tokens`: positions of a picture of `image_size` (width, height), where known.
    """

    title: str
    quantization: str
    device: str
    parts: tuple[FootprintPart, ...]
    cache_bytes: int
    needs_bytes: int
    free_bytes: int
    image_size: tuple[int, int] | None = None
    image_tokens: int | None = None

    @property
    def bytes_held(self) -> int:
        return sum(part.bytes_held for part in self.parts)

    @property
    def bytes_in_16_bit(self) -> int:
        return sum(part.bytes_in_16_bit for part in self.parts)

    @property
    def four_bit_share(self) -> float:
        """Weights held in 4 bit / all weights, 0 to 1."""
        return sum(p.four_bit_weights for p in self.parts) / (sum(p.weights for p in self.parts) or 1)

    @property
    def four_bit_share_of_bytes(self) -> float:
        """Bytes of 4-bit codes / all bytes held, 0 to 1."""
        return sum(part.four_bit_bytes for part in self.parts) / (self.bytes_held or 1)

    @property
    def cards_gb(self) -> tuple[int, ...]:
        """Sizes of graphics cards, of 8, 12, 16 and 24 GB, that hold it."""
        return tuple(size for size in (8, 12, 16, 24) if self.needs_bytes <= size * 1e9)

    @property
    def fits(self) -> bool:
        return self.needs_bytes <= self.free_bytes


class Engine(Protocol):
    """What the page and the command line need of an engine."""

    def status(self) -> EngineStatus: ...

    def presets(self) -> Sequence[Preset]: ...

    def footprint(self, choice: ModelChoice) -> Footprint:
        """What `choice` would take; fetches at most its description. Raises `LoadError`."""
        ...

    def load(self, choice: ModelChoice) -> Iterator[LoadProgress]:
        """Frees the old model, loads the new one; raises `LoadError`, keeping `status()` truthful."""
        ...

    def answer(
        self, messages: Conversation, sampling: Sampling, stop: threading.Event | None = None
    ) -> Iterator[Event]:
        """Streams one answer to the last user message; ends with `Finished` or raises a `DemoError`."""
        ...
