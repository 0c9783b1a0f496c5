"""Work on a thread reaches the reader in order, errors included, and never outlives the reader."""

import threading
import weakref

import pytest

from mllm_demo.chat.worker import in_worker


def test_everything_emitted_one_at_a_time_arrives_in_order():
    go = threading.Semaphore(0)

    def work(emit, closed):
        for number in range(3):
            go.acquire(timeout=5)
            emit(number)

    items = in_worker(work, "test")
    seen = []
    for _ in range(3):
        go.release()
        seen.append(next(items))
    assert seen == [0, 1, 2] and list(items) == []


def test_a_slow_reader_gets_the_newest_of_each_kind():
    done = threading.Event()

    def work(emit, closed):
        emit("start")
        for number in range(5):
            emit(number)
        emit("end")
        done.set()

    items = in_worker(work, "test")
    first = next(items)
    done.wait(5)
    rest = list(items)
    assert rest[-1] == "end" or first == "end"
    assert len(rest) < 6 and (4 in rest or first == 4)


def test_an_error_of_the_worker_is_raised_in_the_reader():
    def work(emit, closed):
        raise ZeroDivisionError("in the worker")

    with pytest.raises(ZeroDivisionError, match="in the worker"):
        list(in_worker(work, "test"))


def test_an_error_keeps_nothing_alive_that_the_worker_held():
    class Big:
        pass

    held = []

    def fail():
        big = Big()
        held.append(weakref.ref(big))
        raise RuntimeError("boom")

    def work(emit, closed):
        try:
            fail()
        except RuntimeError as error:
            raise ValueError("worse") from error

    with pytest.raises(ValueError) as caught:
        list(in_worker(work, "test"))
    assert isinstance(caught.value.__cause__, RuntimeError) and held[0]() is None


def test_closing_tells_the_work_and_waits_for_it():
    before = threading.active_count()
    ended = threading.Event()

    def work(emit, closed):
        emit(1)
        closed.wait(5)
        ended.set()

    items = in_worker(work, "test")
    next(items)
    items.close()
    assert ended.is_set() and threading.active_count() == before
