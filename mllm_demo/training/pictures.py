"""Draws what training left behind: curves of a run, what versions answered, how experts divide the work.

    python -m mllm_demo.training.pictures                      # all, from the records in assets/training/
    python -m mllm_demo.training.pictures --curves runs/chat   # the curves of one's own run

It knows nothing of models; the records are what `chat`, `experts` and `evaluate` wrote.
"""

import argparse
import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mllm_demo.figures.palette import expert_colors
from mllm_demo.training.scoring import interval

RECORDS = Path(__file__).resolve().parents[2] / "assets" / "training"
SINGLE = "the single LoRA, II and III"
# The line of the legend for a run, by its log's folder: some versions took several runs, one after another.
TITLES = {
    "stage1": "I: reader and single LoRA",
    "stage2-4": "II: experts copied, routers",
    "stage3-4": "III, to 0.4",
    "more-4": "to 0.5",
    "later-4": "to 0.6",
    "words-4": "to 0.7",
    "detail-4": "to 0.8",
    "average-4": "to 0.9",
    "strokes-4": "to 0.10",
    **dict.fromkeys(("longer-4", "labels-4", "extremes-4", "again-4", "talk-4"), "to 0.11"),
    **dict.fromkeys(("onward-4", "middle-4", "picked-4", "firsts-4", "pages-4", "mended-4"), "to 0.12"),
    **dict.fromkeys(("print-4", "asked-4", "opened-4"), "to 0.13"),
    **dict.fromkeys(("settled-4", "spelled-4", "common-4", "branch-4", "read-4"), "to 0.14"),
    **dict.fromkeys(("further-4", "gaps-4", "crowds-4", "adapter-4", "layer-4"), "to 0.15"),
    "counted-4": "to 0.16",
    "kept-4": "to 0.17",
    "stage2-1": SINGLE,
    "stage3-1": SINGLE,
}
LABELS = {
    "answers": "loss on answers", "columns": "loss on columns, in the middle", "values": "loss on values of charts",
    "counts": "loss on counts", "extremes": "loss on charts' extremes", "text": "drift of text alone, nats",
    "balance": "imbalance of experts",
}  # fmt: skip
PANELS = 3  # side by side


def read_curve(file: Path) -> list[dict]:
    """The logged steps of a run, oldest first; other rows are left out."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if "step" in row and "samples/s" in row]


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """`count` panels of so many inches, row by row, and room for a legend below them."""
    rows = math.ceil(count / columns)
    size = (width * columns, height * rows + 0.7)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(grid.flatten())
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def curves(folder: Path) -> Figure:
    """One panel per quantity; stages follow each other by their steps, the single LoRA beside the experts."""
    runs = {name: read_curve(folder / name / "log.jsonl") for name in TITLES if (folder / name / "log.jsonl").exists()}
    shown = [name for name in LABELS if any(name in row for rows in runs.values() for row in rows)]
    figure, axes = panels(len(shown), min(len(shown), PANELS), 4.2, 3.2)
    starts, ends = {}, {"4": 0, "1": 0}
    for name, logged in runs.items():
        tracks = ends if name == "stage1" else [name.rpartition("-")[2]]
        starts[name] = max(ends[track] for track in tracks)
        for track in tracks:
            ends[track] = starts[name] + logged[-1]["step"]
    titles = list(dict.fromkeys(TITLES[name] for name in runs))
    for axis, quantity in zip(axes, shown, strict=True):
        for name, logged in runs.items():
            points = [(starts[name] + row["step"], row[quantity]) for row in logged if quantity in row]
            if points:
                again, hue = divmod(titles.index(TITLES[name]), 10)  # ten hues, then the same ones pale
                look = {"color": pyplot.get_cmap("tab20")(2 * hue + again)}
                if TITLES[name] == SINGLE:
                    look = {"color": "black", "linestyle": ":"}
                axis.plot(*zip(*points, strict=True), label=TITLES[name], **look)
        axis.set(xlabel="step", title=LABELS[quantity], yscale="log" if quantity != "balance" else "linear")
        if quantity != "balance":
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(lambda value, position: f"{value:.3g}")
        axis.tick_params(axis="y", which="both", labelsize="x-small")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes for line in axis.lines}  # no panel has every run
    lines = [lines[title] for title in titles if title in lines]
    figure.legend(handles=lines, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def versions(report: dict) -> Figure:
    """One panel per goal, those that the last version misses first: what every version answered, and the goal."""
    names, items, goals = [row["version"] for row in report["versions"]], report["items"], report["goals"]
    right = {task: np.array([row["right"][task] for row in report["versions"]]) for task in goals}
    shown = sorted(goals, key=lambda task: right[task][-1] - goals[task])
    figure, axes = panels(len(shown), math.ceil(len(shown) / 2), 2.7, 2.15)
    for axis, task in zip(axes, shown, strict=True):
        low, high = np.array([interval(round(share * items), items) for share in right[task]]).T
        axis.fill_between(names, low, high, alpha=0.2, linewidth=0, label="95 % interval")
        axis.plot(names, right[task], "o-", markersize=3, label=f"right, of {items}")
        axis.axhline(goals[task], linestyle=":", color="black", label="goal")
        axis.set(title=task, ylim=(0, 1))
        axis.tick_params(labelsize="x-small")
        axis.tick_params(axis="x", labelrotation=90)
        axis.grid(alpha=0.3)
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def where(site: str) -> str:
    """A site's module path as people say it: layer and block."""
    layer = re.search(r"\.(\d+)\.", site)
    return f"{'attention' if 'attn' in site else 'MLP'} {layer.group(1) if layer else ''}".strip()


