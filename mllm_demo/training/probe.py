"""What image tokens tell, by the linear heads that came with them, one kind of held-out picture after another.

    python -m mllm_demo.training.probe                                    # the bundled model
    python -m mllm_demo.training.probe assets/bundled runs/more --items 60 --kinds same crowd

Heads that learned beside the tokens tell within a minute what is in them, before the language model is asked: what they
miss is hardly ever answered right. It knows nothing of questions or of what is answered.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from mllm_demo.models.bundled.assembly import load_vision
from mllm_demo.models.bundled.weights import ASSETS, VISION_FILE
from mllm_demo.training import art
from mllm_demo.training.adapted import reader_of
from mllm_demo.training.base import build_model, read_heads
from mllm_demo.training.concepts import CellTargets
from mllm_demo.training.things import CROWD, PAGE
from mllm_demo.training.tower import Cells, DenseHeads, dense_accuracy, dense_heads

# What few cells of a kind of picture have to tell is left out.
TOLD = {
    "single": ("things", "written boxes"),
    "same": ("things", "several"),
    CROWD: ("things", "several"),
    "shapes": ("things", "several"),
    "objects": ("things", "written boxes"),
    "text": ("letters", "whole"),
    "chart": ("letters", "pairs", "labels", "ranks", "values", "colours"),
    PAGE: ("letters", "pairs"),
}
BATCH = 20


def told(
    see, heads: DenseHeads, pictures: Mapping[str, Iterable[tuple[torch.Tensor, CellTargets]]]
) -> dict[tuple[str, str], float]:
    """The share that `heads` tell right, by kind of picture and what there is to tell (see `dense_accuracy`). `see`:
    pixels as `pictures` hold them, `[B, ...]`, to tokens `[B, cells, width]`."""
    device = next(heads.parameters()).device
    right = {kind: dense_accuracy(see, heads, loader, device) for kind, loader in pictures.items()}
    return {(kind, what): right[kind][what] for kind in pictures for what in TOLD[kind]}


def table(columns: dict[str, dict[tuple[str, str], float]]) -> str:
    """Markdown, a column of `told` for each name."""
    lines = [["picture", "told", *columns], ["---"] * (2 + len(columns))]
    lines += [[*row, *(f"{column[row]:.3f}" for column in columns.values())] for row in next(iter(columns.values()))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="*", default=[ASSETS], help="folders as assets/bundled is")
    parser.add_argument("--items", type=int, default=60, help="pictures of every kind")
    parser.add_argument("--kinds", nargs="+", choices=TOLD, default=list(TOLD), help="of pictures")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--base", type=Path, default=Path("runs/base"))
    options = parser.parse_args()
    heads_of = {bundle: read_heads(bundle)["dense"] for bundle in options.bundles}
    art.prepare(options.art)
    model, processor = build_model(options.base)
    tower, reader = model.eval().model.vision_tower, reader_of(model)

    @torch.no_grad()
    def see(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return reader(tower.joined(pixels))

    pictures: dict[str, list[tuple[torch.Tensor, CellTargets]]] = {}
    for kind in options.kinds:
        data = Cells(options.art, "held-out", options.seed, options.items, model, processor, kinds={kind: 1.0})
        pictures[kind] = list(tqdm(DataLoader(data, BATCH), desc=f"drawing {kind}", leave=False))
    columns = {}
    for bundle, states in heads_of.items():
        load_vision(model, bundle / VISION_FILE.name)
        heads = dense_heads(model, processor, torch.device("cpu"), states)
        shown = {kind: tqdm(batches, desc=f"{bundle}, {kind}", leave=False) for kind, batches in pictures.items()}
        columns[str(bundle)] = told(see, heads, shown)
    print(table(columns))


if __name__ == "__main__":
    main()
