"""Expert colours are distinct, stable and apart for colour-blind eyes."""

import itertools

import pytest

from mllm_demo.figures.palette import OKABE_ITO, expert_colors

# Linear RGB as a person without L cones (protan) or without M cones (deutan) sees it: Viénot, Brettel, Mollon 1999.
PROTAN = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0))
DEUTAN = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0))


def linear(color):
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def seen(color, matrix):
    rgb = linear(color)
    return [max(0.0, sum(w * c for w, c in zip(row, rgb, strict=True))) ** (1 / 2.4) for row in matrix]


@pytest.mark.parametrize("count", [0, 1, 4, 8, 9, 64])
def test_as_many_distinct_colours_as_asked_for(count):
    colors = expert_colors(count)
    assert len(set(colors)) == len(colors) == count


def test_an_expert_keeps_its_colour_however_many_there_are():
    assert expert_colors(12)[:4] == expert_colors(4) == OKABE_ITO[:4]


@pytest.mark.parametrize("matrix", [PROTAN, DEUTAN], ids=["protan", "deutan"])
def test_the_first_four_stay_apart_without_red_or_green_cones(matrix):
    for one, two in itertools.combinations(expert_colors(4), 2):
        distance = sum((a - b) ** 2 for a, b in zip(seen(one, matrix), seen(two, matrix), strict=True)) ** 0.5
        # About five times what eyes can just tell apart in this space.
        assert distance > 0.12, (one, two)
