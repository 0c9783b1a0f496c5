"""Charts of a plotting library show what they are said to show, the same for the same number."""

import numpy as np
import pytest

from mllm_demo.training import plotted
from mllm_demo.training.questions import ask
from mllm_demo.training.words import TEST_WORDS

SHADES = {  # of matplotlib's default cycle
    "blue": (31, 119, 180),
    "orange": (255, 127, 14),
    "green": (44, 160, 44),
    "red": (214, 39, 40),
    "purple": (148, 103, 189),
}


def area(scene, colour: str) -> int:
    return int((scene.image == SHADES[colour]).all(-1).sum())


@pytest.mark.parametrize("kind", ["bar", "line", "pie"])
def test_the_same_number_draws_the_same_chart_and_another_number_another(kind):
    first, again, other = (plotted.render(TEST_WORDS, 2, index, kind) for index in (7, 7, 8))
    assert np.array_equal(first.image, again.image) and first.chart == again.chart
    assert first.image.dtype == np.uint8 and first.image.ndim == 3
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_colours_cover_areas_in_proportion_to_values():
    """Bars are equally wide, and slices are shares of one circle: a part's pixels tell its value."""
    for kind in ("bar", "pie"):
        told = 0
        for index in range(12):
            scene = plotted.render(TEST_WORDS, 3, index, kind)
            if None in scene.chart.colours:
                continue
            areas = np.array([area(scene, colour) for colour in scene.chart.colours], float)
            values = np.array(scene.chart.values, float)
            # What labels, grid lines and smooth edges cover is not a part's colour.
            np.testing.assert_allclose(areas / areas.sum(), values / values.sum(), atol=0.04)
            told += 1
        assert told >= 4


def test_values_lie_below_the_axis_end_and_every_question_of_charts_can_be_asked():
    rng = np.random.default_rng(0)
    for index in range(12):
        scene = plotted.render(TEST_WORDS, 4, index, ("bar", "line", "pie")[index % 3])
        chart = scene.chart
        assert max(chart.values) <= chart.top <= 105 and len(set(chart.values)) == len(chart.values)
        assert all(label in TEST_WORDS for label in chart.labels)
        questions = [ask(rng, scene, "chart", held_out=True) for _ in range(20)]
        assert {question.task for question in questions if question} == {"chart"}
