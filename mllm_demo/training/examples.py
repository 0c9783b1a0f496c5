"""Renders the example pictures that the page offers: held-out fonts, words and backgrounds, never trained on.

    python -m mllm_demo.training.examples

Those in `assets/examples` were drawn by the code of commit 7182432, as the shipped model was trained; the numbers below
are to be chosen anew with the next one. It knows nothing of the page or of what the model answers.
"""

import json
from pathlib import Path

from PIL import Image

from mllm_demo.training import art
from mllm_demo.training.scenes import HELD_OUT, render

SEED, SIZE = 11, 448
# (number of the picture, file name, question)
CHOSEN = (
    (46, "cow", "What is this?"),
    (63, "balls", "How many balls are there?"),
    (55, "shapes", "What colour is the circle?"),
    (33, "things", "What can you see?"),
    (6, "way", "What does it say?"),
    (7, "night", "Is there a house?"),
)


def main() -> None:
    folder = Path(__file__).resolve().parents[2] / "assets" / "examples"
    sprites = art.load(Path("runs/art"))
    entries = []
    for index, name, question in CHOSEN:
        scene = render(sprites, HELD_OUT, SEED, index, size=SIZE)
        Image.fromarray(scene.image).save(folder / f"{name}.png", optimize=True)
        entries.append({"image": f"{name}.png", "question": question})
    (folder / "examples.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
