"""Reads weights tensor by tensor, so that a loading process holds no more of a file than the tensor in work.

It knows nothing of models.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import modeling_utils


@contextmanager
def unmapped() -> Iterator[None]:
    """Inside the `with`, transformers reads safetensors files instead of mapping them into memory.

    Every page of a mapped file that was touched counts as the process's own, and stays as long as one tensor that was
    not quantized still lies in it. transformers reads likewise where mapping is not to be had.
    """
    opened = modeling_utils.safe_open
    modeling_utils.safe_open = lambda file, **settings: opened(file, **{**settings, "backend": "pread"})
    try:
        yield
    finally:
        modeling_utils.safe_open = opened
