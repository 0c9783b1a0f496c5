"""An adapter trained on a person's own lines: it learns them, survives being killed, and loads like any other."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mllm_demo.chat.generation import generate
from mllm_demo.chat.images import read_picture
from mllm_demo.chat.messages import Message
from mllm_demo.errors import DataError, GenerationError, SettingsError
from mllm_demo.models import loading
from mllm_demo.settings import ModelChoice, Sampling
from mllm_demo.training import train
from mllm_demo.training.lessons import Course
from tests.unit.models.test_families import FAMILIES

ROOT = Path(__file__).parents[3]
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 160, 60)}
WEIGHTS = "adapter_model.safetensors"
SMALL = ["--device", "cpu", "--r", "4", "--batch-size", "3", "--warmup", "2", "--lr", "0.01"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are learned fastest by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Makes the tiny checkpoint of a family, once."""
    made = {}

    def base(family):
        if family not in made:
            made[family] = FAMILIES[family]().save(tmp_path_factory.mktemp(family))
        return made[family]

    return base


@pytest.fixture
def data(tmp_path):
    """Three colours to name and one conversation; two lines that cannot be used."""
    lines = [{"image": None, "question": "Hello!", "answer": "Hi."}]
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
        lines.append({"image": f"{name}.png", "question": "Which?", "answer": name})
    turns = [{"question": "Red?", "answer": "yes"}, {"question": "Blue?", "answer": "no"}]
    lines += [{"image": "red.png", "turns": turns}, {"image": "lost.png", "question": "a", "answer": "b"}]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "not json"]))
    return path


def arguments(data, base, out, *more) -> list[str]:
    return ["--data", str(data), "--base", str(base), "--out", str(out), *SMALL, *more]


def curve(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("family", "quantization"), [("llava", "nf4"), ("qwen2.5-vl", "none"), ("smolvlm", "nf4")])
def test_it_learns_the_lines_and_the_adapter_loads_and_is_traced(bases, data, tmp_path, capsys, family, quantization):
    base, out = bases(family), tmp_path / "out"
    train.main(arguments(data, base, out, "--steps", "120", "--quantization", quantization))
    said = capsys.readouterr().out
    assert "skipped line 6: the picture lost.png is not there" in said and "skipped line 7: it is not JSON" in said
    assert "2 of 7 lines were skipped" in said
    shown = f"    python app.py --model {base} --adapter {out}" + " --quantization none" * (quantization == "none")
    assert shown in said.splitlines()
    losses = [row["loss"] for row in curve(out)]
    assert losses[-1] < 0.1 * losses[0]
    assert {"samples/s", "minutes left", "balance"} <= curve(out)[-1].keys()
    assert not {path.name for path in out.iterdir()} - {WEIGHTS, "adapter_config.json", "last.pt", "log.jsonl"}
    assert all(value.dtype == torch.float32 for value in load_file(out / WEIGHTS).values())

    loaded = loading.load(ModelChoice(str(base), str(out), quantization, "cpu"), None, lambda step: None)
    for name in COLOURS:
        picture = read_picture(data.parent / f"{name}.png", max_bytes=10**6, max_pixels=10**6)
        question = (Message("user", (picture, "Which?")),)
        finished = list(generate(loaded, question, Sampling(max_new_tokens=12), 60.0, Event()))[-1]
        assert (finished.text.strip(), finished.reason) == (name, "end")
        assert finished.trace.sites and all(
            np.isfinite(probs).all() and len(probs) == len(finished.trace.tokens)
            for probs in finished.trace.router_probs.values()
        )


