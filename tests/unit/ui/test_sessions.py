"""Sessions keep people apart and forget them."""

import pytest

from mllm_demo.chat.events import EngineStatus, Finished
from mllm_demo.ui.sessions import Sessions


class Saved:
    """Stands for a trace: writes something where it is told to."""

    def save(self, path):
        path.write_text("trace")
        return path


@pytest.fixture
def sessions():
    made = Sessions(capacity=2)
    yield made
    made.close()


def test_stopping_one_session_leaves_the_others_running(sessions):
    one, two = sessions.begin("one"), sessions.begin("two")
    sessions.stop("one")
    assert one.is_set() and not two.is_set()


def test_a_new_answer_replaces_the_one_still_running(sessions):
    first = sessions.begin("one")
    second = sessions.begin("one")
    assert first.is_set() and not second.is_set()
    assert sessions.is_current("one", second) and not sessions.is_current("one", first)


def test_a_closed_tab_stops_its_answer_and_leaves_nothing(sessions):
    stop = sessions.begin("one")
    sessions.keep_trace("one", "a trace")
    sessions.forget("one")
    assert stop.is_set()
    assert sessions.trace("one") is None
    assert not sessions.is_current("one", stop)


def test_traces_belong_to_their_session(sessions):
    sessions.keep_trace("one", "a trace")
    assert sessions.trace("two") is None


def test_the_last_answer_is_told_only_of_the_model_that_gave_it(sessions):
    sessions.keep_answer("one", EngineStatus("ready", "A"), Finished("Yes.", "a trace", "end", 2, 0.1, 0.5))
    assert sessions.trace("one") == "a trace"
    assert sessions.last_answer("one", EngineStatus("ready", "A")).tokens_per_s == 4.0
    assert sessions.last_answer("one", EngineStatus("ready", "B")) is None
    assert sessions.last_answer("two", EngineStatus("ready", "A")) is None


def test_beyond_its_capacity_the_oldest_session_goes(sessions):
    first = sessions.begin("a")
    sessions.begin("b")
    sessions.begin("c")
    assert first.is_set()
    assert not sessions.is_current("a", first)


def test_each_session_has_one_file_and_it_goes_with_the_session(sessions):
    first = sessions.save_trace("one", Saved())
    other = sessions.save_trace("two", Saved())
    second = sessions.save_trace("one", Saved())
    assert len({first, second, other}) == 3
    assert not first.exists() and second.exists() and other.exists()
    sessions.forget("one")
    assert not second.exists() and other.exists()
