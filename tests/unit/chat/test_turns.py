"""Turns are handed out in the order of asking, one at a time."""

import threading

import pytest

from mllm_demo.chat.turns import TurnQueue
from mllm_demo.errors import QueueFullError


def test_the_first_does_not_wait():
    with TurnQueue(1).join() as place:
        assert list(place.waiting()) == [] and place.ahead == 0


def test_everybody_hears_of_every_change_of_place():
    turns = TurnQueue(4)
    first, second, third = turns.join(), turns.join(), turns.join()
    heard = third.waiting()
    assert next(heard) == 2
    with first:
        pass
    assert next(heard) == 1
    with second:
        pass
    assert list(heard) == []


def test_one_who_leaves_from_the_middle_lets_the_others_move_up():
    turns = TurnQueue(4)
    first, second, third = turns.join(), turns.join(), turns.join()
    with second:
        pass
    assert (first.ahead, third.ahead) == (0, 1)


def test_more_than_the_limit_may_not_wait_but_the_one_served_does_not_count():
    turns = TurnQueue(2)
    places = [turns.join() for _ in range(3)]
    with pytest.raises(QueueFullError, match="2 people are already waiting"):
        turns.join()
    with places[0]:
        pass
    turns.join()
    turns.join(even_if_full=True)


def test_one_who_stops_waits_no_longer():
    turns = TurnQueue(2)
    turns.join()
    stop = threading.Event()
    waiting = turns.join().waiting(stop.is_set)
    assert next(waiting) == 1
    stop.set()
    assert list(waiting) == []


def test_turns_never_overlap_and_come_in_order():
    turns = TurnQueue(10)
    busy = threading.Lock()
    order: list[int] = []
    places = [turns.join() for _ in range(6)]

    def take(number: int) -> None:
        with places[number] as place:
            list(place.waiting())
            assert busy.acquire(blocking=False)
            order.append(number)
            busy.release()

    threads = [threading.Thread(target=take, args=(number,)) for number in reversed(range(6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert order == list(range(6)) and len(turns) == 0
