"""What every image token should say: a table of concepts, and dense targets for every cell of a scene.

A cell that holds the centre of an object should look, to the language model, like the word for it; of a coloured
shape or a part of a chart, like the sum of its colour and its kind; of one letter, like that letter; anything else is
"empty". Beside that a cell should tell the box of what it centres, its letters, how many of what it shows there are
in the picture, and the value, rank and colour of the chart's part that it belongs to. Whose a letter is that has its
centre near the border of two cells is not to be seen for certain: it may be either's, but not both's or neither's
(`settled`). It knows nothing of towers or optimizers.
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
BORDER = 0.1  # of a cell: how near its border a letter's centre may be told by the next one
SURER = 0.1  # by how much, of a logarithm, that one must be surer: it may hold another such letter
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
    `[cells]`, counts from 0 for one; ranks: int64 `[cells, 2]` from the largest and from the smallest value; written:
    int64 `[cells * LETTER_SLOTS, 6]` every letter (no more than there are slots) in reading order, as in `letters`,
    with its line, the row of cells that holds its centre and another that may, and the column and another; zeros after
    the last.
    """

    centred: np.ndarray
    covered: np.ndarray
    letters: np.ndarray
    boxes: np.ndarray
    values: np.ndarray
    colours: np.ndarray
    counts: np.ndarray
    ranks: np.ndarray
    written: np.ndarray

    def map(self, change: Callable) -> "CellTargets":
        """The same of every target."""
        return CellTargets(*map(change, self))

    @property
    def labelled(self):
        """bool `[cells]`: where letters of a chart's label or table's row stand."""
        return (self.letters > 0).any(-1) & (self.values != UNKNOWN)

    @property
    def near_letters(self) -> torch.Tensor:
        """bool `[B, cells]` of a batch: where a letter is or, being near a border, might be."""
        name, _, *places = self.written.unbind(-1)
        near, side = torch.zeros_like(self.covered, dtype=torch.bool), int(self.covered.shape[1] ** 0.5)
        batch, which = (name > 0).nonzero(as_tuple=True)
        for row in places[:2]:
            for column in places[2:]:
                near[batch, (row * side + column)[batch, which]] = True
        return near


def concept_of(thing: Thing) -> int:
    if thing.kind in ("letter", "space"):
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


def letters_of(scene: Scene) -> list[Thing]:
    """The letters and spaces of a picture as they are read: by the height of their line, then from left to right."""
    return sorted(scene.of_kind("letter", "space"), key=lambda thing: (round(thing.centre[1] / 4), thing.centre[0]))


def written_in(scene: Scene, side: int) -> np.ndarray:
    """`CellTargets.written` of a scene."""
    written, cell = np.zeros((side * side * LETTER_SLOTS, 6), np.int64), scene.image.shape[0] / side
    letters = letters_of(scene)[: len(written)]
    if not letters:
        return written
    names = np.array([1 + CHARACTERS.index(letter.name) for letter in letters])
    _, lines = np.unique([(letter.box[1], letter.box[3]) for letter in letters], axis=0, return_inverse=True)
    columns, rows = np.array([letter.centre for letter in letters]).T / cell
    own, other = [], []
    for place in (rows, columns):
        near = np.rint(place)  # the border that is nearest
        held = np.floor(place).clip(0, side - 1)
        beyond = np.where(held < near, near, near - 1).clip(0, side - 1)
        own.append(held)
        other.append(np.where(np.abs(place - near) < BORDER, beyond, held))
    # Of two that are the same, side by side, a token cannot say which it tells.
    doubled = (names[1:] == names[:-1]) & (lines[1:] == lines[:-1])
    alone = ~(np.append(doubled, False) | np.insert(doubled, 0, False))
    other[1] = np.where(alone, other[1], own[1])
    written[: len(letters)] = np.stack((names, lines.ravel(), own[0], other[0], own[1], other[1]), -1)
    return written


@torch.no_grad()
def settled(target: CellTargets, logits: torch.Tensor) -> CellTargets:
    """`target` of a batch, where letters near a border are whose they are told by more; `logits` `[B, cells,
    LETTER_SLOTS, 1 + letters]`: what is told of the cells' letters. A line moves to other rows as one."""
    name, line, row, other_row, column, other_column = target.written.unbind(-1)  # [B, letters] each
    side = int(logits.shape[1] ** 0.5)
    here = name > 0
    # The logarithm of how likely a cell tells of a letter in any of its slots, [B, cells, 1 + letters].
    told = (1 - (1 - logits.float().softmax(-1)).prod(-2)).clamp(min=1e-6).log()

    def told_at(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        cells = rows * side + columns
        return told.flatten(1).gather(1, cells * told.shape[-1] + name) * here

    lean = told_at(other_row, column) - told_at(row, column)
    lean = torch.zeros_like(lean).scatter_add(1, line, lean)
    row = torch.where(lean.gather(1, line) > SURER, other_row, row)
    surer = told_at(row, other_column) - told_at(row, column) > SURER
    column = torch.where(surer, other_column, column)

    cell = torch.where(here, row * side + column, -1)
    slot = (cell[:, :, None] == cell[:, None, :]).tril(-1).sum(-1)  # how many of its cell come before
    kept = here & (slot < LETTER_SLOTS)
    letters = torch.zeros_like(target.letters)
    batch, which = kept.nonzero(as_tuple=True)
    letters[batch, cell[batch, which], slot[batch, which]] = name[batch, which]

    many, former = ((held > 0).sum(-1) for held in (letters, target.letters))
    first = len(CONCEPTS) - len(CHARACTERS)
    of_letters = torch.where(many == 1, first + letters[..., 0] - 1, torch.where(many == 0, 0, UNKNOWN))
    lettered = ((many > 0) | (former > 0)) & target.boxes.isnan().any(-1)
    return target._replace(letters=letters, centred=torch.where(lettered, of_letters, target.centred))


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
    for letter in letters_of(scene):
        held.setdefault(at(letter), []).append(letter)
    for where, inside_it in held.items():
        for slot, letter in enumerate(inside_it[:LETTER_SLOTS]):
            letters[where][slot] = 1 + CHARACTERS.index(letter.name)
        if np.isnan(boxes[where]).any():
            # Several letters have no one word for them; the language model learns to read such cells by itself.
            centred[where] = concept_of(inside_it[0]) if len(inside_it) == 1 else UNKNOWN
    arrays = (centred, covered, letters, boxes, values, colours, counts, ranks)
    return CellTargets(*(array.reshape(side * side, *array.shape[2:]) for array in arrays), written_in(scene, side))
