"""Stage 0 teaches what answers will need: boxes as their digits, and nothing that a kept model would not recognise."""

import numpy as np
import torch

from mllm_demo.training.concepts import CONCEPTS, DIGITS, CellTargets, box_digits, cell_targets
from mllm_demo.training.questions import ask
from mllm_demo.training.scenes import HELD_OUT, render
from mllm_demo.training.tower import DenseHeads, departure, overlap

WIDTH, SIDE = 32, 9


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


def target_of(art, kind: str) -> CellTargets:
    made = cell_targets(render(art, HELD_OUT, 3, 0, kind=kind), SIDE)
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


def test_departure_counts_full_and_empty_cells_alike(art):
    target = target_of(art, "single")
    before = torch.randn(1, SIDE**2, WIDTH)
    filled = (target.centred != 0)[..., None]
    assert 0 < filled.sum() < 0.1 * filled.numel()
    assert departure(before, before, target) == 0
    for moved in (filled, ~filled):  # half of the whole, however few cells it is
        assert torch.isclose(departure(torch.where(moved, 3 * before, before), before, target), torch.tensor(2.0))


def test_overlap_is_intersection_over_union():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]])
    assert overlap(boxes, boxes.flip(0)).tolist() == [0.5, 0.5]
