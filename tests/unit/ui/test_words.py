"""Sentences of the page: what a person reads in every state."""

from dataclasses import replace

import pytest

from mllm_demo.chat.events import EngineStatus, Finished, Queued, Started
from mllm_demo.ui import words
from mllm_demo.ui.callbacks import notice, progress, status_line

READY = EngineStatus("ready", "Some model", "an adapter", "cuda:0", "nf4", 0.734, 3 * 10**9, 10, 2048, True)


def test_the_status_line_names_model_device_share_speed_and_memory():
    finished = Finished("x", None, "end", 20, 0.1, 2.0)
    assert words.status_parts(READY, finished) == [
        "Some model with an adapter",
        "GPU",
        "nf4, 73 % of the weights in 4 bit",
        "10.0 tokens/s",
        "3.0 GB",
    ]


def test_what_is_special_about_a_model_stands_below_it():
    assert "class=\"remark\">The noise is off.<" in status_line(replace(READY, remark="The noise is off."))
    assert "remark" not in status_line(READY)


def test_an_unquantized_model_does_not_boast():
    status = EngineStatus("ready", "m", None, "cpu", "none", 0.0, 10**6, 1)
    assert words.status_parts(status, None) == ["m", "CPU", "not quantized", "1 MB"]


@pytest.mark.parametrize(("ahead", "said"), [(0, "You are next"), (1, "One person"), (3, "3 people")])
def test_the_place_in_the_queue(ahead, said):
    assert words.waiting(Queued(ahead)).startswith(said)


def test_reading_counts_picture_tokens_only_when_there_are_any():
    assert words.reading(Started(12, 0)) == "Reading 12 tokens"
    assert "49 of them" in words.reading(Started(60, 49))


@pytest.mark.parametrize(
    ("error", "said"),
    [("the model failed.", "The model failed."), ("cat.png is damaged.", "cat.png is damaged."), ("", "")],
)
def test_a_sentence_begins_with_a_capital_unless_with_a_name(error, said):
    assert words.sentence(error) == said


@pytest.mark.parametrize("state", ["loading", "failed", "empty"])
def test_every_state_without_a_model_says_what_to_do_or_wait_for(state):
    line = status_line(EngineStatus(state, note="half way", error="no network."))
    assert {"loading": "half way", "failed": "No network.", "empty": "Load this model"}[state] in line


def test_an_answer_without_routing_says_whether_there_are_experts_at_all():
    assert "no experts, neither its own nor LoRA experts" in words.no_routing(EngineStatus("ready"))
    strange = EngineStatus("ready", unread_experts=("StrangeMoeBlock",))
    assert "cannot read the routers of StrangeMoeBlock" in words.no_routing(strange)


def test_what_others_wrote_is_escaped():
    hostile = "<script>alert(1)</script>"
    status = EngineStatus("ready", hostile, hostile, "cpu", "nf4", 0.5, 1, 1, remark=hostile)
    for markup in (status_line(status), notice(hostile), progress(0.5, hostile)):
        assert "<script>" not in markup
