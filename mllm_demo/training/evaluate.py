"""Asks the shipped model about pictures it never saw, with the picture and blind (a grey one), and scores exactly.

    python -m mllm_demo.training.evaluate --items 100

Held out of training: fonts, words, the last phrasings of every question and every background (another random
stream); with `--split unseen-style` the objects' art style too. It knows nothing of how the model was trained.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mllm_demo.models.loading import LoadedModel, load
from mllm_demo.settings import QUANTIZATIONS, ModelChoice
from mllm_demo.training import art
from mllm_demo.training.questions import TASKS, Question, ask, is_right
from mllm_demo.training.scenes import SPLITS, render

# The kinds of scene that let a task be asked.
SCENES = {
    "naming": ("single", "same"),
    "counting": ("same", "shapes"),
    "colour": ("shapes",),
    "shape": ("shapes",),
    "presence": ("objects", "shapes", "mixed"),
    "reading": ("word",),
}
GREY = 128


def items(art_folder: Path, split: str, task: str, count: int, seed: int) -> list[tuple[np.ndarray, Question]]:
    """`count` (picture uint8 `[H, W, 3]`, question) pairs."""
    made, index = [], 0
    while len(made) < count:
        rng = np.random.default_rng((seed, TASKS.index(task), index))
        kind = SCENES[task][index % len(SCENES[task])]
        scene = render(art.load(art_folder), SPLITS[split], seed, 1_000_000 * TASKS.index(task) + index, kind=kind)
        question = ask(rng, scene, task, held_out=True)
        if question is not None:
            made.append((scene.image, question))
        index += 1
    return made


@torch.inference_mode()
def replies(loaded: LoadedModel, pairs: list[tuple[np.ndarray, str]], batch_size: int = 20) -> list[str]:
    """Greedy answers to (picture, prompt) pairs."""
    said, processor = [], loaded.processor
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                add_generation_prompt=True,
            )
            for _, prompt in batch
        ]
        pictures = [Image.fromarray(picture) for picture, _ in batch]
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="left")
        made = loaded.model.generate(**inputs.to(loaded.device), max_new_tokens=24, do_sample=False)
        new = made[:, inputs.input_ids.shape[1] :]
        said += processor.batch_decode(new, skip_special_tokens=True)
    return said


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return round(middle - half, 3), round(middle + half, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100, help="questions per task")
    parser.add_argument("--split", choices=[name for name in SPLITS if name != "train"], default="held-out")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="nf4")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers per task")
    options = parser.parse_args()
    loaded = load(ModelChoice(quantization=options.quantization), None, lambda step: None)
    table = {}
    for task in options.tasks:
        began = time.monotonic()
        made = items(options.art, options.split, task, options.items, options.seed)
        prompts = [question.prompt for _, question in made]
        grey = np.full_like(made[0][0], GREY)
        seen = replies(loaded, list(zip([picture for picture, _ in made], prompts, strict=True)))
        blind = replies(loaded, [(grey, prompt) for prompt in prompts])
        right = [is_right(question, reply) for (_, question), reply in zip(made, seen, strict=True)]
        guessed = [is_right(question, reply) for (_, question), reply in zip(made, blind, strict=True)]
        low, high = interval(sum(right), len(made))
        table[task] = {
            "right": round(sum(right) / len(made), 3), "low": low, "high": high,
            "blind": round(sum(guessed) / len(made), 3),
            "items": len(made),
        }  # fmt: skip
        print(f"{task:10} {table[task]}  {time.monotonic() - began:.0f} s", flush=True)
        wrong = [(q, reply) for (_, q), reply, ok in zip(made, seen, right, strict=True) if not ok]
        for question, reply in wrong[: options.show]:
            print(f"    {question.prompt} → {reply!r}, expected {question.answer!r}")
    if options.out:
        report = {"split": options.split, "quantization": options.quantization, "seed": options.seed, "tasks": table}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
