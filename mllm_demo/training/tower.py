"""Stage 0: teaches the vision tower and the connector without ever running the language model.

The connector learns to answer with the language model's own input embedding of what each cell shows, and dense heads on
its output, thrown away afterwards, make sure that the boxes, letters, values and colours are in there too.

    python -m mllm_demo.training.tower --steps 1250
    torchrun --nproc-per-node 2 -m mllm_demo.training.tower --threads 1
    python -m mllm_demo.training.tower --init assets/training/tower.safetensors    # go on from what was taught before
    python -m mllm_demo.training.tower --export                                    # writes that file

Resumes from `runs/tower/last.pt`; uses a GPU when there is one. It knows nothing of questions or experts.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from mllm_demo.models.bundled.tower import imagenet_state_dict
from mllm_demo.training import art
from mllm_demo.training.base import TAUGHT_FILE, build_model, imagenet_weights, load_taught, read_taught, save_taught
from mllm_demo.training.concepts import (
    CONCEPTS,
    DIGITS,
    LETTER_SLOTS,
    RANKS,
    UNKNOWN,
    VALUE_BINS,
    CellTargets,
    box_digits,
    cell_targets,
    concept_embeddings,
    settled,
)
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.runs import Run, add_flags, begin, leave_processes, teach
from mllm_demo.training.scenes import KINDS, SPLITS, render
from mllm_demo.training.things import COLOURS, MAX_COUNT

FROZEN_STAGES = 3  # edges and textures: most of the backward cost, least to learn
# What tokens must go on telling when they learn something else ("aligned": the choice among names), and how much of its
# loss here counts there.
DENSE = {"aligned": 0.5, "letters": 0.25, "values": 0.5, "counts": 2.0, "ranks": 0.5, "colours": 0.5, "tens": 0.1}
LABELLED = 6.0  # how much a cell of a chart's label counts where its part is to be told: it is one of a dozen


class Cells(Dataset):
    """Pictures with what each of their cells should tell, ready for the tower; `kinds`: how often each is drawn."""

    def __init__(
        self, art_folder: Path, split: str, seed: int, count: int, model, processor, start: int = 0, kinds=KINDS
    ):  # fmt: skip
        self.kinds = kinds
        self.art_folder, self.split, self.seed = art_folder, SPLITS[split], seed
        self.count, self.start = count, start
        self.image_processor = processor.image_processor
        self.side = model.config.vision_config.side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        index += self.start
        kind = str(np.random.default_rng((self.seed, 78, index)).choice(list(self.kinds), p=list(self.kinds.values())))
        scene = render(art.load(self.art_folder), self.split, self.seed, index, kind=kind)
        pixels = self.image_processor(scene.image, return_tensors="pt").pixel_values[0]
        return pixels, cell_targets(scene, self.side).map(torch.from_numpy)


class DenseHeads(nn.Module):
    """Losses of one batch; holds the throw-away heads and the frozen table of concept embeddings."""

    def __init__(self, width: int, table: torch.Tensor):
        super().__init__()
        letters = LETTER_SLOTS * (1 + len(CHARACTERS))
        self.sizes = (len(CONCEPTS), letters, 4, VALUE_BINS, len(COLOURS), MAX_COUNT, 2 * RANKS)
        self.read = nn.Linear(width, sum(self.sizes))
        self.digits = nn.Linear(width, 4 * sum(DIGITS))
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.register_buffer("table", table, persistent=False)
        weights = torch.ones(len(CONCEPTS))
        weights[0] = 0.08  # most cells are empty
        self.register_buffer("weights", weights)
        letter_weights = torch.ones(1 + len(CHARACTERS))
        letter_weights[0] = 0.2
        self.register_buffer("letter_weights", letter_weights)
        count_weights = torch.ones(MAX_COUNT)
        count_weights[0] = 0.25  # most things are one of their kind
        self.register_buffer("count_weights", count_weights, persistent=False)

    def similarity(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens `[..., width]` → scaled cosine to every concept `[..., concepts]`."""
        return self.scale * functional.normalize(tokens, dim=-1) @ functional.normalize(self.table, dim=-1).T

    def predictions(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """tokens `[B, cells, width]` → logits of what is covered, letters, boxes, values, colours, counts, ranks."""
        return self.read(functional.layer_norm(tokens, tokens.shape[-1:])).split(self.sizes, dim=-1)

    def box_digits(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """tokens `[..., width]` → logits of the tens `[..., 4, 11]` and units `[..., 4, 10]` of the box's edges."""
        logits = self.digits(functional.layer_norm(tokens, tokens.shape[-1:]))
        return logits.unflatten(-1, (4, -1)).split(DIGITS, dim=-1)

    def letters(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens `[B, cells, width]` → logits of letters `[B, cells, LETTER_SLOTS, 1 + letters]`."""
        return self.predictions(tokens)[1].unflatten(-1, (LETTER_SLOTS, -1))

    def forward(self, tokens: torch.Tensor, target: CellTargets) -> dict[str, torch.Tensor]:
        tokens = tokens.float()
        covered, letters, boxes, values, colours, counts, ranks = self.predictions(tokens)
        letters, labelled = letters.unflatten(-1, (LETTER_SLOTS, -1)), target.labelled
        target = settled(target, letters)

        def cross_entropy(logits, wanted, weights=None):
            if not (wanted != UNKNOWN).any():
                return logits.sum() * 0
            return functional.cross_entropy(logits.flatten(0, -2), wanted.flatten(), weights, ignore_index=UNKNOWN)

        def of_parts(logits, wanted):
            """The mean over cells of a chart's parts, `wanted` int64 `[B, cells, fields]`."""
            each = functional.cross_entropy(
                logits.flatten(0, -2), wanted.flatten(), ignore_index=UNKNOWN, reduction="none"
            ).view_as(wanted)
            shares = (1 + (LABELLED - 1) * labelled[..., None]) * (wanted != UNKNOWN)
            return (each * shares).sum() / shares.sum().clamp(min=1)

        known = target.centred > 0
        boxed = ~target.boxes.isnan().any(-1)
        wanted = self.table[target.centred[known]]
        tens, units = self.box_digits(tokens[boxed])
        digits = box_digits(target.boxes[boxed])
        return {
            "covered": cross_entropy(covered, target.covered, self.weights),
            "aligned": 2 * cross_entropy(self.similarity(tokens), target.centred, self.weights),
            "distance": 0.1 * (tokens[known] - wanted).square().mean() / self.table.var(),
            "letters": 2 * cross_entropy(letters, target.letters, self.letter_weights),
            "boxes": 10 * (boxes.sigmoid()[boxed] - target.boxes[boxed]).abs().mean(),
            "tens": cross_entropy(tens, digits[..., 0]),
            "units": 0.3 * cross_entropy(units, digits[..., 1]),
            "values": 0.4 * of_parts(values, target.values[..., None]),
            "colours": 0.4 * of_parts(colours, target.colours[..., None]),
            "counts": 0.4 * cross_entropy(counts, target.counts, self.count_weights),
            "ranks": 0.4 * of_parts(ranks.unflatten(-1, (2, RANKS)), target.ranks),
        }


def dense_heads(model, processor, device: torch.device, taught: dict | None = None) -> DenseHeads:
    """Heads for the tokens that `model` reads; `taught`: the state dict of heads, which may be fewer."""
    table = concept_embeddings(model.get_input_embeddings().weight.detach(), processor.tokenizer)
    heads = DenseHeads(table.shape[-1], table)
    if taught:
        heads.load_state_dict(taught, strict=False)
    return heads.to(device)


@torch.no_grad()
def dense_accuracy(see, heads: DenseHeads, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Shares on held-out pictures: cells with a thing and empty cells named right, letters right (one by one; all, in
    cells of two; all there are, in pictures with any), boxes with an intersection over union of 0.5, values within 5 %
    of the range, colours, counts (all; above one), ranks (all; both in cells of labels)."""
    hits: dict[str, list[torch.Tensor]] = {}
    for pixels, target in loader:
        target = target.map(lambda array: array.to(device))
        tokens = see(pixels).float()
        _, letters, boxes, values, colours, counts, ranks = heads.predictions(tokens)
        letters, labelled = letters.unflatten(-1, (LETTER_SLOTS, -1)), target.labelled
        target = settled(target, letters)
        named = heads.similarity(tokens).argmax(-1) == target.centred
        boxed = ~target.boxes.isnan().any(-1)
        read = letters.argmax(-1) == target.letters
        near = (values.argmax(-1) - target.values).abs() <= 0.05 * (VALUE_BINS - 1)
        counted = counts.argmax(-1) == target.counts
        first, second = boxes.sigmoid()[boxed], target.boxes[boxed]
        ranked = ranks.unflatten(-1, (2, RANKS)).argmax(-1) == target.ranks
        tens, units = (logits.argmax(-1) for logits in heads.box_digits(tokens[boxed]))
        written = (10 * tens + units) / 100
        for name, right in {
            "things": named[boxed],
            "empty": named[target.centred == 0],
            "letters": read[target.letters > 0],
            "pairs": read.all(-1)[(target.letters > 0).sum(-1) == 2],
            "whole": read.all(-1).all(-1)[(target.letters > 0).any(-1).any(-1)],
            "boxes": overlap(first, second) >= 0.5,
            "written boxes": overlap(written, second) >= 0.5,
            "tens": tens == box_digits(second)[..., 0],
            "values": near[target.values != UNKNOWN],
            "colours": (colours.argmax(-1) == target.colours)[target.colours != UNKNOWN],
            "counts": counted[target.counts != UNKNOWN],
            "several": counted[target.counts > 0],
            "ranks": ranked[target.ranks != UNKNOWN],
            "labels": ranked.all(-1)[labelled],
        }.items():
            hits.setdefault(name, []).append(right.flatten())
    return {name: round(torch.cat(parts).float().mean().item(), 4) for name, parts in hits.items()}


def overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (x0, y0, x1, y1), `[n, 4]` each → `[n]`."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-9)


def cells_to_learn(options: argparse.Namespace, run: Run, world: int, model, processor, kinds=KINDS) -> DataLoader:
    """This process's share of the pictures that `run` has not seen yet."""
    done = run.step * options.batch_size
    count = options.steps * options.batch_size - done
    data = Cells(options.art, "train", options.seed, count, model, processor, done, kinds)
    data = Subset(data, range(run.rank, len(data), world))
    return DataLoader(data, options.batch_size // world, num_workers=options.workers, prefetch_factor=4)


def cells_held_out(
    options: argparse.Namespace, run: Run, model, processor, count: int, size: int, kinds=KINDS
) -> list[tuple[torch.Tensor, CellTargets]]:
    """`count` held-out pictures in batches of `size`, for the first process; nothing for others."""
    if run.rank > 0:
        return []
    data = Cells(options.art, "held-out", 1, count, model, processor, kinds=kinds)
    return list(DataLoader(data, size, num_workers=options.workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, steps=650, batch_size=48, lr=1e-3, out=Path("runs/tower"))
    parser.add_argument("--init", type=Path, help="start from this file of an earlier run, with a fresh optimizer")
    parser.add_argument("--freeze", type=int, default=FROZEN_STAGES, help="stages that stay as they are, of 7")
    parser.add_argument("--export", action="store_true", help=f"only write {TAUGHT_FILE.name} from the last checkpoint")
    options = parser.parse_args()
    rank, world, device = begin(options)
    art.prepare(options.art)

    model, processor = build_model(options.base)
    tower, connector = model.model.vision_tower.to(device), model.model.multi_modal_projector.to(device)
    former = read_taught(options.init) if options.init else None
    heads = dense_heads(model, processor, device, former and former["heads"])
    taught = {"tower": tower, "connector": connector, "heads": heads}
    if former:
        load_taught(model, former)
    else:
        tower.load_state_dict(imagenet_state_dict(imagenet_weights(options.base)), strict=False)
    nn.ModuleList([tower.stem, *tower.stages[: options.freeze]]).requires_grad_(False)
    tower.to(memory_format=torch.channels_last)
    learning = [p for module in taught.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.lr, weight_decay=0.02)
    run = Run(options.out, taught | {"optimizer": optimizer}, options.steps, options.batch_size, rank)

    if options.export:
        save_taught({name: module.state_dict() for name, module in taught.items()}, TAUGHT_FILE)
        return

    def see(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            pixels = pixels.to(device, memory_format=torch.channels_last)
            return connector(tower(pixels).last_hidden_state)

    loader = cells_to_learn(options, run, world, model, processor)
    held_out = cells_held_out(options, run, model, processor, 240, 48)
    model.eval()  # batch statistics stay those of ImageNet

    def losses_of(pixels: torch.Tensor, target: CellTargets) -> dict[str, torch.Tensor]:
        return heads(see(pixels), target.map(lambda array: array.to(device)))

    measured = partial(dense_accuracy, see, heads, held_out, device)
    teach(run, optimizer, loader, losses_of, measured, options, warmup=50, clip=5.0)
    leave_processes()


if __name__ == "__main__":
    main()
