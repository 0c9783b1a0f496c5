"""Stage 0: teaches the vision tower and the connector without ever running the language model.

Every cell learns which thing covers it and which is centred in it (dense heads, thrown away afterwards), and the
connector learns to answer with the language model's own input embedding of that thing's name.

    python -m mllm_demo.training.tower --steps 800

Resumes from `runs/tower/last.pt`. It knows nothing of questions or experts.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from mllm_demo.models.bundled.tower import imagenet_state_dict
from mllm_demo.training import art
from mllm_demo.training.base import build_model, imagenet_weights
from mllm_demo.training.concepts import CONCEPTS, cell_targets, concept_embeddings
from mllm_demo.training.scenes import SPLITS, render

FROZEN_STAGES = 2  # edges and textures: most of the backward cost, least to learn


class Cells(Dataset):
    """Pictures with their per-cell concepts, ready for the tower."""

    def __init__(self, art_folder: Path, split: str, seed: int, count: int, model, processor, start: int = 0):
        self.art_folder, self.split, self.seed = art_folder, SPLITS[split], seed
        self.count, self.start = count, start
        self.image_processor = processor.image_processor
        self.side = model.config.vision_config.image_size // model.config.vision_config.patch_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        scene = render(art.load(self.art_folder), self.split, self.seed, self.start + index)
        pixels = self.image_processor(scene.image, return_tensors="pt").pixel_values[0]
        centred, covered = cell_targets(scene, self.side, self.side)
        return pixels, torch.from_numpy(centred), torch.from_numpy(covered)


class DenseHeads(nn.Module):
    """Loss of one batch; holds the throw-away heads and the frozen table of concept embeddings."""

    def __init__(self, hidden_size: int, table: torch.Tensor):
        super().__init__()
        self.covered = nn.Linear(hidden_size, len(CONCEPTS))
        self.centred = nn.Linear(hidden_size, len(CONCEPTS))
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.register_buffer("table", table)
        weights = torch.ones(len(CONCEPTS))
        weights[0] = 0.25  # most cells are empty
        self.register_buffer("weights", weights)

    def similarity(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens `[..., hidden]` → scaled cosine to every concept `[..., concepts]`."""
        return self.scale * functional.normalize(tokens, dim=-1) @ functional.normalize(self.table, dim=-1).T

    def forward(self, features, tokens, centred, covered) -> dict[str, torch.Tensor]:
        def cross_entropy(logits, target):
            return functional.cross_entropy(logits.flatten(0, 1), target.flatten(), self.weights)

        wanted = self.table[centred]
        return {
            "covered": cross_entropy(self.covered(features), covered),
            "centred": cross_entropy(self.centred(features), centred),
            "aligned": cross_entropy(self.similarity(tokens), centred),
            "distance": (tokens - wanted).square().mean() / self.table.var(),
        }


@torch.no_grad()
def accuracy(model, heads: DenseHeads, loader: DataLoader) -> dict[str, float]:
    """Share of cells named right by the connector: cells with a thing (`things`) and empty ones (`empty`)."""
    model.eval()
    hits = torch.zeros(2)
    totals = torch.zeros(2)
    for pixels, centred, _ in loader:
        tokens = model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state)
        right = heads.similarity(tokens).argmax(-1) == centred
        for row, mask in enumerate((centred > 0, centred == 0)):
            hits[row] += right[mask].sum()
            totals[row] += mask.sum()
    things, empty = (hits / totals).tolist()
    return {"things": round(things, 4), "empty": round(empty, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/tower"))
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--base", type=Path, default=Path("runs/base"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    art.prepare(options.art)

    model, processor = build_model(options.base)
    table = concept_embeddings(model.get_input_embeddings().weight.detach(), processor.tokenizer)
    tower, connector = model.model.vision_tower, model.model.multi_modal_projector
    tower.load_state_dict(imagenet_state_dict(imagenet_weights(options.base)), strict=False)
    heads = DenseHeads(tower.config.hidden_size, table)
    frozen = nn.ModuleList([tower.stem, *tower.stages[:FROZEN_STAGES]])
    frozen.requires_grad_(False)
    tower.to(memory_format=torch.channels_last)

    new = [*connector.parameters(), *heads.parameters(), *tower.norm.parameters()]
    known = {id(p) for p in new}
    old = [p for p in tower.parameters() if p.requires_grad and id(p) not in known]
    optimizer = torch.optim.AdamW([{"params": new}, {"params": old}], lr=options.lr, weight_decay=0.02)
    rates = (options.lr, options.lr * 0.7)

    step, last = 0, options.out / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        tower.load_state_dict(state["tower"])
        connector.load_state_dict(state["connector"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"resumed at step {step}", flush=True)

    def save() -> None:
        parts = {"tower": tower, "connector": connector, "heads": heads, "optimizer": optimizer}
        partial = last.with_suffix(".part")
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, partial)
        partial.rename(last)

    remaining = (options.steps - step) * options.batch_size
    data = Cells(options.art, "train", options.seed, remaining, model, processor, start=step * options.batch_size)
    loader = DataLoader(data, options.batch_size, num_workers=1, prefetch_factor=4)
    held_out = DataLoader(Cells(options.art, "held-out", 1, 192, model, processor), 32)
    began, first = time.monotonic(), step
    for pixels, centred, covered in loader:
        ramp = min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * ramp
        tower.train()
        frozen.eval()
        features = tower(pixels.to(memory_format=torch.channels_last)).last_hidden_state
        losses = heads(features, connector(features), centred, covered)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_([*new, *old], 5.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            pace = (step - first) / (time.monotonic() - began)
            row = {"step": step, "pictures/s": round(pace * options.batch_size, 1)}
            row |= {"minutes left": round((options.steps - step) / pace / 60, 1)}
            row |= {name: round(loss.item(), 3) for name, loss in losses.items()}
            if step % 100 == 0 or step == options.steps:
                row |= accuracy(model, heads, held_out)
                save()
            print(row, flush=True)
            with (options.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
    save()


if __name__ == "__main__":
    main()
