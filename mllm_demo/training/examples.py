"""Renders the example pictures that the page offers: held-out drawings, fonts, words and grounds, never trained on.

    python -m mllm_demo.training.examples

It knows nothing of the page or of what the model answers; that it answers them rightly is a test
(`tests/browser/test_bundled_model.py`).
"""

import json
from pathlib import Path

from PIL import Image

from mllm_demo.training import art
from mllm_demo.training.scenes import HELD_OUT, render

SEED, SIZE = 11, 448
# (number, kind of picture, kind of chart, file name, question)
CHOSEN: tuple[tuple[int, str, str | None, str, str], ...] = (
    (8, "single", None, "helicopter", "What is this?"),
    (286, "same", None, "ducks", "How many ducks are there?"),
    (2, "shapes", None, "shapes", "What colour is the circle?"),
    (13, "text", None, "code", "What does it say?"),
    (5, "objects", None, "things", "Where is the sock relative to the pineapple?"),
    (5, "objects", None, "things", "Where is the bread?"),
    (3, "objects", None, "night", "Is there a horse?"),
)


def main() -> None:
    folder = Path(__file__).resolve().parents[2] / "assets" / "examples"
    sprites = art.load(Path("runs/art"))
    for old in folder.glob("*.png"):
        old.unlink()
    entries = []
    for index, kind, chart, name, question in CHOSEN:
        scene = render(sprites, HELD_OUT, SEED, index, size=SIZE, kind=kind, chart=chart)
        Image.fromarray(scene.image).save(folder / f"{name}.png", optimize=True)
        entries.append({"image": f"{name}.png", "question": question})
    (folder / "examples.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
