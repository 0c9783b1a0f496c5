"""Answers made behind a process boundary, as on ZeroGPU: everything that crosses is pickled, stop closes."""

import pickle
import threading

import pytest

from mllm_demo.chat.engine import ChatEngine
from mllm_demo.chat.events import Finished, Started, TextDelta
from mllm_demo.errors import ContextLengthError
from mllm_demo.settings import ModelChoice, Sampling, Settings
from tests.unit.chat.tiny import never_ending, on_forward, question, tiny_loaded


def across(task):
    """Does to arguments and items what a decorator that runs `task` in another process does."""

    def call(*args):
        events = task(*pickle.loads(pickle.dumps(args)))
        try:
            for event in events:
                yield pickle.loads(pickle.dumps(event))
        finally:
            events.close()

    return call


def engine_with(loaded):
    engine = ChatEngine(Settings(), load=lambda *_: loaded, gpu_wrapper=across)
    list(engine.load(ModelChoice("tiny")))
    return engine


def test_an_answer_crosses_with_its_trace():
    loaded = never_ending(tiny_loaded(routed=True))
    here = ChatEngine(Settings(), load=lambda *_: loaded)
    list(here.load(ModelChoice("tiny")))
    expected = list(here.answer(question("Hi"), Sampling(max_new_tokens=8)))[-1]
    finished = list(engine_with(loaded).answer(question("Hi"), Sampling(max_new_tokens=8)))[-1]
    assert (finished.text, finished.reason) == (expected.text, "length")
    assert finished.trace.tokens == expected.trace.tokens
    for site in expected.trace.sites:
        assert (finished.trace.selected_experts[site.name] == expected.trace.selected_experts[site.name]).all()


def test_a_sentence_survives_the_crossing():
    with pytest.raises(ContextLengthError, match="start a new chat"):
        list(engine_with(tiny_loaded(context_length=20)).answer(question("x" * 40), Sampling()))


def test_stop_ends_the_answer_with_what_there_is():
    before = threading.active_count()
    loaded = never_ending(tiny_loaded(routed=True))
    stop = threading.Event()
    on_forward(loaded, lambda step, logits: stop.set() if step == 4 else None)
    events = list(engine_with(loaded).answer(question("Hi"), Sampling(max_new_tokens=400), stop))
    assert isinstance(events[0], Started) and any(isinstance(event, TextDelta) for event in events)
    assert isinstance(events[-1], Finished) and events[-1].reason == "stopped"
    assert threading.active_count() == before


def test_the_wrapped_function_lets_an_unloaded_model_go():
    kept = []

    def keep(task):
        kept.append(task)
        return across(task)

    engine = ChatEngine(Settings(), load=lambda *_: tiny_loaded(), gpu_wrapper=keep)
    list(engine.load(ModelChoice("tiny")))
    list(engine.load(ModelChoice("tiny")))
    first, second = kept
    assert first.args[0].loaded is None and second.args[0].loaded is not None
