"""Between the stages: teaches the adapter alone to read cells of letters, in sequences of little else.

    python -m mllm_demo.training.reading --init assets/bundled --steps 300
    python -m mllm_demo.training.reading --init assets/bundled --export --to runs/reading
    python -m mllm_demo.training.chat --stage 3 --init runs/reading --out runs/more --readings 12  # all else again, too

Where tokens held the very letters of a picture, the language model still said "gril" for "girl": it had not learned to
read cells of several letters, which in a conversation about a picture are a few of 400 positions. Here only the image
tokens of cells with letters are left of a picture, each at the position that it always has, and only what is written is
asked for. Of every second picture the letters are put into the tokens as they should be (`tokens.Letters`), so that
a wrong answer is the language model's own fault; of the others it learns to make the best of what tokens tell.
Beside stage III it is also asked how many things there are: what heads read off tokens it said wrong as well.
Tower and connector stay as they are; what is said of anything else is stage III's to mend. The language model's weights
are rounded to NF4 as there. It knows nothing of how tokens came to tell letters.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset, Subset

from mllm_demo.models.bundled.assembly import load_vision
from mllm_demo.models.bundled.weights import ADAPTER, VISION_FILE
from mllm_demo.training import art
from mllm_demo.training.adapted import BALANCE, Rounding, export, hidden_states, missed, parts_of, quicken, see
from mllm_demo.training.base import add_lesson_flags, build_model, read_heads
from mllm_demo.training.concepts import UNKNOWN, CellTargets, cell_targets
from mllm_demo.training.conversations import IGNORED, Encoder, Sample, collate
from mllm_demo.training.questions import Question, ask
from mllm_demo.training.runs import Masters, Run, add_flags, begin, leave_processes, teach
from mllm_demo.training.scenes import SPLITS, render
from mllm_demo.training.things import CROWD, PAGE, Scene
from mllm_demo.training.tokens import Letters
from mllm_demo.training.tower import dense_heads

MIX = {"text": 0.38, "chart": 0.42, PAGE: 0.2}
COUNTED = ("same", CROWD, "shapes")
BESIDE = {"text": 0.22, "chart": 0.25, PAGE: 0.1, "same": 0.19, CROWD: 0.14, "shapes": 0.1}  # stage III
GROUND = 0.2  # of a counted picture's cells without a thing, how many are left
WORDS = {"text": 2, "chart": 2, PAGE: 4}  # single words that are asked for at most
BAND = 3  # rows of cells that are left of a page
PERFECT = 0.5  # of the pictures
WEIGHTS = {"answers": 1.0, "balance": BALANCE[3]}


@dataclass(frozen=True)
class Reading:
    """`sample`: of the image tokens those of the `seen` cells alone, bool `[cells]`; `positions` int64 `[T]` of its
    tokens in the whole; `perfect`: letters are put into its image tokens."""

    sample: Sample
    positions: torch.Tensor
    seen: torch.Tensor
    perfect: bool


def between(scene: Scene, top: float, bottom: float) -> Scene:
    """`scene` with no other writing than the lines that stand wholly between the heights `top` and `bottom`."""
    rest, letters, lines = iter(scene.of_kind("letter")), [], []
    for line in scene.lines:
        of_line = list(islice(rest, len(line.replace(" ", ""))))
        if all(letter.box[1] >= top and letter.box[3] <= bottom for letter in of_line):
            letters += of_line
            lines.append(line)
    return replace(scene, things=tuple(letters), lines=tuple(lines))


def asked(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Questions about what is written, all with different answers; none where nothing is. Of counted pictures: how
    many there are of what, all different numbers."""
    if scene.kind in COUNTED:
        found = [ask(rng, scene, task) for task in rng.permutation(["counting", "counting", "counting", "total"])]
        return list({question.key: question for question in found if question is not None}.values())
    whole = None if scene.kind == PAGE else ask(rng, scene, "reading" if scene.chart is None else "caption")
    words = WORDS[scene.kind] if whole is None or rng.random() < 0.5 else 0
    found = [*(ask(rng, scene, "word") for _ in range(words)), whole]
    return list({question.answer: question for question in found if question is not None}.values())


