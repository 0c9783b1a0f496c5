"""Turns the bars that transformers draws on the terminal into progress for whoever waits.

It knows nothing of what is being loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging as transformers_logging

from mllm_demo.chat.events import LoadProgress
from mllm_demo.models.fetching import Progress


@contextmanager
def bars_as_progress(progress: Progress) -> Iterator[None]:
    """Inside the `with`, every bar of transformers calls `progress` with 0 to 1 and stays off the terminal."""

    class Steps:
        def __init__(self, iterable=None, total=None, **_):
            self.items, self.total = iterable, total

        def __iter__(self):
            total = self.total or (len(self.items) if hasattr(self.items, "__len__") else 0)
            for done, item in enumerate(self.items):
                if total:
                    progress(LoadProgress(done / total, f"Loading weights: {done} of {total} tensors"))
                yield item

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __getattr__(self, _):
            return lambda *args, **kwargs: None

    previous = transformers_logging.set_tqdm_hook(lambda _, args, kwargs: Steps(*args, **kwargs))
    # The reader of GGUF files draws with tqdm itself, past that hook.
    drawn, gguf_reader.tqdm = gguf_reader.tqdm, Steps
    try:
        yield
    finally:
        gguf_reader.tqdm = drawn
        transformers_logging.set_tqdm_hook(previous)
