"""Answers made in another process, as on Spaces ZeroGPU, where a GPU is lent for one decorated call.

Such a process is a fork that is handed pickled arguments and hands back pickled items; an exception arrives
there as the name of its class, and no thread's event is shared with it. So errors travel as items, and stop
closes the generator, which the other side notices at its next item.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from mllm_demo.chat.events import Event, Finished, TextDelta, TraceUpdate
from mllm_demo.chat.generation import generate
from mllm_demo.chat.messages import Conversation
from mllm_demo.errors import DemoError
from mllm_demo.models.loading import LoadedModel
from mllm_demo.settings import Sampling

GpuWrapper = Callable[[Callable[..., Iterator[Event | DemoError]]], Callable[..., Iterator[Event | DemoError]]]


@dataclass(eq=False)
class _Slot:
    """Holds the model, so that the decorated function, which its decorator may keep for ever, can let it go."""

    loaded: LoadedModel | None


def _relay(slot: _Slot, messages: Conversation, sampling: Sampling, timeout_s: float) -> Iterator[Event | DemoError]:
    try:
        yield from generate(slot.loaded, messages, sampling, timeout_s, threading.Event())
    except DemoError as error:
        yield type(error)(str(error))


class Apart:
    """`generate` for one loaded model through `gpu_wrapper`, which decorates a generator function."""

    def __init__(self, loaded: LoadedModel, gpu_wrapper: GpuWrapper) -> None:
        self._slot = _Slot(loaded)
        self._call = gpu_wrapper(partial(_relay, self._slot))

    def free(self) -> None:
        """Lets the model go; `generate` must not be called afterwards."""
        self._slot.loaded = None

    def generate(
        self, messages: Conversation, sampling: Sampling, timeout_s: float, stop: threading.Event
    ) -> Iterator[Event]:
        """As `chat.generation.generate`; an answer that is stopped ends with the trace of its last update."""
        text, new_tokens, trace = "", 0, None
        events = self._call(messages, sampling, timeout_s)
        try:
            for event in events:
                if isinstance(event, DemoError):
                    raise event
                yield event
                if isinstance(event, TextDelta):
                    text, new_tokens = event.text, event.new_tokens
                elif isinstance(event, TraceUpdate):
                    trace = event.trace
                if stop.is_set() and not isinstance(event, Finished):
                    yield Finished(text, trace, "stopped", new_tokens, prefill_s=0.0, decode_s=0.0)
                    return
        finally:
            events.close()
