"""A first-come, first-served queue of people who wait for one model.

It knows nothing of models or of what a turn is used for.
"""

import threading
from collections.abc import Callable, Iterator

from mllm_demo.errors import QueueFullError

_POLL_S = 0.1


class Place:
    """One person's place in a `TurnQueue`; a context manager that gives the place up when it is left."""

    def __init__(self, turns: "TurnQueue") -> None:
        self._turns = turns

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *exception: object) -> None:
        self._turns._leave(self)

    @property
    def ahead(self) -> int:
        """How many are served first; 0 means that the turn is ours."""
        return self._turns._ahead(self)

    def waiting(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Blocks until the turn is ours or `stopped()`, yielding the number of people ahead when it changes."""
        return self._turns._wait(self, stopped)


class TurnQueue:
    """Hands out turns in the order of `join`, one at a time.

        with turns.join() as place:
            for ahead in place.waiting():
                print(f"{ahead} ahead")
            ...  # our turn, until the `with` ends

    `limit`: how many may wait behind the one whose turn it is.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._places: list[Place] = []

    def __len__(self) -> int:
        """How many hold a turn or wait for one."""
        with self._changed:
            return len(self._places)

    def join(self, *, even_if_full: bool = False) -> Place:
        """Takes the last place; raises `QueueFullError` when `limit` people wait already."""
        with self._changed:
            if len(self._places) > self._limit and not even_if_full:
                raise QueueFullError(
                    f"{len(self._places) - 1} people are already waiting for the model; try again in a minute."
                )
            place = Place(self)
            self._places.append(place)
            return place

    def _leave(self, place: Place) -> None:
        with self._changed:
            if place in self._places:
                self._places.remove(place)
                self._changed.notify_all()

    def _ahead(self, place: Place) -> int:
        with self._changed:
            return self._places.index(place)

    def _wait(self, place: Place, stopped: Callable[[], bool]) -> Iterator[int]:
        told = 0
        while not stopped():
            with self._changed:
                ahead = self._places.index(place)
                if ahead == told and ahead > 0:
                    # The person's own stop is not part of the condition, hence the look from time to time.
                    self._changed.wait(_POLL_S)
                    continue
            if ahead == 0:
                return
            told = ahead
            yield ahead
