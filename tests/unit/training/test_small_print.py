"""The branch for detail learns to tell letters, and tells of cells without any what it told."""

import pytest
import torch

from mllm_demo.training.concepts import LETTER_SLOTS, CellTargets
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.small_print import LettersHead, accuracy, losses

WIDTH = 32


def slots(*cells: str) -> torch.Tensor:
    """`[1, cells, LETTER_SLOTS]`"""
    numbers = [[1 + CHARACTERS.index(letter) for letter in cell] for cell in cells]
    return torch.tensor([[[*held, *[0] * (LETTER_SLOTS - len(held))] for held in numbers]])


def logits_of(letters: torch.Tensor) -> torch.Tensor:
    return 20.0 * torch.nn.functional.one_hot(letters, 1 + len(CHARACTERS)).float()


def test_letters_cost_nothing_where_all_are_told_and_much_where_another_is():
    told = torch.randn(1, 3, WIDTH)
    right = losses(logits_of(slots("a", "bc", "")), told, told, slots("a", "bc", ""))
    wrong = losses(logits_of(slots("a", "cb", "")), told, told, slots("a", "bc", ""))
    assert right["letters"] < 1e-4 < 1 < wrong["letters"] and right["kept"] == 0


@pytest.mark.parametrize(("changed", "costs"), [(0, False), (1, True)], ids=["with letters", "without"])
def test_only_cells_without_letters_are_to_stay_as_they_were(changed, costs):
    letters, former = slots("ab", ""), torch.randn(1, 2, WIDTH)
    told = former.clone()
    told[0, changed] += 1.0
    assert (losses(logits_of(letters), told, former, letters)["kept"] > 0) == costs


def test_a_cell_is_right_when_all_its_letters_are():
    truth, said = slots("a", "bc", "def", "bc"), slots("a", "bd", "def", "bc")
    nothing = CellTargets(*[truth] * len(CellTargets._fields))
    found = accuracy(lambda pixels: logits_of(said), [(None, nothing._replace(letters=truth))])
    assert found == {"of 1": 1.0, "of 2": 0.5, "of 3": 1.0}


def test_the_head_learns_letters_that_the_branch_tells():
    torch.manual_seed(0)
    letters, told = slots("a", "b", "cd", ""), torch.randn(1, 4, WIDTH)
    head = LettersHead(WIDTH)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(60):
        loss = losses(head(told), told, told, letters)["letters"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head(told).argmax(-1) == letters).all()
