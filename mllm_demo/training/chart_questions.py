"""Asks about charts and tables and knows the answers. It knows nothing of pictures, tokens or models."""

import numpy as np

from mllm_demo.training.things import CHART_PARTS, Chart, Scene
from mllm_demo.training.wording import quoted

KINDS = ("largest", "smallest", "value", "comparison", "label", "chart colour", "chart kind", "chart count")
WEIGHTS = (0.17, 0.12, 0.25, 0.16, 0.1, 0.1, 0.03, 0.07)
NAMES = {"bar": "a bar chart", "line": "a line chart", "pie": "a pie chart", "table": "a table"}
VALUE_SLACK = 0.05  # of the range of values


def ask(
    rng: np.random.Generator, scene: Scene, task: str, kind: str | None = None
) -> tuple[str, dict[str, str], str, str, float] | None:
    """(phrasing, fills, answer, key, slack) about the chart ("chart") or table ("table") of the scene, or None; `kind`:
    one of `KINDS`, else as chance will have it."""
    chart = scene.chart
    if chart is None or (chart.kind == "table") != (task == "table"):
        return None
    kind = kind or str(rng.choice(KINDS, p=WEIGHTS))
    made = _make(rng, chart, kind)
    return None if made is None else (kind, *made)


def _make(rng: np.random.Generator, chart: Chart, kind: str):
    part, count = CHART_PARTS[chart.kind], len(chart.labels)
    index, other = (int(i) for i in rng.permutation(count)[:2])
    label, value, colour = chart.labels[index], chart.values[index], chart.colours[index]
    fills = {"part": part, "parts": f"{part}s", "label": label, "second": chart.labels[other], "colour": str(colour)}
    if kind in ("largest", "smallest"):
        best = int(np.argmax(chart.values) if kind == "largest" else np.argmin(chart.values))
        return fills, f"It is {quoted(chart.labels[best])}.", chart.labels[best], 0.0
    if kind == "value":
        unit = " percent" if chart.kind == "pie" else ""
        slack = 0.0 if chart.kind == "table" else VALUE_SLACK * chart.top
        return fills, f"The value is {value}{unit}.", str(value), slack
    if kind == "comparison":
        larger = value > chart.values[other]
        key = "yes" if larger else "no"
        # Two values told first are two steps; the verdict alone, which asks for both at once, was hardly learned.
        answer = f"Here {label} is {value} and {chart.labels[other]} is {chart.values[other]}, so {key}."
        return fills, answer, key, 0.0
    if kind in ("label", "chart colour"):
        if colour is None:
            return None
        if kind == "label":
            return fills, f"It is {quoted(label)}.", label, 0.0
        return fills, f"It is {colour}.", colour, 0.0
    if kind == "chart kind":
        return fills, f"This is {NAMES[chart.kind]}.", NAMES[chart.kind].split(" ", 1)[1], 0.0
    return fills, f"There are {count} {part}s.", str(count), 0.0
