"""The command that compares the routing of a quantized model with its own in 16 bit, on tiny models."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mllm_demo.cli import run
from mllm_demo.routing import drift


@pytest.fixture
def command(tmp_path, checkpoint, moe_lora):
    """Runs the command on a tiny model with a picture; `changes` are added or put in the place of its flags."""
    Image.effect_noise((24, 24), 60).convert("RGB").save(tmp_path / "picture.png")
    flags = {"model": checkpoint, "adapter": moe_lora, "device": "cpu", "cache-dir": tmp_path, "max-new-tokens": 4}
    asked = {"image": tmp_path / "picture.png", "question": "what is this", "json": tmp_path / "drift.json"}

    def command(**changes) -> Path:
        given = flags | asked | {name.replace("_", "-"): value for name, value in changes.items()}
        drift.main([part for name, value in given.items() if value for part in (f"--{name}", str(value))], {})
        return tmp_path / "drift.json"

    return command


def test_a_line_for_every_router_and_one_for_all(command, capsys):
    report = json.loads(command().read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("16 bit against nf4, 1 prompts, ") and lines[-1].startswith("all routers")
    names = [row["site"] for row in report["routers"]]
    assert [line.split()[0] for line in lines[2:-1]] == names and len(names) == 6
    assert {row["layer_idx"] for row in report["routers"]} == {0, 1}
    # Four bits move the probabilities, but not to somewhere else altogether.
    assert all(0 < row["variation"] < 0.5 and row["largest"] <= 1 for row in report["routers"])


def test_a_model_drifts_by_nothing_from_itself(command, monkeypatch):
    kept = drift.load
    monkeypatch.setattr(drift, "load", lambda choice, *more: kept(drift.replace(choice, quantization="none"), *more))
    assert all(row["largest"] == 0 for row in json.loads(command().read_text())["routers"])


def test_text_alone_is_compared_too(command):
    assert json.loads(command(image=None).read_text())["quantization"] == "nf4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": None}, "No router can be read"),
        ({"quantization": "none"}, "would be compared with itself"),
        ({"question": None}, "one --question for each --image"),
        ({"question": " "}, "--question is empty"),
        ({"json": "nowhere/drift.json"}, "must name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(command, capsys, changes, words):
    assert run(lambda: command(**changes)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
