"""A letter near the border of two cells may be either's, but never both's or neither's."""

import numpy as np
import pytest
import torch

from mllm_demo.training.concepts import (
    CONCEPTS,
    EMPTY,
    LETTER_SLOTS,
    UNKNOWN,
    CellTargets,
    cell_targets,
    concept_of,
    settled,
)
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.scenes import HELD_OUT, TRAIN, render
from mllm_demo.training.things import PAGE, Scene, Thing

SIDE, CELL = 3, 32


def letter(name: str, x: float, y: float) -> Thing:
    return Thing("letter", name, (x - 4, y - 6, x + 4, y + 6))


def targets_of(scene: Scene, side: int = 12) -> CellTargets:
    return CellTargets(*(torch.from_numpy(array)[None] for array in cell_targets(scene, side)))


def targets(*things: Thing) -> CellTargets:
    return targets_of(Scene(np.zeros((SIDE * CELL, SIDE * CELL, 3), np.uint8), things), SIDE)


def telling(texts: dict[int, str], side: int = SIDE) -> torch.Tensor:
    """Logits of a reader that is sure of these letters, by cell, and of nothing anywhere else."""
    logits = torch.zeros(1, side**2, LETTER_SLOTS, 1 + len(CHARACTERS))
    logits[..., 0] = 10
    for cell, text in texts.items():
        for slot, name in enumerate(text):
            logits[0, cell, slot, 1 + CHARACTERS.index(name)] = 20
    return logits


def read(target: CellTargets) -> dict[int, str]:
    words = ["".join(CHARACTERS[i - 1] for i in row if i) for row in target.letters[0].tolist()]
    return {cell: word for cell, word in enumerate(words) if word}


def test_a_letter_near_a_border_is_whose_it_is_told_by_more():
    target = targets(letter("a", 31, 16), letter("b", 48, 16))
    assert read(target) == {0: "a", 1: "b"}
    assert read(settled(target, telling({0: "a", 1: "b"}))) == {0: "a", 1: "b"}
    moved = settled(target, telling({1: "ab"}))
    assert read(moved) == {1: "ab"}
    # The cell that lost it is empty now, and two letters have no word of their own.
    assert moved.centred[0, 0] == CONCEPTS.index((EMPTY,)) and moved.centred[0, 1] == UNKNOWN


def test_a_letter_in_the_middle_of_a_cell_is_told_there_whatever_is_read():
    target = targets(letter("a", 16, 16), letter("b", 48, 16))
    assert read(settled(target, telling({1: "ab"}))) == {0: "a", 1: "b"}


def test_a_cell_of_two_that_keeps_one_looks_like_that_one():
    a, b = letter("a", 12, 16), letter("b", 31, 16)
    moved = settled(targets(a, b), telling({0: "a", 1: "b"}))
    assert read(moved) == {0: "a", 1: "b"}
    assert moved.centred[0, :2].tolist() == [concept_of(a), concept_of(b)]


def test_a_line_near_a_border_goes_to_other_rows_as_one():
    line = [letter(name, 16 + CELL * index, 31) for index, name in enumerate("abc")]
    target = targets(*line)
    assert read(target) == {0: "a", 1: "b", 2: "c"}
    # Two of three are read below, so all are told there: the word stays in one piece.
    assert read(settled(target, telling({3: "a", 4: "b", 2: "c"}))) == {3: "a", 4: "b", 5: "c"}
    assert read(settled(target, telling({0: "a", 1: "b", 5: "c"}))) == {0: "a", 1: "b", 2: "c"}


def test_of_a_double_letter_none_is_moved():
    target = targets(letter("o", 31, 16), letter("o", 48, 16))
    assert read(settled(target, telling({1: "oo"}))) == {0: "o", 1: "o"}


def test_a_thing_that_shares_a_cell_with_letters_is_still_what_it_centres():
    star = Thing("shape", "star", (0, 0, 32, 32), "red")
    moved = settled(targets(star, letter("a", 31, 16)), telling({1: "a"}))
    assert read(moved) == {1: "a"} and moved.centred[0, 0] == concept_of(star)


def test_letters_are_told_near_where_they_are_or_might_be():
    near = targets(letter("a", 31, 16), letter("b", 80, 63)).near_letters[0]
    assert near.nonzero().flatten().tolist() == [0, 1, 5, 8]


@pytest.mark.parametrize("kind", ["text", "chart", PAGE])
def test_a_reader_that_tells_all_moves_nothing_and_no_letter_is_lost_but_where_there_are_too_many(art, kind):
    compared = 0
    for index in range(96):
        scene = render(art, TRAIN, 5, index, kind=kind)
        target = targets_of(scene)
        torch.manual_seed(index)
        moved = settled(target, torch.randn(1, 144, LETTER_SLOTS, 1 + len(CHARACTERS)))
        if any((held.letters > 0).all(-1).any() for held in (target, moved)):
            continue  # a letter more might have had no slot
        same = settled(target, telling(read(target), side=12))
        assert torch.equal(same.letters, target.letters) and torch.equal(same.centred, target.centred)
        before, after = (sorted(held.letters[held.letters > 0].tolist()) for held in (target, moved))
        assert before == after
        compared += 1
    assert compared >= 2


def test_gaps_between_words_and_after_lines_are_told_like_letters_and_text_is_read_off_cells_as_it_stands(art):
    several = 0
    for index in range(200):
        scene = render(art, HELD_OUT, 6, index, kind="text")
        lettered = targets_of(scene).letters[0]
        if len(scene.lines) < 2 or (lettered > 0).all(-1).any():
            continue
        # Row of cells after row, what is told is what is written, with a space wherever a word ends but the last.
        said = "".join(CHARACTERS[i - 1] for i in lettered.flatten().tolist() if i)
        assert said == " ".join(scene.lines)
        several += 1
    assert several >= 10
