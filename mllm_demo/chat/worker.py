"""Runs work on a thread and hands what it emits to a generator, its errors included.

It knows nothing of what the work is. No thread outlives its generator.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _Ended:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def _forget_locals(error: BaseException | None) -> None:
    """Empties the finished frames of `error` and its causes, which would keep models and activations alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def in_worker(work: Callable[[Callable[[T], None], threading.Event], None], name: str) -> Iterator[T]:
    """Runs `work(emit, closed)` on a thread called `name` and yields what it emits.

    An item that was not read in time gives way to a later one of its type, so a slow reader never falls
    behind. What `work` raises is raised here. Closing the generator early sets `closed` and waits for `work`
    to return, so `work` must look at it.
    """
    items: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def run() -> None:
        try:
            work(items.put, closed)
        except BaseException as error:
            _forget_locals(error)
            items.put(_Ended(error))
        else:
            items.put(_Ended())

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        while True:
            unread = [items.get()]
            while not items.empty():
                unread.append(items.get_nowait())
            newest = {type(item): index for index, item in enumerate(unread)}
            for index, item in enumerate(unread):
                if isinstance(item, _Ended):
                    if item.error is not None:
                        raise item.error
                    return
                if newest[type(item)] == index:
                    yield item
    finally:
        closed.set()
        thread.join()
