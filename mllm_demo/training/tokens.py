"""Between the stages: teaches tokens what the stages with the language model let fade: small text, counts, values.

    python -m mllm_demo.training.tokens --init assets/bundled --steps 600
    python -m mllm_demo.training.tokens --init runs/small-print --like assets/bundled       # after `small_print`
    python -m mllm_demo.training.tokens --init assets/bundled --export --to runs/tokens
    python -m mllm_demo.training.chat --stage 3 --init runs/tokens                  # goes on

Stage 0 has cells of one letter look, to the language model, like that letter, and leaves those of several letters to
be worked out, which the language model never did: with two letters in any cell, 1 of 50 held-out words was read, else
96 of 150. Here a cell is to look like the sum of its letters, each counting `FAINTER` times the one before it. In all
directions but those of letters such a token is to stay what it was, and every other token near it, unless a letter
might as well be told there: then it is to be empty. Most pictures are of text, many of them pages of small words,
since a chart's labels fill a dozen cells and were told wrong most often. Stage 0's dense heads are taken up again
beside that, so that letters, counts, values, ranks and colours can be read off every token, and its choice among
names.
Only the tower's transformer layers, the connector and those heads learn; the language model takes no part. At one rate
for all, what stands is lost first and learned again, counts of drawings not wholly: `--share` has all but the heads and
the layer that came last learn at a share of it. It knows nothing of conversations.
"""

import argparse
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn import functional

from mllm_demo.models.bundled.assembly import load_vision
from mllm_demo.models.bundled.tower import FIRST_LAYERS
from mllm_demo.models.bundled.weights import VISION_FILE
from mllm_demo.training import art
from mllm_demo.training.adapted import reader_of
from mllm_demo.training.base import add_lesson_flags, build_model, read_heads, save_lesson
from mllm_demo.training.concepts import LETTER_SLOTS, CellTargets, settled
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.runs import Run, add_flags, begin, leave_processes, teach
from mllm_demo.training.things import CROWD, PAGE
from mllm_demo.training.tower import DENSE, DenseHeads, cells_held_out, cells_to_learn, dense_accuracy, dense_heads

FAINTER = 0.8  # 0.7 told the order of two letters in 0.69 for 0.65, and charts were read worse
ALONE = 1.9  # how much a cell's only letter counts: what the stages before and after make of it
MIX = {
    PAGE: 0.07, "text": 0.12, "chart": 0.20, "same": 0.25, CROWD: 0.15, "single": 0.04, "shapes": 0.11, "objects": 0.06,
}  # fmt: skip
SHARPNESS = 20.0  # of the choice among letters by cosine
# Letters four times what they weigh beside the language model: they are what this is for. Counts half as much again,
# since a lesson with them as there lost some.
WEIGHTS = {"kept": 0.5, "shown": 1.0, "told": 0.2} | DENSE | {"letters": 1.0, "counts": 3.0}


