"""What an image token stands for, what a family of processors is asked about, and the answer where none is known.

It knows nothing of any processor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mllm_demo.chat.layouts.boxes import Box


@dataclass(frozen=True)
class Place:
    """The picture an image token belongs to (None: unknown) and its box in pixels of the original."""

    image_index: int | None
    box: Box | None = None


@dataclass(frozen=True)
class Prompt:
    """`ids`: the prompt; `positions`: where its image tokens are, ascending; `sizes`: (width, height) of each
    picture; `inputs`: what the processor returned."""

    ids: Sequence[int]
    positions: Sequence[int]
    sizes: Sequence[tuple[int, int]]
    inputs: Mapping

    def runs(self) -> list[tuple[int, int]]:
        """Half-open spans of neighbouring image tokens."""
        starts = [p for n, p in enumerate(self.positions) if n == 0 or self.positions[n - 1] != p - 1]
        ends = [p + 1 for n, p in enumerate(self.positions) if self.positions[n + 1 : n + 2] != [p + 1]]
        return list(zip(starts, ends, strict=True))


def by_runs(prompt: Prompt) -> list[Place]:
    """For processors nobody described: pictures told apart by runs of image tokens, no boxes.

    Where there are not as many runs as pictures (row separators inside a picture, pictures that touch), the
    picture is known only if it is the only one. Aria and DeepSeek-OCR-2 are read so too: their tokens are learned
    queries, each of which may look at the whole tile, so none has a region.
    """
    runs = prompt.runs()
    if len(prompt.sizes) == 1:
        return [Place(0)] * len(prompt.positions)
    known = len(runs) == len(prompt.sizes)
    return [Place(n if known else None) for n, (start, end) in enumerate(runs) for _ in range(start, end)]
