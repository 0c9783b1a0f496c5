"""Between the stages: teaches the tower's branch for detail alone to read small letters, five times as many a second.

    python -m mllm_demo.training.small_print --init assets/bundled --steps 1200
    python -m mllm_demo.training.small_print --init assets/bundled --export --to runs/small-print
    python -m mllm_demo.training.tokens --init runs/small-print --like assets/bundled    # and tokens to tell them

What a letter is can be seen in its own cell, so neither the wide stages nor the transformer layers are computed: a
throw-away head reads the letters of a cell off the branch, on pages of small words and on charts. Where nothing is
written the branch is to tell what it told. It knows nothing of image tokens or of the language model.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from mllm_demo.models.bundled.assembly import load_vision
from mllm_demo.models.bundled.tower import Detail
from mllm_demo.models.bundled.weights import VISION_FILE
from mllm_demo.training import art
from mllm_demo.training.base import add_lesson_flags, build_model, read_heads, save_lesson
from mllm_demo.training.concepts import LETTER_SLOTS, CellTargets
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.runs import Run, add_flags, begin, leave_processes, teach
from mllm_demo.training.things import PAGE
from mllm_demo.training.tower import cells_held_out, cells_to_learn

MIX = {PAGE: 0.65, "chart": 0.2, "text": 0.06, "single": 0.03, "same": 0.03, "objects": 0.03}
NONE_WEIGHT = 0.2  # of empty slots, which most are
SCALE = 4.0  # of the head's logits: it begins with nothing and has to keep up with a branch that does not
WEIGHTS = {"letters": 1.0, "kept": 0.3}


class LettersHead(nn.Module):
    """What the branch tells `[..., hidden_size]` → logits of a cell's letters `[..., LETTER_SLOTS, 1 + letters]`."""

    def __init__(self, width: int):
        super().__init__()
        self.read = nn.Linear(width, LETTER_SLOTS * (1 + len(CHARACTERS)))

    def forward(self, told: torch.Tensor) -> torch.Tensor:
        return SCALE * self.read(functional.layer_norm(told, told.shape[-1:])).unflatten(-1, (LETTER_SLOTS, -1))


def losses(
    logits: torch.Tensor, told: torch.Tensor, former: torch.Tensor, letters: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`logits` as of `LettersHead`; `told`, `former` `[B, cells, width]` what the branch tells and told; `letters`
    `[B, cells, LETTER_SLOTS]`: cross entropy of the letters, and how far cells without any are from what they told,
    as a share of its mean square."""
    weights = torch.ones(1 + len(CHARACTERS), device=logits.device)
    weights[0] = NONE_WEIGHT
    empty = ~(letters > 0).any(-1)
    off = (told[empty] - former[empty]).square().mean() / former[empty].square().mean().clamp(min=1e-6)
    return {"letters": functional.cross_entropy(logits.flatten(0, -2), letters.flatten(), weights), "kept": off}


@torch.no_grad()
def accuracy(see, batches: list[tuple[torch.Tensor, CellTargets]]) -> dict[str, float]:
    """`see`: pixels → logits; shares of held-out cells of one, two and three letters of which all are told."""
    right = {count: [] for count in (1, 2, 3)}
    for pixels, target in batches:
        told = (see(pixels).argmax(-1).cpu() == target.letters).all(-1)
        held = (target.letters > 0).sum(-1)
        for count, found in right.items():
            found.append(told[held == count])
    return {f"of {count}": round(torch.cat(found).float().mean().item(), 4) for count, found in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, steps=1200, batch_size=32, lr=1e-3, out=Path("runs/small-print-run"))
    add_lesson_flags(parser, to=Path("runs/small-print"))
    options = parser.parse_args()
    rank, world, device = begin(options)
    art.prepare(options.art)

    model, processor = build_model(options.base)
    load_vision(model, options.init / VISION_FILE.name)
    model.requires_grad_(False).eval()
    tower = model.model.vision_tower.to(device, memory_format=torch.channels_last)
    branch: Detail = tower.context.detail
    former = {name: value.clone() for name, value in branch.state_dict().items()}
    branch.requires_grad_(True)
    if options.compile:
        branch.compile()
    head = LettersHead(tower.config.hidden_size).to(device)
    optimizer = torch.optim.AdamW([*branch.parameters(), *head.parameters()], lr=options.lr, weight_decay=0.0)
    run = Run(
        options.out, {"branch": branch, "head": head, "optimizer": optimizer}, options.steps, options.batch_size, rank
    )
    if options.export:
        save_lesson(model, read_heads(options.init), options)
        return

    def see(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the branch tells and what it told, `[B, cells, width]` each."""
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                maps = tower.finest(pixels.to(device, memory_format=torch.channels_last))
                as_was = functional_call(branch, former, (maps,))
            return branch(maps).float(), as_was.float()

    loader = cells_to_learn(options, run, world, model, processor, MIX)
    held_out = cells_held_out(options, run, model, processor, 64, 32, {"chart": 1.0})

    def losses_of(pixels: torch.Tensor, target: CellTargets) -> dict[str, torch.Tensor]:
        told, as_was = see(pixels)
        return losses(head(told), told, as_was, target.letters.to(device))

    measured = partial(accuracy, lambda pixels: head(see(pixels)[0]), held_out)
    teach(run, optimizer, loader, losses_of, measured, options, warmup=30, clip=1.0, weights=WEIGHTS)
    leave_processes()


if __name__ == "__main__":
    main()