def run_apart(arguments, *, kill_after: int | None = None) -> str:
    """The command in a process of its own; `kill_after` ends it by SIGKILL once that step was logged."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mllm_demo.training.train", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if kill_after is not None and f"'step': {kill_after}," in line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL), "".join(said)
    return "".join(said)


def test_a_run_killed_in_the_middle_ends_at_the_very_same_weights(bases, data, tmp_path):
    """To the bit: the same operations in the same order on one thread, and every draw depends on the step alone."""
    base = bases("llava")
    options = ["--steps", "40", "--threads", "1", "--lora-dropout", "0.1", "--save-every", "7"]
    run_apart(arguments(data, base, tmp_path / "whole", *options))
    run_apart(arguments(data, base, tmp_path / "killed", *options), kill_after=20)
    assert not (tmp_path / "killed" / WEIGHTS).exists()
    said = run_apart(arguments(data, base, tmp_path / "killed", *options))
    at = int(said.split("resumed at step ")[1].split()[0])
    assert 0 < at < 40 and at % 7 == 0
    whole, killed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    kept = [{name: row[name] for name in ("step", "loss", "balance")} for row in curve(tmp_path / "killed")]
    assert kept == [{name: row[name] for name in ("step", "loss", "balance")} for row in curve(tmp_path / "whole")]


def test_ctrl_c_finishes_the_step_saves_and_the_same_command_goes_on(bases, data, tmp_path, capsys, monkeypatch):
    base, out = bases("llava"), tmp_path / "out"
    learn, steps = train.Learner.backward, []

    def interrupted(learner, rows):
        steps.append(len(rows))
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return learn(learner, rows)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train.Learner, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(data, base, out, "--steps", "12"))
    assert "saved at step 5; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    train.main(arguments(data, base, out, "--steps", "12"))
    assert "resumed at step 5" in capsys.readouterr().out
    assert len(steps) == 12 and (out / WEIGHTS).exists()


def test_going_on_with_other_settings_or_data_is_refused_in_a_sentence(bases, data, tmp_path):
    base, out = bases("llava"), tmp_path / "out"
    train.main(arguments(data, base, out, "--steps", "1"))
    before = (out / WEIGHTS).read_bytes()
    others = {"--steps 1, not 2": ["--steps", "2"], "--num-experts 4, not 3": ["--steps", "1", "--num-experts", "3"]}
    for said, more in others.items():
        with pytest.raises(SettingsError, match=said):
            train.main(arguments(data, base, out, *more))
    data.write_text(data.read_text() + "\n")
    with pytest.raises(SettingsError, match="--data of content"):
        train.main(arguments(data, base, out, "--steps", "1"))
    assert (out / WEIGHTS).read_bytes() == before


def test_a_finished_run_started_again_only_writes_its_adapter(bases, data, tmp_path, capsys):
    base, out = bases("llava"), tmp_path / "out"
    train.main(arguments(data, base, out, "--steps", "2"))
    weights = load_file(out / WEIGHTS)
    (out / WEIGHTS).unlink()
    train.main(arguments(data, base, out, "--steps", "2"))
    assert all(torch.equal(value, weights[name]) for name, value in load_file(out / WEIGHTS).items())


def test_recomputing_activations_changes_no_weight_beyond_rounding(bases, data, tmp_path):
    """Recomputed sums may be rounded otherwise; after one step of Adam at 1e-2 weights agree to 1e-6 or have moved
    by a gradient that is rounding itself, of which there must be few."""
    base = bases("qwen2.5-vl")
    common = ("--steps", "1", "--quantization", "none", "--warmup", "1")
    train.main(arguments(data, base, tmp_path / "kept", *common))
    train.main(arguments(data, base, tmp_path / "again", *common, "--gradient-checkpointing"))
    kept, again = (load_file(tmp_path / name / WEIGHTS) for name in ("kept", "again"))
    apart = torch.cat([(kept[name] - again[name]).abs().flatten() for name in kept])
    assert (apart > 1e-6).float().mean() < 1e-3


def test_the_whole_sequence_may_choose_and_then_every_answer_is_a_sequence(bases, data, tmp_path):
    out = tmp_path / "out"
    train.main(arguments(data, bases("smolvlm"), out, "--steps", "2", "--granularity", "sequence"))
    assert json.loads((out / "adapter_config.json").read_text())["granularity"] == "sequence"


def test_what_is_learned_is_the_mean_loss_over_answer_tokens(bases, data, tmp_path):
    """Against the model's own loss on the whole sequence with every other label ignored, in float32 to 1e-5."""
    options = train.parse(arguments(data, bases("llava"), tmp_path, "--quantization", "none", "--router-noise", "0"))
    loaded = train.load_base(options)
    loaded.model.float()
    loaded = replace(loaded, dtype="float32")
    model, encoder = train.adapt(loaded, options), train.encoder_for(loaded, options)
    rows = [row for line in train.read_lines(data).lines[:4] for row in encoder.encode(line.conversation())]
    learned = train.Learner(model, loaded, 0.0).backward(rows)["loss"]
    total, count = 0.0, 0
    for row in rows:
        labels = torch.full_like(row.inputs["input_ids"], -100)
        labels[0, row.positions + 1] = row.targets
        total += model(**row.inputs, labels=labels).loss.item() * len(row.targets)
        count += len(row.targets)
    assert learned == pytest.approx(total / count, rel=1e-5)


def test_only_the_adapter_learns_and_in_full_precision(bases, data, tmp_path):
    options = train.parse(arguments(data, bases("llava"), tmp_path))
    loaded = train.load_base(options)
    model = train.adapt(loaded, options)
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert learning and all("lora_" in name and value.dtype == torch.float32 for name, value in learning.items())
    assert loaded.four_bit_share > 0.5


def test_a_picture_that_vanishes_while_training_is_named(bases, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    saved = train.Run.save

    def save(run):
        saved(run)
        (data.parent / "red.png").unlink(missing_ok=True)

    monkeypatch.setattr(train.Run, "save", save)
    with pytest.raises(DataError, match="Line [25] was usable before .*red.png is not there"):
        train.main(arguments(data, bases("llava"), out, "--steps", "4"))


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(bases, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Learner, "backward", lambda learner, rows: {"loss": float("nan"), "balance": 1.0})
    with pytest.raises(GenerationError, match=r"no number at step 1 \(lines .*lower --lr"):
        train.main(arguments(data, bases("llava"), tmp_path / "out", "--steps", "2"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("x\ny", "No line of .* line 1: it is not JSON"),
        ('{"image": "no.png", "question": "a", "answer": "b"}', "line 1: the picture no.png is not there"),
        ("", "is empty"),
    ],
)
def test_no_usable_line_is_an_error(bases, tmp_path, lines, said):
    (tmp_path / "my.jsonl").write_text(lines)
    with pytest.raises(DataError, match=said):
        train.main(arguments(tmp_path / "my.jsonl", bases("llava"), tmp_path / "out"))


@pytest.mark.parametrize("flag", ["--lr=0", "--steps=-1", "--epochs=nan", "--seed=-1", "--nonsense=1"])
def test_a_flag_that_cannot_be_used_is_one_sentence(flag):
    with pytest.raises(SettingsError, match=flag.split("=")[0]):
        train.parse(["--data", "a", "--base", "b", flag])


def test_every_line_comes_once_an_epoch_in_an_order_of_the_seed():
    course = Course(3)
    course.numbers = [2, 5, 7, 11, 13]
    seen = [number for step in range(10) for number in course.batch(step, 3)]
    for epoch in range(6):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == course.numbers
    other = Course(3)
    other.load_state_dict(course.state_dict())
    assert other.batch(7, 3) == seen[21:24]
    assert len({tuple(seen[5 * epoch : 5 * epoch + 5]) for epoch in range(6)}) > 1
