"""Stage 0 teaches what answers will need: boxes as their digits, how many there are, and which part is the largest."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mllm_demo.training.concepts import CONCEPTS, DIGITS, UNKNOWN, VALUE_BINS, CellTargets, box_digits, cell_targets
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.questions import ask
from mllm_demo.training.scenes import HELD_OUT, render
from mllm_demo.training.tower import DENSE, LABELLED, DenseHeads, dense_accuracy, overlap

WIDTH, SIDE = 32, 12


def test_the_digits_of_a_cell_are_those_of_the_answer_about_its_thing(art):
    seen = 0
    for index in range(20):
        scene = render(art, HELD_OUT, 3, index, kind="single")
        boxes = torch.from_numpy(cell_targets(scene, SIDE).boxes)
        digits = box_digits(boxes[~boxes.isnan().any(-1)])[0]
        edges = 10 * digits[:, 0] + digits[:, 1]
        assert f"[{', '.join(map(str, edges.tolist()))}]" in ask(np.random.default_rng(0), scene, "grounding").answer
        seen += 1
    assert seen == 20


def test_the_right_edge_of_the_picture_is_ten_tens():
    assert box_digits(torch.tensor([0.0, 0.095, 0.996, 1.0])).tolist() == [[0, 0], [1, 0], [10, 0], [10, 0]]


def target_of(art, kind: str, index: int = 0) -> CellTargets:
    made = cell_targets(render(art, HELD_OUT, 3, index, kind=kind), SIDE)
    return CellTargets(*(torch.from_numpy(array)[None] for array in made))


def test_heads_that_write_every_digit_right_lose_nothing(art):
    target = target_of(art, "objects")
    heads = DenseHeads(WIDTH, torch.randn(len(CONCEPTS), WIDTH))
    tens, units = (box_digits(target.boxes.nan_to_num())[..., place] for place in (0, 1))
    boxed = ~target.boxes.isnan().any(-1)
    sure = [50 * torch.nn.functional.one_hot(d, n).float() for d, n in zip((tens, units), DIGITS, strict=True)]
    heads.box_digits = lambda tokens: tuple(logits[boxed] for logits in sure)
    losses = heads(torch.randn(1, SIDE**2, WIDTH), target)
    assert losses["tens"] < 1e-6 and losses["units"] < 1e-6
    heads.box_digits = lambda tokens: tuple(-logits[boxed] for logits in sure)
    assert heads(torch.randn(1, SIDE**2, WIDTH), target)["tens"] > 1


def test_every_thing_tells_how_many_of_it_there_are(art):
    for index in range(12):
        scene = render(art, HELD_OUT, 3, index, kind="shapes")
        counts = cell_targets(scene, SIDE).counts
        names = [thing.name for thing in scene.of_kind("shape")]
        assert {*counts.tolist()} - {UNKNOWN} <= {names.count(name) - 1 for name in names}
        for thing in scene.of_kind("shape"):
            x, y = (int(v * SIDE / scene.image.shape[0]) for v in thing.centre)
            centres = [tuple(int(v * SIDE / scene.image.shape[0]) for v in other.centre) for other in scene.things]
            if centres.count((x, y)) == 1:
                assert counts[y * SIDE + x] == names.count(thing.name) - 1


@pytest.mark.parametrize("kind", ["bar", "line", "pie", "table"])
def test_the_cells_of_a_label_and_of_its_part_tell_the_rank_of_its_value(art, kind):
    for index in range(8):
        scene = render(art, HELD_OUT, 3, index, kind="chart", chart=kind)
        values, ranks = scene.chart.values, cell_targets(scene, SIDE).ranks.reshape(SIDE, SIDE, 2)
        seen = {tuple(pair) for pair in ranks.reshape(-1, 2).tolist() if UNKNOWN not in pair}
        assert seen == {(rank, len(values) - 1 - rank) for rank in range(len(values))}
        for part, value in zip(scene.of_kind("part"), values, strict=kind != "table"):
            x, y = (int(v * SIDE / scene.image.shape[0]) for v in part.centre)
            assert ranks[y, x, 0] == sum(other > value for other in values)


def test_a_cell_of_two_letters_is_read_where_both_are(art, monkeypatch):
    target = target_of(art, "chart")
    heads = DenseHeads(WIDTH, torch.randn(len(CONCEPTS), WIDTH))
    first, *others = heads.predictions(torch.randn(1, SIDE**2, WIDTH))
    assert ((target.letters > 0).sum(-1) == 2).sum() > 3

    def found(letters: torch.Tensor) -> tuple[float, float]:
        said = functional.one_hot(letters, len(CHARACTERS) + 1).float().flatten(-2)
        monkeypatch.setattr(heads, "predictions", lambda tokens: (first, said, *others[1:]))
        told = dense_accuracy(lambda pixels: pixels, heads, [(torch.randn(1, SIDE**2, WIDTH), target)], "cpu")
        return told["letters"], told["pairs"]

    assert found(target.letters) == (1, 1)
    second_wrong = target.letters.clone()
    second_wrong[..., 1] = 0
    letters, pairs = found(second_wrong)
    assert pairs == 0 and 0.5 < letters < 1


@pytest.mark.parametrize("kind", ["text", "chart", "shapes"])
def test_what_later_steps_keep_is_a_number_for_every_kind_of_picture_and_teaches_its_tokens(art, kind):
    torch.manual_seed(0)
    heads = DenseHeads(WIDTH, torch.randn(len(CONCEPTS), WIDTH))
    tokens = torch.randn(1, SIDE**2, WIDTH, requires_grad=True)
    losses = heads(tokens, target_of(art, kind))
    sum(weight * losses[name] for name, weight in DENSE.items()).backward()
    assert tokens.grad.isfinite().all() and tokens.grad.abs().sum() > 0


def test_a_cell_of_a_label_counts_as_several_other_cells_of_its_part(art):
    heads, target = DenseHeads(WIDTH, torch.randn(len(CONCEPTS), WIDTH)), target_of(art, "chart")
    known, labels = target.values != UNKNOWN, (target.letters > 0).any(-1)
    logits = torch.zeros(1, SIDE**2, VALUE_BINS)
    right, lost = {}, torch.tensor(VALUE_BINS).log()
    for name, told in {"labels": known & labels, "others": known & ~labels}.items():
        sure = torch.where(told[..., None], 100 * functional.one_hot(target.values.clamp(min=0), VALUE_BINS), logits)
        heads.predictions = lambda tokens, sure=sure: (
            *DenseHeads.predictions(heads, tokens)[:3], sure, *DenseHeads.predictions(heads, tokens)[4:]
        )  # fmt: skip
        right[name] = heads(torch.randn(1, SIDE**2, WIDTH), target)["values"] / (0.4 * lost)  # the share not told
    count, others = LABELLED * (known & labels).sum(), (known & ~labels).sum()
    assert right["labels"].item() == pytest.approx((others / (count + others)).item(), abs=1e-4)
    assert right["others"].item() == pytest.approx((count / (count + others)).item(), abs=1e-4)


def test_overlap_is_intersection_over_union():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]])
    assert overlap(boxes, boxes.flip(0)).tolist() == [0.5, 0.5]
