"""The README's commands for the two original systems, read from the README and run on tiny checkpoints as published."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_demo import ask, cli
from mllm_demo.models.checkpoints import awaker
from mllm_demo.routing.trace import RoutingTrace
from tests.unit.models import tiny_awaker
from tests.unit.models.moe_llava.originals import save_original

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
ASKED = [line for line in README.splitlines() if re.match(r"python -m mllm_demo\.ask --model (awaker|moe-llava)", line)]
CONVERTED = re.search(r"`(python -m mllm_demo\.models\.checkpoints\.awaker [^`]*)`", README)[1]
FAMILIES = {"awaker": lambda folder: tiny_awaker.save(folder), "moe-llava": lambda folder: save_original(folder)}


@pytest.fixture
def start(monkeypatch, capsys, tmp_path):
    """Runs a command line where a newcomer would, in a folder with a picture and nothing else."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    settings = {"CACHE_DIR": str(tmp_path / "cache"), "DEVICE": "cpu", "MAX_NEW_TOKENS": "3"}
    for name, value in settings.items():
        monkeypatch.setenv(f"MLLM_DEMO_{name}", value)

    def start(main, words: list[str]):
        monkeypatch.setattr(sys, "argv", words)
        status = cli.run(main)
        return status, *capsys.readouterr()

    return start


def test_the_readme_has_one_command_for_each():
    assert [family for line in ASKED for family in FAMILIES if f"--model {family}" in line] == list(FAMILIES)


@pytest.mark.parametrize("command", ASKED)
def test_one_command_answers_from_a_checkpoint_as_published(start, tmp_path, command):
    words = shlex.split(command)[2:]
    where = words.index("--model") + 1
    family = next(family for family in FAMILIES if words[where].startswith(family))
    words[where] = str(FAMILIES[family](tmp_path / "original"))
    status, out, err = start(ask.main, words)
    assert status == 0 and out and "tokens/s" in err, err
    if "--trace" in words:
        trace = RoutingTrace.load(Path(words[words.index("--trace") + 1]))
        assert trace.sites and any(token.modality == "image" for token in trace.tokens)


def test_the_conversion_by_hand_says_how_to_load_it(start, tmp_path):
    tiny_awaker.save(tmp_path / "FOLDER")
    status, out, err = start(awaker.main, shlex.split(CONVERTED)[2:])
    assert status == 0 and out.startswith(f"Load it with: --model {tmp_path / 'CONVERTED'}"), err
