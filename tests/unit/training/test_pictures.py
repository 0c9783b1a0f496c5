"""Records become pictures that show every task, every stage and the quantities that were logged."""

import json
import shutil

import matplotlib
import pytest

from mllm_demo.training import pictures

matplotlib.use("Agg")


def words(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


@pytest.fixture
def run(tmp_path):
    for stage, quantity in (("stage1", "answers"), ("stage3-4", "balance")):
        folder = tmp_path / stage
        folder.mkdir()
        rows = [{"step": step, "samples/s": 1.0, quantity: 1 / step} for step in (10, 20)]
        lines = [json.dumps(row) for row in [*rows, {"step": 20, "held-out": {}}]]
        (folder / "log.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_curves_name_their_stages_and_follow_each_other(run):
    figure = pictures.curves(run)
    assert {"loss on answers", "imbalance of experts"} <= words(figure)
    assert {pictures.TITLES["stage1"], pictures.TITLES["stage3-4"]} <= words(figure)  # though no panel has both
    first, second = figure.axes
    assert list(first.lines[0].get_xdata()) == [10, 20]
    assert list(second.lines[0].get_xdata()) == [30, 40]


def test_runs_on_the_way_to_one_version_are_one_colour_and_one_line_of_the_legend(run):
    (run / "stage3-4").rename(run / "print-4")
    shutil.copytree(run / "print-4", run / "asked-4")
    figure = pictures.curves(run)
    first, second = figure.axes[1].lines
    assert first.get_color() == second.get_color() != figure.axes[0].lines[0].get_color()
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [pictures.TITLES["stage1"], pictures.TITLES["print-4"]]


def test_experts_shows_the_router_that_tells_most():
    sites = ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.7.self_attn", "model.layers.7.mlp"]
    shares = [[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.25, 0.75]], [[0.5, 0.5], [0.5, 0.5]]]
    rows = [{"task": task, "masked": [0.3, 0.1], "random others": 0.1} for task in ("naming", "reading")]
    report = {"sites": sites, "information": [0.1, 0.1, 0.4, 0.1], "expected": [0.01] * 4}
    figure = pictures.experts(report | {"shares": shares, "masking": rows})
    shown = words(figure)
    assert {"naming", "reading", "90%", "75%", "expert 1", "Tokens of each task by expert (attention 7)"} <= shown
    bars = [[bar.get_width() for bar in group] for group in figure.axes[2].containers]
    assert bars == [[0.3, 0.1], [0.3, 0.1], [0.1, 0.1]] and len({bar.get_y() for bar in figure.axes[2].patches}) == 6


def test_versions_show_every_goal_the_most_missed_first():
    rows = [{"version": v, "right": {"chart": chart, "naming": 0.8}} for v, chart in (("0.4", 0.2), ("0.5", 0.4))]
    report = {"items": 200, "goals": {"naming": 0.7, "chart": 0.75}, "versions": rows}
    first, second = pictures.versions(report).axes
    assert (first.get_title(), second.get_title()) == ("chart", "naming")
    right, goal = first.lines
    assert list(right.get_ydata()) == [0.2, 0.4] and list(goal.get_ydata()) == [0.75, 0.75]
