"""Sets what `evaluate` wrote about several models side by side, on the same items, as a table in Markdown.

    python -m mllm_demo.training.compare shipped.json 16-bit.json single.json

The first report is compared with each other one: the difference of their means over task families, with a 95 %
interval from resampling items in pairs. It knows nothing of models.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mllm_demo.cli import run
from mllm_demo.errors import DataError

# The four kinds of task whose conflict Awaker2.5-VL (Long et al., arXiv:2411.10669) is about.
FAMILIES = {
    "questions": ("naming", "presence", "counting", "colour", "shape", "relations"),
    "places": ("grounding", "pointing"),
    "reading": ("reading",),
    "charts": ("chart", "table"),
}
SAME = ("split", "seed", "items")  # what reports must share
RESAMPLED = 4000


def read(file: Path) -> dict:
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict) or not {*SAME, "tasks"} <= report.keys():
        raise DataError(f"{file} is not a report of training.evaluate --out; write it anew.")
    return report


def families_mean(hits: dict[str, np.ndarray]) -> np.ndarray:
    """Mean over families of the mean over their tasks; `hits [..., items]` per task → `[...]`."""
    return np.mean([np.mean([hits[task].mean(-1) for task in tasks], axis=0) for tasks in FAMILIES.values()], axis=0)


def difference(first: dict, other: dict, seed: int = 0) -> tuple[float, float, float]:
    """How far `first` is ahead on the families' mean, and the ends of its 95 % interval."""
    rng = np.random.default_rng(seed)
    drawn: tuple[dict, dict] = ({}, {})
    plain: tuple[dict, dict] = ({}, {})
    for task in sum(FAMILIES.values(), ()):
        pair = [np.array(report["tasks"][task]["hits"], float) for report in (first, other)]
        picked = rng.integers(0, len(pair[0]), (RESAMPLED, len(pair[0])))
        for side in (0, 1):
            plain[side][task], drawn[side][task] = pair[side], pair[side][picked]
    spread = families_mean(drawn[0]) - families_mean(drawn[1])
    low, high = np.quantile(spread, (0.025, 0.975))
    return float(families_mean(plain[0]) - families_mean(plain[1])), float(low), float(high)


def table(reports: dict[str, dict]) -> str:
    """A row per task: right answers of every report, the first with its interval and its answers to a grey picture."""
    first, *others = reports
    lines = [f"| task | {first} | 95 % interval | {' | '.join([*others, 'grey picture'])} |"]
    lines.append("|---" * (4 + len(others)) + "|")
    for task, row in reports[first]["tasks"].items():
        rest = [f"{reports[name]['tasks'][task]['right']:.2f}" for name in others]
        blind = f"{row['blind']:.2f}" if "blind" in row else ""
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(f"| {task} | {row['right']:.2f} | {interval} | {' | '.join([*rest, blind])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    files = parser.parse_args().reports
    reports = {file.stem: read(file) for file in files}
    first, *others = reports.values()
    for report in others:
        if {name: report[name] for name in SAME} != {name: first[name] for name in SAME}:
            raise DataError("These reports are of different items; evaluate all models with the same flags.")
    print(table(reports))
    for name, report in list(reports.items())[1:]:
        ahead, low, high = difference(first, report)
        print(f"{files[0].stem} - {name}, mean of task families: {ahead:+.3f} ({low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    sys.exit(run(main))
