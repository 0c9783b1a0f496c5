"""One answer of one loaded model, streamed: text, routing, stop, time-out, errors in words.

It knows nothing of queues or of who asks; `chat.engine` sees to it that one answer is made at a time.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mllm_demo.chat.events import Event, Finished, Started, TextDelta, TraceUpdate
from mllm_demo.chat.layout import decoded_tokens, image_token_id, prompt_tokens
from mllm_demo.chat.messages import Conversation
from mllm_demo.chat.prompt import Prompt, make_prompt
from mllm_demo.chat.provenance import outcome, provenance, trace_image
from mllm_demo.chat.region import routed_region
from mllm_demo.chat.worker import in_worker
from mllm_demo.errors import DemoError, GenerationError, GenerationTimeout
from mllm_demo.models.loading import LoadedModel
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import Sampling

TRACE_EVERY_S = 0.4
# A trace may cost at most this share of the time, however slow the machine.
TRACE_TIME_SHARE = 0.1
# Settings of `generate` that nobody is asked about, at the values that change nothing: for all answers, for drawn ones.
NEUTRAL = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "min_new_tokens": 0,
}
NEUTRAL_WHEN_DRAWN = {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}

_log = logging.getLogger(__name__)


class Flag(Protocol):
    """A `threading.Event`, or anything else that can be asked whether it is set."""

    def is_set(self) -> bool: ...


def generate(
    loaded: LoadedModel, messages: Conversation, sampling: Sampling, timeout_s: float, stop: Flag
) -> Iterator[Event]:
    """Yields `Started`, then `TextDelta` and `TraceUpdate`, then `Finished`; every item is plain, on no device.

    Closing the generator or setting `stop` ends the answer after the token in work. The trace covers the
    prompt and every token of the answer but an end-of-sequence token, which no forward has read.

    Raises `GenerationTimeout` after `timeout_s` seconds, `GenerationError` when the model fails, and the
    errors of `make_prompt`.
    """

    def work(emit: Callable[[Event], None], closed: threading.Event) -> None:
        try:
            _answer(loaded, messages, sampling, timeout_s, stop, emit, closed)
        except DemoError:
            raise
        except Exception as error:
            if _out_of_memory(error):
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                raise GenerationError(
                    f"The memory of {loaded.device} ran out while answering; start a new chat, send smaller or fewer "
                    "pictures, or load a smaller model."
                ) from error
            _log.exception("generation failed")
            raise GenerationError(
                f"The model failed while answering ({type(error).__name__}: {error}); try again or start a new chat."
            ) from error

    yield from in_worker(work, name="answer")


def _answer(
    loaded: LoadedModel,
    messages: Conversation,
    sampling: Sampling,
    timeout_s: float,
    stop: Flag,
    emit: Callable[[Event], None],
    closed: threading.Event,
) -> None:
    started = time.perf_counter()
    prompt = make_prompt(loaded, messages, sampling.max_new_tokens)
    if stop.is_set() or closed.is_set():
        emit(Finished("", None, "stopped", new_tokens=0, prefill_s=time.perf_counter() - started, decode_s=0.0))
        return
    with RoutingTap(loaded.model) as tap:
        recorder = _Recorder(loaded, prompt, messages, sampling, tap)
        emit(Started(len(prompt.ids), recorder.image_tokens))
        listener = _Listener(
            prompt_length=len(prompt.ids),
            limit=prompt.max_new_tokens,
            ends=frozenset(_end_tokens(loaded)),
            decode=partial(loaded.processor.tokenizer.decode, skip_special_tokens=True),
            recorder=recorder if tap.sites else None,
            emit=emit,
            interrupted=stop.is_set,
            abandoned=closed.is_set,
            started=started,
            deadline=started + timeout_s,
        )
        # One step more than is shown: it reads the last token that is, so that this one has its routing too.
        extra = 1 if tap.sites else 0
        config = generation_config(loaded, sampling, prompt.max_new_tokens + extra)
        cuda = [loaded.device] if loaded.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), routed_region(loaded, prompt):
            torch.manual_seed(sampling.seed)
            loaded.model.generate(
                **prompt.inputs, generation_config=config, stopping_criteria=StoppingCriteriaList([listener])
            )
        if listener.reason == "timeout":
            raise GenerationTimeout(
                f"The answer took longer than the {timeout_s:g} seconds allowed; ask for fewer new tokens or raise "
                "the time limit."
            )
        if listener.reason != "abandoned":
            emit(listener.finished())


class _Recorder:
    """Makes traces of what the tap has heard so far."""

    def __init__(
        self, loaded: LoadedModel, prompt: Prompt, messages: Conversation, sampling: Sampling, tap: RoutingTap
    ) -> None:
        self._tap = tap
        self._processor = loaded.processor
        self._prompt_length = len(prompt.ids)
        config = loaded.model.config
        if not tap.sites:
            self.image_tokens = prompt.ids.count(image_token_id(self._processor, config))
            return
        self._tokens = prompt_tokens(self._processor, config, prompt.messages, prompt.ids, prompt.inputs)
        self._images = tuple(trace_image(picture) for message in messages for picture in message.pictures)
        self._provenance = provenance(loaded, messages, sampling)
        self.image_tokens = sum(token.modality == "image" for token in self._tokens)

    def trace(self, ids: list[int], **known: object) -> RoutingTrace:
        """`ids`: the answer's tokens; those that no forward has read yet are left out."""
        read = ids[: self._tap.positions - self._prompt_length]
        tokens = (*self._tokens, *decoded_tokens(self._processor, read))
        return self._tap.trace(tokens, self._images, {**self._provenance, **known})


