"""What tokens tell stands beside each other, kind by kind, and a part that only some pictures have is theirs alone."""

import pytest
import torch

from mllm_demo.training import probe
from mllm_demo.training.concepts import CONCEPTS
from mllm_demo.training.tower import DenseHeads
from tests.unit.training.test_tower import SIDE, WIDTH, target_of


@pytest.fixture
def pictures(art):
    """Eight of a kind, none of which alone need have all there is to tell; tokens of noise."""
    return {kind: [(torch.randn(1, SIDE**2, WIDTH), target_of(art, kind, i)) for i in range(8)] for kind in probe.TOLD}


def heads_that_say(count: int) -> DenseHeads:
    heads = DenseHeads(WIDTH, torch.randn(len(CONCEPTS), WIDTH))
    heads.read.weight.data.zero_(), heads.read.bias.data.zero_()
    heads.read.bias.data.split(heads.sizes)[5][count - 1] = 1
    return heads


def test_every_kind_of_picture_has_what_it_is_asked_to_tell(pictures):
    told = probe.told(lambda pixels: pixels, heads_that_say(1), pictures)
    assert set(told) == {(kind, what) for kind, parts in probe.TOLD.items() for what in parts}
    missing = [key for key, share in told.items() if not 0 <= share <= 1]  # no number where nothing is to be told
    assert not missing


def test_counts_are_those_of_the_pictures(pictures):
    crowd = {"crowd": pictures["crowd"]}
    counts = torch.cat([target.counts[target.counts > 0] + 1 for _, target in crowd["crowd"]])
    for count in (2, 3, 4):
        told = probe.told(lambda pixels: pixels, heads_that_say(count), crowd)
        assert told["crowd", "several"] == pytest.approx((counts == count).float().mean().item(), abs=1e-4) != 0


def test_bundles_stand_beside_each_other():
    columns = {"one": {("same", "several"): 0.5, ("text", "whole"): 0.25}}
    columns["two"] = {key: share / 2 for key, share in columns["one"].items()}
    assert probe.table(columns).splitlines() == [
        "| picture | told | one | two |",
        "| --- | --- | --- | --- |",
        "| same | several | 0.500 | 0.250 |",
        "| text | whole | 0.250 | 0.125 |",
    ]
