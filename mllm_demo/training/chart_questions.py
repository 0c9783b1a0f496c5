"""Asks about charts and tables and knows the answers. It knows nothing of pictures, tokens or models."""

import numpy as np

from mllm_demo.training.things import CHART_PARTS, Chart, Scene
from mllm_demo.training.wording import quoted
from mllm_demo.training.words import TRAIN_WORDS

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


def named(chart: Chart) -> tuple[str, str]:
    """What kind of chart it is: the answer and its key."""
    name = NAMES[chart.kind]
    return f"This is {name}.", name.split(" ", 1)[1]


def _compared(label: str, value: int, second: str, other: int) -> tuple[str, str]:
    """The answer and its key. Two values told first are two steps; the verdict alone, which asks for both at once, was
    hardly learned."""
    key = "yes" if value > other else "no"
    return f"Here {label} is {value} and {second} is {other}, so {key}.", key


def told(rng: np.random.Generator) -> tuple[str, dict[str, str], str, str, str]:
    """(phrasing, fills, answer, key, what is said before) of two values that the question itself tells, which no
    picture has to show: of every three comparisons in charts, one concluded what did not follow."""
    label, second = (str(word) for word in rng.choice(TRAIN_WORDS, 2, replace=False))
    top = int(rng.choice((10, 100)))
    value, other = (int(number) for number in rng.choice(np.arange(1, top + 1), 2, replace=False))
    answer, key = _compared(label, value, second, other)
    before = f"{label.capitalize()} is {value} and {second} is {other}. "
    return "comparison", {"label": label, "second": second}, answer, key, before


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
        answer, key = _compared(label, value, chart.labels[other], chart.values[other])
        return fills, answer, key, 0.0
    if kind in ("label", "chart colour"):
        if colour is None:
            return None
        if kind == "label":
            return fills, f"It is {quoted(label)}.", label, 0.0
        return fills, f"It is {colour}.", colour, 0.0
    if kind == "chart kind":
        return fills, *named(chart), 0.0
    return fills, f"There are {count} {part}s.", str(count), 0.0