class Letters:
    """What tokens should be. `table` [letters, width]: the language model's embeddings of `CHARACTERS`."""

    def __init__(self, table: torch.Tensor):
        self.table = table
        self.directions = torch.linalg.qr(table.T).Q  # [width, letters]
        self.unit = functional.normalize(table, dim=-1)
        self.weights = FAINTER ** torch.arange(LETTER_SLOTS, device=table.device, dtype=table.dtype)

    @classmethod
    def of(cls, heads: DenseHeads) -> "Letters":
        """By the table that `heads` hold, in which the letters come last."""
        return cls(heads.table[-len(CHARACTERS) :])

    def shares(self, letters: torch.Tensor) -> torch.Tensor:
        """int64 `[cells, LETTER_SLOTS]` → how much each letter counts, `[cells, letters]`."""
        slots = functional.one_hot(letters, 1 + len(CHARACTERS))[..., 1:].to(self.table)
        alone = 1 + (ALONE - 1) * ((letters > 0).sum(-1, keepdim=True) == 1)
        return (self.weights[:, None] * slots).sum(1) * alone

    def wanted(self, former: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """`former` tokens `[cells, width]`, in the directions of letters nothing but `shares` `[cells, letters]`."""
        return former - former @ self.directions @ self.directions.T + shares @ self.table

    def losses(
        self, tokens: torch.Tensor, former: torch.Tensor, letters: torch.Tensor, near: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`tokens`, `former` `[cells, width]`, `letters` `[cells, LETTER_SLOTS]`: mean squared errors, in units of the
        embeddings' variance, of tokens to be kept (all but `near` letters, bool `[cells]`) and of those that show
        letters, and how far the latter are from telling which."""
        lettered = (letters > 0).any(-1)
        shares = self.shares(letters[lettered])
        off = (tokens[lettered] - self.wanted(former[lettered], shares)).square().sum()
        choice = functional.log_softmax(SHARPNESS * functional.normalize(tokens[lettered], dim=-1) @ self.unit.T, -1)
        size = self.table.var() * tokens.shape[-1] * lettered.sum().clamp(min=1)
        told = -(choice * shares / shares.sum(-1, keepdim=True)).sum() / lettered.sum().clamp(min=1)
        kept = (tokens[~near] - former[~near]).square().mean() / self.table.var()
        return {"kept": kept, "shown": off / size, "told": told}

    def perfect(self, tokens: torch.Tensor, target: CellTargets, told: torch.Tensor) -> torch.Tensor:
        """`tokens` `[B, cells, width]` with the letters of `target` where there are any or, `told` differently, might
        be; `told`: logits of letters as `settled` takes them."""
        target = settled(target, told)
        former, letters = tokens.flatten(0, 1), target.letters.flatten(0, 1)
        near = (letters > 0).any(-1) | target.near_letters.flatten()
        return torch.where(near[:, None], self.wanted(former, self.shares(letters)), former).view(tokens.shape)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """The two letters that tokens show most, int64 `[cells, 2]`, counted as `CHARACTERS`."""
        return (functional.normalize(tokens, dim=-1) @ self.unit.T).topk(2, -1).indices


@torch.no_grad()
def accuracy(letters: Letters, batches: list[tuple[torch.Tensor, CellTargets]]) -> dict[str, float]:
    """`batches`: tokens `[B, cells, width]` and what they should tell → shares of held-out cells: single letters shown
    most; both of two different ones shown most; in their order."""
    hits: dict[str, list[torch.Tensor]] = {"single": [], "both": [], "in order": []}
    for tokens, target in batches:
        tokens, held = tokens.flatten(0, 1), target.letters.flatten(0, 1)
        count, shown = (held > 0).sum(-1), letters.read(tokens)
        first, second = held[:, 0] - 1, held[:, 1] - 1
        pair = (count == 2) & (first != second)
        in_order = (shown[:, 0] == first) & (shown[:, 1] == second)
        reverse = (shown[:, 0] == second) & (shown[:, 1] == first)
        hits["single"].append((shown[:, 0] == first)[count == 1])
        hits["both"].append((in_order | reverse)[pair])
        hits["in order"].append(in_order[pair])
    return {name: round(torch.cat(parts).float().mean().item(), 4) for name, parts in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", type=Path, help="the model whose tokens others than letters stay like; else --init")
    parser.add_argument("--share", type=float, default=1.0, help="of --lr, for all of the reader but its last layer")
    add_flags(parser, steps=600, batch_size=24, lr=6e-4, out=Path("runs/tokens-run"))
    add_lesson_flags(parser, to=Path("runs/tokens"))
    options = parser.parse_args()
    rank, world, device = begin(options)
    art.prepare(options.art)

    model, processor = build_model(options.base)
    of_init = read_heads(options.init)
    heads = dense_heads(model, processor, device, of_init["dense"])
    letters = Letters.of(heads)
    model.requires_grad_(False)
    tower = model.model.vision_tower.to(device, memory_format=torch.channels_last)
    reader = reader_of(model).to(device)
    load_vision(model, (options.like or options.init) / VISION_FILE.name)
    former = {name: value.clone() for name, value in reader.state_dict().items()}
    load_vision(model, options.init / VISION_FILE.name)
    reader.requires_grad_(True)
    if options.compile:
        reader.compile()
    fresh = [*reader["context"].layers[FIRST_LAYERS:].parameters(), *heads.parameters()]
    known = set(reader.parameters()).difference(fresh)
    learned = [parameter for parameter in reader.parameters() if parameter in known]
    groups = [{"params": learned, "share": options.share}, {"params": fresh}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
    parts = {"reader": reader, "heads": heads, "optimizer": optimizer}
    run = Run(options.out, parts, options.steps, options.batch_size, rank)
    if options.export:
        save_lesson(model, of_init | {"dense": heads.state_dict()}, options)
        return

    def see(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens as they are now and as they were, `[B, cells, width]` each."""
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                maps = tower.joined(pixels.to(device, memory_format=torch.channels_last))
                as_were = functional_call(reader, former, (maps,))
            return reader(maps).float(), as_were.float()

    loader = cells_to_learn(options, run, world, model, processor, MIX)
    held_out = cells_held_out(options, run, model, processor, 144, 48, MIX)
    model.eval()

    @torch.no_grad()
    def measured() -> dict[str, float]:
        seen = [(see(pixels)[0], target.map(lambda array: array.to(device))) for pixels, target in held_out]
        seen = [(tokens, settled(target, heads.letters(tokens))) for tokens, target in seen]
        told = dense_accuracy(lambda tokens: tokens, heads, seen, device)
        shown = ("things", "several", "labels", "pairs", *DENSE)
        return accuracy(letters, seen) | {name: told[name] for name in shown if name in told}

    def losses_of(pixels: torch.Tensor, target: CellTargets) -> dict[str, torch.Tensor]:
        target = target.map(lambda array: array.to(device))
        tokens, as_were = see(pixels)
        target = settled(target, heads.letters(tokens.detach()))
        cells = (tokens, as_were, target.letters, target.near_letters)
        losses = letters.losses(*(part.flatten(0, 1) for part in cells))
        dense = heads(tokens, target)
        return losses | {name: dense[name] for name in DENSE}

    if rank == 0 and not run.resumed:
        run.log({"step": 0, "held-out": measured()})
    teach(run, optimizer, loader, losses_of, measured, options, warmup=25, clip=1.0, weights=WEIGHTS)
    leave_processes()


if __name__ == "__main__":
    main()
