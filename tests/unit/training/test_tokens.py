"""Cells of several letters are to look like all of them, the first one most, those of a chart's label like its part's
colour and extreme, too, and each like what it was otherwise."""

from types import SimpleNamespace

import torch

from mllm_demo.training.concepts import LETTER_SLOTS, UNKNOWN, CellTargets
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.things import COLOURS
from mllm_demo.training.tokens import EXTREMES, FAINTER, SHARE, Letters, telling_words

WIDTH = 96
WORDS = len(COLOURS) + 2
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
    words = torch.randn(WORDS - 1, WIDTH)
    return Letters(torch.randn(len(CHARACTERS), WIDTH), torch.cat((words, -words[-1:])))


def in_full(shares: torch.Tensor) -> torch.Tensor:
    """Of letters, with no share of any word."""
    return torch.nn.functional.pad(shares, (0, WORDS))


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
    found = torch.linalg.lstsq(letters.told[:-1].T, (wanted @ (torch.eye(WIDTH) - across)).T).solution[:, 0]
    torch.testing.assert_close(found, in_full(letters.shares(held(A, B)))[0, :-1], atol=1e-3, rtol=1e-3)


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
    names = (*COLOURS, "largest", "smallest")
    words = made().words(target(held(A, B).repeat(4, 1), values=values, colours=colours, ranks=ranks))
    named = [{names[i]: share.item() for i, share in enumerate(row) if share} for row in words]
    share = torch.tensor(SHARE).item()
    assert named == [{"red": share, "largest": share}, {}, {"largest": share, "smallest": share}, {}]


def test_extremes_are_told_apart_by_what_sets_their_words_apart():
    table = torch.randn(len(COLOURS) + 2, WIDTH) + 3  # alike, as embeddings are
    vocabulary = {f" {colour}": i for i, colour in enumerate(COLOURS)}
    vocabulary |= {word: len(COLOURS) + i for i, group in enumerate(EXTREMES) for word in group}
    words = telling_words(table, lambda text, add_special_tokens: SimpleNamespace(input_ids=[vocabulary[text]]))
    torch.testing.assert_close(words[:-2], table[:-2])
    assert torch.cosine_similarity(table[-1], table[-2], dim=0) > 0.5
    assert torch.cosine_similarity(words[-1], words[-2], dim=0) < -0.999
    torch.testing.assert_close(words[-2:].norm(dim=-1), table[-2:].norm(dim=-1))


def test_the_colour_of_what_is_no_label_is_kept():
    letters, former = made(), torch.randn(1, WIDTH)
    shape = target(held(), colours=torch.tensor([0]), values=torch.tensor([30]), ranks=torch.tensor([[0, 1]]))
    assert not letters.words(shape).any()
    assert letters.losses(former, former, shape)["kept"] == 0


def test_pictures_without_such_cells_are_no_reason_to_fail():
    letters, former = made(), torch.randn(3, WIDTH)
    losses = letters.losses(former + 0.1, former, target(torch.cat((held(), held(B), held()))))
    assert losses["kept"] > 0 and losses["shown"] == 0 and losses["told"] == 0


def test_both_letters_are_read_from_what_is_wanted():
    letters = made()
    shown = letters.read(letters.wanted(torch.zeros(1, WIDTH), in_full(letters.shares(held(B, A)))))
    assert shown.tolist() == [[B - 1, A - 1]]
