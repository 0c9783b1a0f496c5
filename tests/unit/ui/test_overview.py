"""Where there is no figure to draw, its place says why."""

import re
from dataclasses import replace

import pytest

from mllm_demo.settings import Settings
from mllm_demo.ui import words
from mllm_demo.ui.callbacks import Callbacks
from tests.large_trace import large_trace


@pytest.fixture
def overview():
    """What the Overview shows of a trace."""
    callbacks = Callbacks(None, Settings(), None)
    yield callbacks._overview
    callbacks.sessions.close()


def said(figures) -> list[tuple[str, str]]:
    parts = [re.fullmatch(r"(.*)<br><span[^>]*>(.*)</span>", figure.layout.title.text) for figure in figures]
    return [found.groups() for found in parts]


def test_before_anybody_asked(overview):
    assert said(overview(None)) == [(title, words.NO_OVERVIEW) for title in words.OVERVIEW]


def test_a_router_that_chooses_once_has_no_shares_of_tokens(overview):
    trace = large_trace(experts=4, k=1, layers=2, grid=2, words=8)
    whole = replace(trace, sites=tuple(replace(site, granularity="sequence") for site in trace.sites))
    assert said(overview(whole)) == [(title, words.NOT_BY_TOKEN) for title in words.OVERVIEW]


def test_titles_are_those_of_the_figures(overview):
    figures = overview(large_trace(experts=4, k=1, layers=2, grid=2, words=8))
    assert [title.split(" · ")[0] for title, _ in said(figures)] == list(words.OVERVIEW)
    assert all(figure.data for figure in figures)


def test_a_model_with_one_layer_of_experts_has_no_ways_but_a_sentence(overview):
    load, share, ways = overview(large_trace(experts=4, k=1, layers=1, grid=2, words=8))
    assert load.data and share.data and not ways.data
    assert "no way leads on" in ways.layout.title.text