def experts(report: dict) -> Figure:
    """Information per layer, tasks by experts at the router that tells most, and what masking does to each task."""
    sites, information = report["sites"], np.array(report["information"])
    expected, shares = np.array(report["expected"]), np.array(report["shares"])  # (sites), (sites, tasks, experts)
    tasks = [row["task"] for row in report["masking"]]
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 4), layout="constrained", width_ratios=(1.1, 1, 1.1)
    )
    for block in ("attention", "MLP"):
        chosen = [index for index, site in enumerate(sites) if where(site).startswith(block)]
        left.plot(information[chosen], "o-", markersize=3, label=block)
    left.plot(expected[chosen], ":", color="grey", label="by chance")
    left.set(xlabel="layer", ylabel="bits", title="What a router's choice tells about the task")
    left.legend(frameon=False, fontsize="small")
    left.grid(alpha=0.3)

    most = int(information.argmax())
    image = middle.imshow(shares[most], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares[most]):
        middle.text(column, row, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.5 else "black")
    middle.set_yticks(range(len(tasks)), tasks)
    middle.set_xticks(range(shares.shape[2]), [f"expert {index}" for index in range(shares.shape[2])])
    for label, colour in zip(middle.get_xticklabels(), expert_colors(shares.shape[2]), strict=True):
        label.set_color(colour)
    middle.set_title(f"Tokens of each task by expert ({where(sites[most])})")
    figure.colorbar(image, ax=middle, format="{x:.0%}", fraction=0.05)

    damage = np.array([row["masked"] for row in report["masking"]])  # (tasks whose experts are masked, tasks)
    own, heights = np.diag(damage), np.arange(len(tasks))
    masked = {
        "the experts it prefers": (own, None),
        "those another task prefers (mean)": ((damage.sum(0) - own) / (len(tasks) - 1), "silver"),
        "random others": ([row["random others"] for row in report["masking"]], "gainsboro"),
    }
    for place, (label, (change, color)) in enumerate(masked.items()):
        right.barh(heights + 0.27 * (place - 1), change, 0.27, color=color, label=label)
    right.set_yticks(heights, tasks)
    right.invert_yaxis()
    right.set(xlabel="change of the loss on its answers", title="What each task loses without …")
    labels = right.get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower right", ncols=len(masked), frameon=False, fontsize="small")
    right.grid(alpha=0.3, axis="x")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=Path, default=RECORDS / "curves", help="folder of stages with their log.jsonl")
    parser.add_argument("--experts", type=Path, default=RECORDS / "experts.json", help="what training.experts wrote")
    parser.add_argument("--versions", type=Path, default=RECORDS / "versions.json", help="what versions answered")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder for the pictures")
    options = parser.parse_args()
    matplotlib.use("Agg")
    curves(options.curves).savefig(options.out / "curves.png", dpi=130)
    versions(json.loads(options.versions.read_text())).savefig(options.out / "versions.png", dpi=130)
    if options.experts.exists():
        experts(json.loads(options.experts.read_text())).savefig(options.out / "experts.png", dpi=130)
    else:
        print(f"{options.experts} is not there yet; training.experts --out writes it.")


if __name__ == "__main__":
    main()
