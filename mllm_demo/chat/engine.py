"""The engine the page talks to: one loaded model, a queue in front of it, answers as events.

It knows nothing of the page. What an answer is made of stands in `chat.generation`; what loading takes, in
`models.loading`.
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mllm_demo.chat.apart import Apart, GpuWrapper
from mllm_demo.chat.events import EngineStatus, Event, Finished, Footprint, LoadProgress, Preset, Queued
from mllm_demo.chat.generation import generate
from mllm_demo.chat.messages import Conversation
from mllm_demo.chat.turns import TurnQueue
from mllm_demo.chat.worker import in_worker
from mllm_demo.errors import DemoError, GenerationError, LoadError
from mllm_demo.models import catalog, loading
from mllm_demo.models.footprint import foresee
from mllm_demo.models.loading import LoadedModel
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.settings import ModelChoice, Sampling, Settings

Load = Callable[[ModelChoice, Path | None, Callable[[LoadProgress], None]], LoadedModel]

_log = logging.getLogger(__name__)


class ChatEngine:
    """Implements `chat.events.Engine` for any number of threads.

    `load`: what makes a model ready; `presets`: what the catalogue offers; `foresee`: what a choice would take;
    `gpu_wrapper`: decorates the generator that needs the GPU, where it is lent for one call and in another
    process (`spaces.GPU`); see `chat.apart` for what that costs.

    One answer is made at a time; others wait in the order in which they came. Loading takes a turn like an
    answer does, so it never pulls a model away from under one. A reader that stops reading without closing its
    generator keeps its turn.
    """

    def __init__(
        self,
        settings: Settings,
        load: Load = loading.load,
        presets: Callable[[], Sequence[Preset]] = catalog.presets,
        gpu_wrapper: GpuWrapper | None = None,
        foresee: Callable[[ModelChoice, Path | None], Footprint] = foresee,
    ) -> None:
        self._settings = settings
        self._load = load
        self._presets = presets
        self._foresee = foresee
        self._gpu_wrapper = gpu_wrapper
        self._turns = TurnQueue(settings.queue_size)
        self._status = EngineStatus("empty")
        self._loaded: LoadedModel | None = None
        self._apart: Apart | None = None

    def status(self) -> EngineStatus:
        return self._status

    def presets(self) -> Sequence[Preset]:
        return self._presets()

    def footprint(self, choice: ModelChoice) -> Footprint:
        """What `choice` would take, from its description; a loaded model is not in the way, as loading frees it."""
        seen = self._foresee(choice, self._settings.cache_dir)
        return replace(seen, free_bytes=seen.free_bytes + self._status.memory_bytes)

    def load(self, choice: ModelChoice) -> Iterator[LoadProgress]:
        """Waits for running answers, frees the old model, loads `choice`, and yields progress meanwhile.

        A failed load leaves no model and `status().state` "failed". Closing the generator early waits for the
        load to end, since half a model is of no use to anybody.

        Raises `LoadError` and its kinds.
        """
        with self._turns.join(even_if_full=True) as place:
            for ahead in place.waiting():
                yield LoadProgress(0.0, f"Waiting for {ahead} {'answer' if ahead == 1 else 'answers'} to end")
            yield from in_worker(lambda emit, closed: self._load_in_turn(choice, emit), name="load")

    def answer(
        self, messages: Conversation, sampling: Sampling, stop: threading.Event | None = None
    ) -> Iterator[Event]:
        """Waits for its turn (`Queued`), then yields the events of `chat.generation.generate`.

        Setting `stop` while waiting ends the wait with an empty `Finished`. Closing the generator leaves the
        queue or ends the answer, and returns once its thread is gone, which may take one forward of the model.

        Raises `QueueFullError`, `GenerationError`, `GenerationTimeout`, `ContextLengthError`.
        """
        stop = stop or threading.Event()
        with self._turns.join() as place:
            for ahead in place.waiting(stop.is_set):
                yield Queued(ahead)
            if stop.is_set():
                yield Finished("", None, "stopped", new_tokens=0, prefill_s=0.0, decode_s=0.0)
                return
            if self._loaded is None:
                raise GenerationError("No model is loaded; choose one and load it first.")
            if self._apart is not None:
                yield from self._apart.generate(messages, sampling, self._settings.timeout_s, stop)
            else:
                yield from generate(self._loaded, messages, sampling, self._settings.timeout_s, stop)

    def _load_in_turn(self, choice: ModelChoice, emit: Callable[[LoadProgress], None]) -> None:
        self._free()
        self._status = EngineStatus("loading", model=choice.model, adapter=choice.adapter_text)

        def progress(step: LoadProgress) -> None:
            self._status = EngineStatus("loading", model=choice.model, adapter=choice.adapter_text, note=step.note)
            emit(step)

        try:
            loaded = self._load(choice, self._settings.cache_dir, progress)
            self._status = _ready(loaded)
        except DemoError as error:
            self._fail(choice, error)
            raise
        except Exception as error:
            _log.exception("loading failed")
            sentence = LoadError(
                f"{choice.model} could not be loaded ({type(error).__name__}: {error}); choose another model."
            )
            self._fail(choice, sentence)
            raise sentence from error
        self._loaded = loaded
        self._apart = Apart(loaded, self._gpu_wrapper) if self._gpu_wrapper else None

    def _fail(self, choice: ModelChoice, error: DemoError) -> None:
        self._status = EngineStatus("failed", model=choice.model, adapter=choice.adapter_text, error=str(error))

    def _free(self) -> None:
        if self._apart is not None:
            self._apart.free()
        self._loaded = self._apart = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ready(loaded: LoadedModel) -> EngineStatus:
    tap = RoutingTap(loaded.model)
    return EngineStatus(
        "ready",
        model=loaded.title,
        adapter=loaded.adapter_title,
        device=str(loaded.device),
        quantization=loaded.quantization,
        four_bit_share=loaded.four_bit_share,
        memory_bytes=loaded.memory_bytes,
        parameters=loaded.parameters,
        context_length=loaded.context_length,
        has_routing=bool(tap.sites),
        unread_experts=tap.unread,
        remark=loaded.remark,
    )
