"""Asks a model about pictures it never saw, with the picture and blind (a grey one), and scores exactly.

    python -m mllm_demo.training.evaluate --items 200                          # the shipped NF4 model
    python -m mllm_demo.training.evaluate --quantization none --no-blind       # the same experts on 16-bit weights
    python -m mllm_demo.training.evaluate --bundle runs/single --no-blind      # another model on the same items
    python -m mllm_demo.training.evaluate --perfect --no-blind --tasks reading # how much the language model misreads

Held out of training: drawings, fonts, words, the last phrasings of every question and every background (another random
stream); with `--split unseen-style` the art style, too, and charts are drawn by a plotting library. It knows nothing of
how the model was trained.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from mllm_demo.models.loading import LoadedModel
from mllm_demo.settings import QUANTIZATIONS
from mllm_demo.training import art, plotted
from mllm_demo.training.perfect import perfect_letters
from mllm_demo.training.questions import TASKS, Question, ask
from mllm_demo.training.replies import PICTURE, replies, turn
from mllm_demo.training.scenes import SPLITS, UNSEEN_STYLE, render
from mllm_demo.training.scoring import interval, is_right
from mllm_demo.training.things import Scene
from mllm_demo.training.trained import HELP, load_trained

# The kinds of scene that let a task be asked.
SCENES = {
    "naming": ("single", "same"),
    "presence": ("objects", "shapes", "mixed"),
    "counting": ("same", "shapes"),
    "colour": ("shapes",),
    "shape": ("shapes",),
    "relations": ("objects", "shapes"),
    "grounding": ("objects", "shapes", "single"),
    "pointing": ("objects", "shapes"),
    "reading": ("text",),
    "chart": ("chart",),
    "table": ("chart",),
    "unanswerable": ("objects", "shapes"),
}
CHARTS = ("bar", "line", "pie")
PACKED = ("nf4", "fp4")
GREY = 128


def items(art_folder: Path, split: str, task: str, count: int, seed: int) -> list[tuple[Scene, Question]]:
    """`count` (scene, question) pairs, each about a picture of its own."""
    made, index, number = [], 0, TASKS.index(task)
    sprites = art.load(art_folder)
    while len(made) < count:
        rng = np.random.default_rng((seed, number, index))
        kind = SCENES[task][index % len(SCENES[task])]
        chart = {"table": "table", "chart": CHARTS[index % len(CHARTS)]}.get(task)
        if task == "chart" and SPLITS[split] is UNSEEN_STYLE:
            scene = plotted.render(UNSEEN_STYLE.words, seed, index, chart)
        else:
            scene = render(sprites, SPLITS[split], seed, 1_000_000 * number + index, kind=kind, chart=chart)
        question = ask(rng, scene, task, held_out=True)
        if question is not None:
            made.append((scene, question))
        index += 1
    return made


def unpack(loaded: LoadedModel) -> None:
    """Unpacks the 4-bit weights once, for many questions at a time: the same numbers, multiplied in 16 bit.

    The kernels for packed weights are made for one token, and take several times as long for a batch of prompts.
    """
    loaded.model.base_model.model.dequantize()


def straighten(loaded: LoadedModel) -> None:
    """Lays out what the head reads: a slice of the last position makes it copy its weights for every sequence."""
    head = loaded.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, seen: (seen[0].contiguous(),))


def answers(loaded: LoadedModel, pairs: list[tuple[np.ndarray, str]]) -> list[str]:
    """Greedy answers to (picture, prompt) pairs."""
    talks = [[turn("user", prompt, PICTURE)] for _, prompt in pairs]
    return replies(loaded, talks, [Image.fromarray(picture) for picture, _ in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=200, help="questions per task")
    parser.add_argument("--split", choices=[name for name in SPLITS if name != "train"], default="held-out")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="nf4")
    parser.add_argument("--bundle", type=Path, help=HELP)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--no-blind", action="store_true", help="leave out the answers to a grey picture")
    parser.add_argument("--perfect", action="store_true", help="put a picture's letters into its image tokens")
    parser.add_argument("--packed", action="store_true", help="multiply packed weights, as a chat does; slow")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers per task")
    options = parser.parse_args()
    loaded = load_trained(options.quantization, options.bundle)
    if options.quantization in PACKED and not options.packed:
        unpack(loaded)
    straighten(loaded)
    report = {"split": options.split, "quantization": options.quantization, "bundle": str(options.bundle or "")}
    report |= {"seed": options.seed, "items": options.items, "perfect": options.perfect}
    table = report["tasks"] = {}
    for task in options.tasks:
        began = time.monotonic()
        made = items(options.art, options.split, task, options.items, options.seed)
        prompts = [question.prompt for _, question in made]
        scenes = [scene for scene, _ in made]
        with perfect_letters(loaded, scenes, options.bundle) if options.perfect else nullcontext():
            said = answers(loaded, [(scene.image, question.prompt) for scene, question in made])
        right = [is_right(question, reply) for (_, question), reply in zip(made, said, strict=True)]
        low, high = interval(sum(right), len(made))
        table[task] = {"right": round(sum(right) / len(made), 3), "low": low, "high": high, "items": len(made)}
        table[task]["hits"] = [int(ok) for ok in right]
        if not options.no_blind:
            grey = np.full_like(scenes[0].image, GREY)
            guessed = answers(loaded, [(grey, prompt) for prompt in prompts])
            table[task]["blind"] = round(
                sum(is_right(q, reply) for (_, q), reply in zip(made, guessed, strict=True)) / len(made), 3
            )
        shown = {name: value for name, value in table[task].items() if name != "hits"}
        print(f"{task:12} {shown}  {time.monotonic() - began:.0f} s", flush=True)
        if options.out:  # after every task, so that a run that is cut short leaves what it found
            options.out.write_text(json.dumps(report) + "\n")
        wrong = [(q, reply) for (_, q), reply, ok in zip(made, said, right, strict=True) if not ok]
        for question, reply in wrong[: options.show]:
            print(f"    {question.prompt} → {reply!r}, expected {question.answer!r}")


if __name__ == "__main__":
    main()
