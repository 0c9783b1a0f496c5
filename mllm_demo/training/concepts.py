"""What every image token should say: a table of concepts, and dense targets for every cell of a scene.

A cell that holds the centre of an object should look, to the language model, like the word for it; of a coloured
shape or a part of a chart, like the sum of its colour and its kind; of one letter, like that letter; anything else is
"empty". Beside that a cell should tell the box of what it centres, its letters, how many of what it shows there are in
the picture, and the value, rank and colour of the chart's part that it belongs to. It knows nothing of towers or
optimizers.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from mllm_demo.training.art import OBJECT_NAMES
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.things import COLOURS, MAX_COUNT, SHAPES, Scene, Thing

EMPTY = " empty"
PARTS = ("bar", "point", "slice")
LETTER_SLOTS = 4
VALUE_BINS = 51  # steps of 2 % of the range
RANKS = 5  # of a chart's parts by value, 0 the first
DIGITS = (11, 10)  # of an edge of a box in percent: 0 to 10 tens, 0 to 9 units
UNKNOWN = -100  # no target: torch's cross entropy skips it
CONCEPTS: tuple[tuple[str, ...], ...] = (
    (EMPTY,),
    *((f" {name}",) for name in OBJECT_NAMES),
    *((f" {colour}", f" {kind}") for colour in COLOURS for kind in (*SHAPES, *PARTS)),
    *((letter,) for letter in CHARACTERS),
)
_INDEX = {words: index for index, words in enumerate(CONCEPTS)}
_COLOUR_INDEX = {colour: index for index, colour in enumerate(COLOURS)}


class CellTargets(NamedTuple):
    """Targets of the cells of one picture, in reading order; `UNKNOWN` (boxes: NaN) where there is none.

    centred, covered: int64 `[cells]` concept; letters: int64 `[cells, LETTER_SLOTS]` 0 none, else 1 + index into
    `CHARACTERS`; boxes: float32 `[cells, 4]` (x0, y0, x1, y1) as shares of the picture; values, colours, counts: int64
    `[cells]`, counts from 0 for one; ranks: int64 `[cells, 2]` from the largest and from the smallest value.
    """

    centred: np.ndarray
    covered: np.ndarray
    letters: np.ndarray
    boxes: np.ndarray
    values: np.ndarray
    colours: np.ndarray
    counts: np.ndarray
    ranks: np.ndarray

    def map(self, change: Callable) -> "CellTargets":
        """The same of every target."""
        return CellTargets(*map(change, self))

    @property
    def labelled(self):
        """bool `[cells]`: where letters of a chart's label or table's row stand."""
        return (self.letters > 0).any(-1) & (self.values != UNKNOWN)


def concept_of(thing: Thing) -> int:
    if thing.kind == "letter":
        return _INDEX[(thing.name,)]
    return _INDEX[(f" {thing.colour}", f" {thing.name}") if thing.colour else (f" {thing.name}",)]


def word_embeddings(embeddings: torch.Tensor, tokenizer, words: Iterable[str]) -> torch.Tensor:
    """`embeddings [vocab, hidden]` → `[words, hidden]`: mean over a word's pieces."""
    return torch.stack(
        [embeddings[tokenizer(word, add_special_tokens=False).input_ids].float().mean(0) for word in words]
    )


def concept_embeddings(embeddings: torch.Tensor, tokenizer) -> torch.Tensor:
    """`embeddings [vocab, hidden]` → `[concepts, hidden]`: mean over a word's pieces, sum over its words."""
    return torch.stack([word_embeddings(embeddings, tokenizer, words).sum(0) for words in CONCEPTS])


def box_digits(boxes: torch.Tensor) -> torch.Tensor:
    """Boxes `[..., 4]` as shares of the picture → int64 `[..., 4, 2]`, tens and units of each edge in percent, as an
    answer writes it."""
    percent = (100 * boxes).round().clamp(0, 100).long()
    return torch.stack((percent // 10, percent % 10), dim=-1)


def cell_targets(scene: Scene, side: int) -> CellTargets:
    """What each of the `side * side` cells of the scene should tell."""
    size, cell = scene.image.shape[0], scene.image.shape[0] / side
    centred, covered = np.zeros((2, side, side), np.int64)
    letters = np.zeros((side, side, LETTER_SLOTS), np.int64)
    boxes = np.full((side, side, 4), np.nan, np.float32)
    values, colours, counts = np.full((3, side, side), UNKNOWN, np.int64)
    ranks = np.full((side, side, 2), UNKNOWN, np.int64)
    middles = (np.arange(side) + 0.5) * cell

    def inside(box) -> np.ndarray:
        x0, y0, x1, y1 = box
        return ((middles >= y0) & (middles < y1))[:, None] & ((middles >= x0) & (middles < x1))[None, :]

    def at(thing: Thing) -> tuple[int, int]:
        x, y = thing.centre
        return min(max(int(y / cell), 0), side - 1), min(max(int(x / cell), 0), side - 1)

    if (chart := scene.chart) is not None:
        order = np.argsort(np.argsort(chart.values))
        parts = scene.of_kind("part")
        for index, (region, value, colour) in enumerate(zip(chart.regions, chart.values, chart.colours, strict=True)):
            where = inside(region)
            if parts:
                where |= inside(parts[index].box)
                where[at(parts[index])] = True
            for letter in scene.of_kind("letter"):  # a line of text may be lower than any cell's middle
                x, y = letter.centre
                if region[0] <= x < region[2] and region[1] <= y < region[3]:
                    where[at(letter)] = True
            values[where] = round(value / chart.top * (VALUE_BINS - 1))
            ranks[where] = (len(order) - 1 - order[index], order[index])
            if colour is not None:
                colours[where] = _COLOUR_INDEX[colour]
    number = Counter(thing.name for thing in scene.of_kind("object", "shape", "part"))
    for thing in scene.of_kind("object", "shape", "part"):
        concept, where = concept_of(thing), at(thing)
        covered[inside(thing.box)] = concept
        centred[where] = concept
        boxes[where] = np.asarray(thing.box) / size
        counts[inside(thing.box)] = counts[where] = min(number[thing.name], MAX_COUNT) - 1
    held: dict[tuple[int, int], list[Thing]] = {}
    for letter in scene.of_kind("letter"):
        held.setdefault(at(letter), []).append(letter)
    for where, inside_it in held.items():
        inside_it.sort(key=lambda thing: (round(thing.centre[1] / 4), thing.centre[0]))
        for slot, letter in enumerate(inside_it[:LETTER_SLOTS]):
            letters[where][slot] = 1 + CHARACTERS.index(letter.name)
        if np.isnan(boxes[where]).any():
            # Several letters have no one word for them; the language model learns to read such cells by itself.
            centred[where] = concept_of(inside_it[0]) if len(inside_it) == 1 else UNKNOWN
    arrays = (centred, covered, letters, boxes, values, colours, counts, ranks)
    return CellTargets(*arrays).map(lambda array: array.reshape(side * side, *array.shape[2:]))
