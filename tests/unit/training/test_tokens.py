"""Cells with letters are to look like all of them, the first one most, and otherwise like what they were."""

import pytest
import torch

from mllm_demo.training.concepts import LETTER_SLOTS, UNKNOWN, CellTargets
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.tokens import ALONE, FAINTER, Letters

WIDTH = 96
A, B = (1 + CHARACTERS.index(letter) for letter in "ab")


def held(*letters: int) -> torch.Tensor:
    return torch.tensor([[*letters, *[0] * (LETTER_SLOTS - len(letters))]])


def made() -> Letters:
    torch.manual_seed(0)
    return Letters(torch.randn(len(CHARACTERS), WIDTH))


def test_the_first_letter_counts_most_a_double_one_twice_and_an_only_one_more():
    shares = made().shares(torch.cat((held(A, B), held(A, A), held(B), held())))
    assert shares[0, A - 1] == 1 and shares[0, B - 1] == FAINTER and shares[0].sum() == 1 + FAINTER
    assert shares[1, A - 1] == 1 + FAINTER and not shares[3].any()
    assert shares[2, B - 1] == torch.tensor(ALONE) and shares[2].count_nonzero() == 1


def test_what_is_wanted_differs_from_what_was_in_the_directions_of_letters_alone():
    letters, former = made(), torch.randn(1, WIDTH)
    wanted = letters.wanted(former, letters.shares(held(A, B)))
    across = torch.eye(WIDTH) - letters.directions @ letters.directions.T
    torch.testing.assert_close(wanted @ across, former @ across, atol=1e-4, rtol=1e-4)
    # Solved for its letters, it holds these two and nothing else.
    found = torch.linalg.lstsq(letters.table.T, (wanted @ (torch.eye(WIDTH) - across)).T).solution[:, 0]
    torch.testing.assert_close(found, letters.shares(held(A, B))[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shown", [(A,), (A, B)], ids=["one", "two"])
def test_a_cell_of_letters_is_changed_and_one_without_is_kept(shown):
    letters, former = made(), torch.randn(2, WIDTH)
    cells = torch.cat((held(), held(*shown)))
    near = (cells > 0).any(-1)
    same = letters.losses(former, former, cells, near)
    assert same["kept"] == 0 and same["shown"] > 0.1
    wanted = torch.cat((former[:1], letters.wanted(former[1:], letters.shares(cells[1:]))))
    there = letters.losses(wanted, former, cells, near)
    assert there["kept"] == 0 and there["shown"] < 1e-6 and there["told"] < same["told"]


def test_pictures_without_letters_are_no_reason_to_fail():
    letters, former = made(), torch.randn(3, WIDTH)
    near = torch.zeros(3, dtype=torch.bool)
    losses = letters.losses(former + 0.1, former, held().repeat(3, 1), near)
    assert losses["kept"] > 0 and losses["shown"] == 0 and losses["told"] == 0


def test_an_empty_cell_that_might_hold_a_letter_need_not_stay_what_it_was():
    letters, former = made(), torch.randn(2, WIDTH)
    changed = former + torch.tensor([[1.0], [0.0]])
    assert letters.losses(changed, former, held().repeat(2, 1), torch.tensor([True, False]))["kept"] == 0
    assert letters.losses(changed, former, held().repeat(2, 1), torch.tensor([False, True]))["kept"] > 0.1


def test_both_letters_are_read_from_what_is_wanted():
    letters = made()
    shown = letters.read(letters.wanted(torch.zeros(1, WIDTH), letters.shares(held(B, A))))
    assert shown.tolist() == [[B - 1, A - 1]]


def test_perfect_tokens_hold_the_letters_of_the_picture_and_are_what_they_were_elsewhere():
    letters, tokens = made(), torch.randn(1, 4, WIDTH)
    where = torch.cat((held(A, B), held(), held(B), held()))[None]
    blank = torch.full((1, 4), UNKNOWN)
    written = torch.zeros(1, 4 * LETTER_SLOTS, 6, dtype=torch.long)
    written[0, :3] = torch.tensor([[A, 0, 0, 0, 0, 0], [B, 0, 0, 0, 0, 0], [B, 1, 1, 1, 0, 0]])
    target = CellTargets(
        centred=blank, covered=blank, letters=where, boxes=torch.full((1, 4, 4), torch.nan), values=blank,
        colours=blank, counts=blank, ranks=blank[..., None].expand(1, 4, 2), written=written,
    )  # fmt: skip
    perfect = letters.perfect(tokens, target, torch.zeros(1, 4, LETTER_SLOTS, 1 + len(CHARACTERS)))[0]
    assert torch.equal(perfect[[1, 3]], tokens[0, [1, 3]])
    assert letters.read(perfect[[0]]).tolist() == [[A - 1, B - 1]] and letters.read(perfect[[2]])[0, 0] == B - 1