class Readings(Dataset):
    """Picture number `start + i` of a split. `batch` of them at a time are of one kind, so that little is padding;
    `mix`: how often of each."""

    def __init__(
        self, art_folder: Path, split: str, seed: int, count: int, encoder: Encoder, *, batch: int, start: int = 0,
        mix: Mapping[str, float] = MIX,
    ):  # fmt: skip
        self.art_folder, self.split, self.seed, self.count = art_folder, SPLITS[split], seed, count
        self.encoder, self.batch, self.start, self.mix = encoder, batch, start, mix

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Reading:
        index += self.start
        of_batch = np.random.default_rng((self.seed, 78, index // self.batch))
        kind = str(of_batch.choice(list(self.mix), p=list(self.mix.values())))
        rng, turns = np.random.default_rng((self.seed, 79, index)), []
        side = math.isqrt(len(self.encoder.image))
        while not turns:
            number = int(rng.integers(2**31))
            scene = render(art.load(self.art_folder), self.split, self.seed, number, kind=kind)
            top = int(rng.integers(side - BAND + 1)) if kind == PAGE else 0
            bottom, cell = top + BAND if kind == PAGE else side, scene.image.shape[0] / side
            part = between(scene, top * cell, bottom * cell) if kind == PAGE else scene
            turns = [(question.prompt, question.answer) for question in asked(rng, part)]
        pixels = self.encoder.processor.image_processor(scene.image, return_tensors="pt").pixel_values[0]
        cells = cell_targets(scene, side).map(torch.from_numpy)
        if kind in COUNTED:
            seen = (cells.counts != UNKNOWN) | torch.from_numpy(rng.random(side * side) < GROUND)
        else:
            near = CellTargets(*(part[None] for part in cells)).near_letters[0].view(side, side)
            near[:top], near[bottom:] = False, False
            seen = near.flatten()
        whole = replace(self.encoder.encode(turns, pixels), cells=cells)
        return cut(whole, seen, self.encoder.processor.image_token_id, bool(rng.random() < PERFECT))


def cut(whole: Sample, seen: torch.Tensor, image_token: int, perfect: bool) -> Reading:
    """`whole` without the image tokens of cells that are not `seen`."""
    kept = torch.ones_like(whole.input_ids, dtype=torch.bool)
    kept[whole.input_ids == image_token] = seen
    parts = {name: getattr(whole, name)[kept] for name in ("input_ids", "labels", "weights", "places")}
    return Reading(replace(whole, **parts), kept.nonzero()[:, 0], seen, perfect)


def together(readings: list[Reading], pad: int) -> dict[str, torch.Tensor]:
    """What `conversations.collate` makes of the samples, with `position_ids` `[B, T]`, `seen` `[B, cells]` and
    `perfect` `[B]`."""
    positions = [reading.positions for reading in readings]
    return collate([reading.sample for reading in readings], pad) | {
        "position_ids": torch.nn.utils.rnn.pad_sequence(positions, batch_first=True),
        "seen": torch.stack([reading.seen for reading in readings]),
        "perfect": torch.tensor([reading.perfect for reading in readings]),
    }


def readings_to_learn(
    options: argparse.Namespace, run: Run, world: int, encoder: Encoder, batch_size: int,
    mix: Mapping[str, float] = MIX,
) -> DataLoader:  # fmt: skip
    """This process's share of the sequences that `run` has not seen yet, `batch_size` a step."""
    done = run.step * batch_size
    count = options.steps * batch_size - done
    data = Readings(options.art, "train", options.seed, count, encoder, batch=batch_size, start=done, mix=mix)
    gather = partial(together, pad=encoder.tokenizer.pad_token_id)
    data = Subset(data, range(run.rank, count, world))
    return DataLoader(data, batch_size // world, num_workers=options.workers, collate_fn=gather)


def said(model: PeftModel, letters: Letters, cell_heads, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at every label of `batch`, `[labels, vocab]`."""
    with torch.no_grad():
        tokens = see(model, batch["pixel_values"]).float()
        target = CellTargets(*(batch[name] for name in CellTargets._fields))
        perfect = letters.perfect(tokens, target, cell_heads.letters(tokens))
        tokens = torch.where(batch["perfect"][:, None, None], perfect, tokens)[batch["seen"]]
    hidden, _ = hidden_states(model, batch, tokens)
    return model.get_output_embeddings()(hidden[batch["labels"] != IGNORED]).float()


def right(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[bool]:
    """Of every answer in reading order, whether each of its tokens is the one that `logits` name."""
    labels = batch["labels"]
    hits = torch.ones_like(labels, dtype=torch.bool)
    hits[labels != IGNORED] = logits.argmax(-1) == labels[labels != IGNORED]
    found = []
    for row, hit in zip((labels != IGNORED).tolist(), hits.tolist(), strict=True):
        for index, is_label in enumerate(row):
            if is_label:
                first = index == 0 or not row[index - 1]
                found += [True] if first else []
                found[-1] &= hit[index]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, steps=300, batch_size=24, lr=1e-3, out=Path("runs/reading-run"))
    add_lesson_flags(parser, to=Path("runs/reading"))
    options = parser.parse_args()
    rank, world, device = begin(options)
    art.prepare(options.art)

    base, processor = build_model(options.base)
    load_vision(base, options.init / VISION_FILE.name)
    heads = read_heads(options.init)
    cell_heads = dense_heads(base, processor, device, heads["dense"]).requires_grad_(False)
    base.to(device).requires_grad_(False)
    model = PeftModel.from_pretrained(base, options.init / ADAPTER.name, is_trainable=True)
    quicken(model, device, options.compile)
    language_model = parts_of(model).language_model
    masters = Masters([p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name])
    optimizer = torch.optim.AdamW(masters.copies, lr=options.lr, weight_decay=0.0, betas=(0.9, 0.98))
    run = Run(options.out, {"masters": masters, "optimizer": optimizer}, options.steps, options.batch_size, rank)
    if options.export:
        model.float()
        masters.give_back()
        export(model, heads, options.to)
        return

    letters = Letters.of(cell_heads)
    encoder = Encoder(processor, model.config.vision_config.side**2)
    loader = readings_to_learn(options, run, world, encoder, options.batch_size)
    share, gather = options.batch_size // world, loader.collate_fn
    held_out = Readings(options.art, "held-out", 1, 0 if rank else 8 * share, encoder, batch=share)
    tests = list(DataLoader(held_out, share, num_workers=options.workers, collate_fn=gather))
    rounding = Rounding(language_model)

    def move(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(device) for name, value in batch.items()}

    @torch.no_grad()
    def measured() -> dict[str, float]:
        """Shares of held-out answers all of whose tokens are right, each after the right ones before it."""
        told = {}
        for name, perfect in (("as they are", False), ("perfect", True)):
            batches = [move(batch) | {"perfect": torch.full_like(batch["perfect"], perfect)} for batch in tests]
            hits = [hit for batch in batches for hit in right(said(model, letters, cell_heads, batch), batch)]
            told[name] = round(sum(hits) / len(hits), 4)
        return told

    def losses_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rounding.begin(run.step)
        batch = move(batch)
        found = {"answers": missed(said(model, letters, cell_heads, batch), batch)}
        return found | {"balance": model.base_model.router_aux_loss()}

    model.train()
    parts_of(model).vision_tower.eval()
    if rank == 0 and not run.resumed:
        run.log({"step": 0, "held-out": measured()})
    batches = ((batch,) for batch in loader)
    teach(run, optimizer, batches, losses_of, measured, options, warmup=25, clip=1.0, weights=WEIGHTS, masters=masters)
    leave_processes()


if __name__ == "__main__":
    main()