class _Listener(StoppingCriteria):
    """Asked by `generate` after every token whether to go on; tells the reader what there is to see.

    `reason` once the answer is complete: "end", "length", "stopped", "timeout" or "abandoned".
    """

    def __init__(
        self,
        *,
        prompt_length: int,
        limit: int,
        ends: frozenset[int],
        decode: Callable[[list[int]], str],
        recorder: _Recorder | None,
        emit: Callable[[Event], None],
        interrupted: Callable[[], bool],
        abandoned: Callable[[], bool],
        started: float,
        deadline: float,
    ) -> None:
        self.reason: str | None = None
        self._prompt_length = prompt_length
        self._limit = limit
        self._ends = ends
        self._decode = decode
        self._recorder = recorder
        self._emit = emit
        self._interrupted = interrupted
        self._abandoned = abandoned
        self._started = started
        self._deadline = deadline
        self._ids: list[int] = []
        self._trace: RoutingTrace | None = None
        self._next_trace = 0.0
        self._first = self._last = started

    def __call__(self, input_ids: torch.LongTensor, scores: object, **kwargs: object) -> torch.BoolTensor:
        """`input_ids`: [1, prompt + new tokens]; the newest has been drawn but not read."""
        done = self._go_no_further(input_ids[0, self._prompt_length :].tolist())
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    def _go_no_further(self, ids: list[int]) -> bool:
        if self.reason is not None:
            self._trace_all()
            return True
        now = time.perf_counter()
        if self._abandoned():
            self.reason = "abandoned"
            return True
        ended = ids[-1] in self._ends
        if not ended and now > self._deadline:
            self.reason = "timeout"
            return True
        if len(ids) == 1:
            self._first = now
        self._last = now
        self._ids = ids[:-1] if ended else ids
        if ended:
            self.reason = "end"
            self._trace_all()
            return True
        self._emit(TextDelta(self._text(), len(self._ids)))
        if self._interrupted():
            self.reason = "stopped"
        elif len(ids) >= self._limit:
            self.reason = "length"
        if self.reason is not None:
            return self._recorder is None
        self._trace_now_and_then(now)
        return False

    def _text(self, complete: bool = False) -> str:
        text = self._decode(self._ids)
        # A character of several tokens reads as U+FFFD until its last byte is there.
        return text if complete else text.rstrip("\N{REPLACEMENT CHARACTER}")

    def _trace_now_and_then(self, now: float) -> None:
        if self._recorder is None or now < self._next_trace:
            return
        self._emit(TraceUpdate(self._recorder.trace(self._ids)))
        cost = time.perf_counter() - now
        self._next_trace = now + max(TRACE_EVERY_S, cost / TRACE_TIME_SHARE)

    def _trace_all(self) -> None:
        if self._recorder is not None:
            self._trace = self._recorder.trace(self._ids, **outcome(**self._measured()))

    def _measured(self) -> dict:
        return {
            "answer": self._text(complete=True),
            "reason": self.reason,
            "new_tokens": len(self._ids),
            "prefill_s": self._first - self._started,
            "decode_s": self._last - self._first,
        }

    def finished(self) -> Finished:
        """The last event; to be asked for after `generate` returned."""
        if self.reason is None:  # a stopping rule of the model's own generation config
            self.reason = "end"
            self._trace_all()
        measured = self._measured()
        return Finished(text=measured.pop("answer"), trace=self._trace, **measured)


def _end_tokens(loaded: LoadedModel) -> list[int]:
    eos = loaded.model.generation_config.eos_token_id
    if eos is None:
        eos = loaded.processor.tokenizer.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def generation_config(
    loaded: LoadedModel, sampling: Sampling, max_new_tokens: int, never: Sequence[int] = ()
) -> GenerationConfig:
    """Only what `sampling` says: every number is given, since `generate` fills gaps with the model's own habits.

    Lists of tokens that a checkpoint never or always writes are kept. `never`: ids that may not come out.
    """
    ends = _end_tokens(loaded)
    pad = loaded.processor.tokenizer.pad_token_id
    drawn = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=drawn,
        temperature=sampling.temperature if drawn else 1.0,
        top_p=sampling.top_p if drawn else 1.0,
        top_k=0 if drawn else 50,
        repetition_penalty=sampling.repetition_penalty,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends or [0])[0],
        suppress_tokens=list(never) or None,
        **NEUTRAL,
        **(NEUTRAL_WHEN_DRAWN if drawn else {}),
    )


def _out_of_memory(error: Exception) -> bool:
    # The CPU allocator has no exception type of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
