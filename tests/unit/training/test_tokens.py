"""Cells of several letters are to look like all of them, the first one most, those of a chart's label like its part's
colour and rank, too, the middle of one of several things like their number, and each like what it was otherwise."""

import torch

from mllm_demo.training.concepts import LETTER_SLOTS, UNKNOWN, CellTargets
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.things import COLOURS
from mllm_demo.training.tokens import FAINTER, NUMBER_SHARE, NUMBERS, SHARE, WORDS, Letters

WIDTH = 96
A, B = (1 + CHARACTERS.index(letter) for letter in "ab")


def held(*letters: int) -> torch.Tensor:
    return torch.tensor([[*letters, *[0] * (LETTER_SLOTS - len(letters))]])


def target(letters: torch.Tensor, **fields: torch.Tensor) -> CellTargets:
    """Cells that hold `letters` and, but for `fields`, nothing else that is known."""
    cells = len(letters)
    unknown = torch.full((cells,), UNKNOWN)
    known = {"centred": torch.zeros(cells).long(), "covered": torch.zeros(cells).long(), "letters": letters,
             "boxes": torch.full((cells, 4), torch.nan), "values": unknown, "colours": unknown, "counts": unknown,
             "ranks": torch.full((cells, 2), UNKNOWN)}  # fmt: skip
    return CellTargets(**known | fields)


def made() -> Letters:
    torch.manual_seed(0)
    return Letters(torch.randn(len(CHARACTERS), WIDTH), torch.randn(len(WORDS), WIDTH))


def in_full(shares: torch.Tensor) -> torch.Tensor:
    """Of letters, with no share of any word."""
    return torch.nn.functional.pad(shares, (0, len(WORDS)))


def test_the_first_letter_counts_most_and_a_double_one_twice():
    shares = made().shares(torch.cat((held(A, B), held(A, A), held())))
    assert shares[0, A - 1] == 1 and shares[0, B - 1] == FAINTER and shares[0].sum() == 1 + FAINTER
    assert shares[1, A - 1] == 1 + FAINTER and not shares[2].any()


def test_what_is_wanted_differs_from_what_was_in_the_directions_of_letters_alone():
    letters, former = made(), torch.randn(1, WIDTH)
    wanted = letters.wanted(former, in_full(letters.shares(held(A, B))))
    across = torch.eye(WIDTH) - letters.directions @ letters.directions.T
    torch.testing.assert_close(wanted @ across, former @ across, atol=1e-4, rtol=1e-4)
    # Solved for its letters, it holds these two and nothing else.
    found = torch.linalg.lstsq(letters.told.T, (wanted @ (torch.eye(WIDTH) - across)).T).solution[:, 0]
    torch.testing.assert_close(found, in_full(letters.shares(held(A, B)))[0], atol=1e-3, rtol=1e-3)


def test_a_cell_of_one_letter_is_kept_and_one_of_two_is_changed():
    letters, former = made(), torch.randn(2, WIDTH)
    cells = torch.cat((held(A), held(A, B)))
    same = letters.losses(former, former, target(cells))
    assert same["kept"] == 0 and same["shown"] > 0.1
    wanted = torch.cat((former[:1], letters.wanted(former[1:], in_full(letters.shares(cells[1:])))))
    there = letters.losses(wanted, former, target(cells))
    assert there["kept"] == 0 and there["shown"] < 1e-6 and there["told"] < same["told"]


def test_the_cells_of_a_label_hold_the_words_that_pick_its_part_out():
    """Three labels' cells: the largest, red; neither end, no colour; the only one there is. Then text of no chart."""
    values = torch.tensor([40, 30, 20, UNKNOWN])
    colours = torch.tensor([list(COLOURS).index("red"), UNKNOWN, UNKNOWN, UNKNOWN])
    ranks = torch.tensor([[0, 3], [1, 2], [0, 0], [UNKNOWN, UNKNOWN]])
    words = made().words(target(held(A, B).repeat(4, 1), values=values, colours=colours, ranks=ranks))
    named = [{" ".join(WORDS[i]).split()[0]: share.item() for i, share in enumerate(row) if share} for row in words]
    share = torch.tensor(SHARE).item()
    assert named == [{"red": share, "largest": share}, {}, {"largest": share, "smallest": share}, {}]


def test_the_middle_of_one_of_several_things_holds_their_number_and_no_other_cell_does():
    counts, centred = torch.tensor([0, 1, 5, 1, UNKNOWN]), torch.tensor([7, 7, 7, 0, 0])
    words = made().words(target(held().repeat(5, 1), counts=counts, centred=centred))
    numbers = words[:, -len(NUMBERS) :]
    assert not words[:, : -len(NUMBERS)].any() and not numbers[[0, 3, 4]].any()
    assert numbers[1].tolist() == [NUMBER_SHARE, 0, 0, 0, 0] and numbers[2].tolist() == [0, 0, 0, 0, NUMBER_SHARE]


def test_what_holds_a_word_is_wanted_to_change_and_its_neighbour_to_stay():
    letters, former = made(), torch.randn(2, WIDTH)
    cells = target(held().repeat(2, 1), counts=torch.tensor([2, 2]), centred=torch.tensor([7, 0]))
    shares = torch.cat((letters.shares(cells.letters), letters.words(cells)), -1)
    wanted = torch.cat((letters.wanted(former[:1], shares[:1]), former[1:]))
    same, there = letters.losses(former, former, cells), letters.losses(wanted, former, cells)
    assert same["kept"] == there["kept"] == 0 and same["shown"] > 0.1 and there["shown"] < 1e-6


def test_pictures_without_such_cells_are_no_reason_to_fail():
    letters, former = made(), torch.randn(3, WIDTH)
    losses = letters.losses(former + 0.1, former, target(torch.cat((held(), held(B), held()))))
    assert losses["kept"] > 0 and losses["shown"] == 0 and losses["told"] == 0


def test_both_letters_are_read_from_what_is_wanted():
    letters = made()
    shown = letters.read(letters.wanted(torch.zeros(1, WIDTH), in_full(letters.shares(held(B, A)))))
    assert shown.tolist() == [[B - 1, A - 1]]
