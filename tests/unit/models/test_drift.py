"""The command that compares the routing of a quantized model with its own in 16 bit, on tiny models."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_demo.chat.generation import generate
from mllm_demo.chat.layout import image_token_id
from mllm_demo.chat.messages import Message
from mllm_demo.cli import run
from mllm_demo.errors import TraceError
from mllm_demo.models.loading import load
from mllm_demo.models.quantize import compute_dtype
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.routing import drift
from mllm_demo.settings import ModelChoice, Sampling, Settings
from tests.unit.models import tiny_awaker
from tests.unit.models.conftest import _save_adapter
from tests.unit.models.mixtures import save_lora, save_xlora
from tests.unit.models.test_families import WIDE, picture
from tests.unit.models.test_native_families import EXPERTS, qwen3_vl

LONGEST = 4
COMPUTED = str(compute_dtype(torch.device("cpu"))).removeprefix("torch.")


@pytest.fixture
def command(tmp_path, checkpoint, moe_lora):
    """Runs the command on a tiny model with a picture; `changes` are added or put in the place of its flags."""
    Image.effect_noise((24, 24), 60).convert("RGB").save(tmp_path / "picture.png")
    flags = {"model": checkpoint, "adapter": moe_lora, "device": "cpu", "cache-dir": tmp_path}
    flags |= {"max-new-tokens": LONGEST}
    asked = {"image": tmp_path / "picture.png", "question": "what is this", "json": tmp_path / "drift.json"}

    def command(**changes) -> Path:
        given = flags | asked | {name.replace("_", "-"): value for name, value in changes.items()}
        parts = [(f"--{name}", *([] if value is True else [str(value)])) for name, value in given.items() if value]
        drift.main([part for flag in parts for part in flag], {})
        return tmp_path / "drift.json"

    return command


def test_a_line_for_every_router_and_one_for_all(command, capsys):
    report = json.loads(command().read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{COMPUTED} against nf4, 1 prompts, ") and lines[-1].startswith("all routers")
    names = [row["site"] for row in report["routers"]]
    assert [line.split()[0] for line in lines[2:-1]] == names and len(names) == 6
    assert {row["layer_idx"] for row in report["routers"]} == {0, 1}
    # Four bits move the probabilities, but not to somewhere else altogether.
    assert all(0 < row["variation"] < 0.5 and row["largest"] <= 1 for row in report["routers"])
    assert report["unquantized"] == COMPUTED and report["all"]["routers"] == 6
    assert report["all"]["variation"] == pytest.approx(np.mean([row["variation"] for row in report["routers"]]))
    assert [block | report["all"] for block in report["blocks"]] == [{"block": "mlp"} | report["all"]]


def test_attention_and_mlp_are_summed_up_apart(command, checkpoint, tmp_path, capsys):
    targets = r".*language_model.*\.(o_proj|down_proj)"
    config = MoeLoraConfig(r=4, num_experts=4, num_experts_per_tok=1, target_modules=targets)
    report = json.loads(command(adapter=_save_adapter(checkpoint, config, tmp_path / "both")).read_text())
    assert [(block["block"], block["routers"]) for block in report["blocks"]] == [("attention", 2), ("mlp", 2)]
    for block in report["blocks"]:
        rows = [row for row in report["routers"] if f".{block['block'][:3]}" in row["site"].replace("self_", "")]
        assert block["variation"] == pytest.approx(np.mean([row["variation"] for row in rows]))
        assert block["largest"] == max(row["largest"] for row in rows)
    ends = [line.rsplit("  ", 4)[0].split("  ")[0] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert ends == ["attention routers", "mlp routers", "all routers"]


def pooled(checkpoint: Path, folder: Path) -> Path:
    """An adapter whose routers choose once, by the mean of what the prompt's tokens bring to the layer."""
    targets = r".*language_model.*\.(gate_proj|up_proj)"
    config = MoeLoraConfig(r=4, num_experts=4, granularity="sequence", target_modules=targets)
    return _save_adapter(checkpoint, config, folder)


def mean_of_all(checkpoint: Path, folder: Path) -> Path:
    """An adapter that chooses by the mean embedding of the whole prompt and keeps the choice."""
    targets = r".*language_model.*\.(o_proj|down_proj)"
    config = MoeLoraConfig(r=4, num_experts=4, router_input="prompt_mean", target_modules=targets)
    return _save_adapter(checkpoint, config, folder)


@pytest.fixture(params=["token", "x-lora", "sequence, pooled", "sequence, prompt's mean", "awaker", "qwen3-vl-moe"])
def model(request, checkpoint, moe_lora, tmp_path) -> ModelChoice:
    """Every way to choose: by token, once for a prompt, once more for its answer, and a model's own experts."""
    folder = tmp_path / "model"
    model, adapter = {
        "token": lambda: (checkpoint, moe_lora),
        "x-lora": lambda: (checkpoint, xlora(checkpoint, tmp_path)),
        "sequence, pooled": lambda: (checkpoint, pooled(checkpoint, folder)),
        "sequence, prompt's mean": lambda: (checkpoint, mean_of_all(checkpoint, folder)),
        "awaker": lambda: (tiny_awaker.save(folder), None),
        "qwen3-vl-moe": lambda: (qwen3_vl().save(folder), None),
    }[request.param]()
    return ModelChoice(str(model), adapter and str(adapter), "nf4", "cpu")


def xlora(checkpoint: Path, folder: Path) -> Path:
    """A mixture that is read without the KV cache, so that every step reads prompt and answer again."""
    experts = [save_lora(checkpoint, folder / f"expert{seed}", seed) for seed in (1, 2)]
    return save_xlora(checkpoint, folder / "xlora", experts)


def endless(*arguments):
    """Loads a model that never ends an answer nor draws the token of a picture, as a random one may at any time."""
    loaded = load(*arguments)
    loaded.model.generation_config.eos_token_id = []
    return biased(loaded, -1e4)


def biased(loaded, logit: float):
    """With `logit` for the token of a picture, whatever the model thinks of it."""
    image = torch.tensor(image_token_id(loaded.processor, loaded.model.config))
    head = loaded.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out.index_fill(-1, image, logit))
    return loaded


def asked() -> list[Message]:
    return [Message("user", (picture(WIDE), "what is this"))]


def same(a, b) -> bool:
    return a.tokens == b.tokens and all(
        np.array_equal(a.router_probs[site.name], b.router_probs[site.name])
        and np.array_equal(a.selected_experts[site.name], b.selected_experts[site.name])
        for site in a.sites
    )


def test_what_is_compared_happens_in_a_chat_and_no_model_drifts_from_itself(model, tmp_path, monkeypatch):
    """Drawn or led through, the routing of prompt and answer is the one that the engine records."""
    monkeypatch.setattr(drift, "load", endless)
    settings = Settings(model, Sampling(LONGEST), cache_dir=tmp_path)
    messages = asked()
    drawn = drift.read(settings, "none", messages, None)
    led = drift.read(settings, "none", messages, drawn.answers)
    assert led.answers == drawn.answers and led.dtype == COMPUTED
    assert len(led.answers[0]) == LONGEST
    assert same(led.traces[0], drawn.traces[0])
    loaded = endless(drift.replace(model, quantization="none"), tmp_path, lambda step: None)
    *_, finished = generate(loaded, tuple(messages), Sampling(LONGEST), 60, threading.Event())
    assert same(finished.trace, drawn.traces[0])


def test_the_quantized_model_is_led_through_the_same_answer(model, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "load", endless)
    settings = Settings(model, Sampling(LONGEST), cache_dir=tmp_path)
    drawn = drift.read(settings, "none", asked(), None)
    led = drift.read(settings, "nf4", asked(), drawn.answers)
    assert [token.id for token in led.traces[0].tokens] == [token.id for token in drawn.traces[0].tokens]
    rows = drift.divergence(drawn.traces[0], led.traces[0])
    assert any(row.variation > 0 for row in rows)


def test_the_second_choice_of_an_awaker_model_is_compared_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "load", endless)
    choice = ModelChoice(str(tiny_awaker.save(tmp_path / "model")), None, "nf4", "cpu")
    (trace,), (answer,), _ = drift.read(Settings(choice, Sampling(LONGEST), cache_dir=tmp_path), "none", asked(), None)
    assert {site.granularity for site in trace.sites} == {"sequence"} and answer
    moved = [(trace.router_probs[s.name][0] != trace.router_probs[s.name][-1]).any() for s in trace.sites]
    assert all(moved)


def test_a_model_s_own_experts_are_compared(command, tmp_path, capsys):
    report = json.loads(command(model=qwen3_vl().save(tmp_path / "native"), adapter=None).read_text())
    assert [row["site"].rpartition(".")[2] for row in report["routers"]] == ["gate", "gate"]
    assert all(0 < row["variation"] < 1 for row in report["routers"]) and EXPERTS == 8


def test_the_model_s_own_habits_of_answering_play_no_part(model_with_habits, tmp_path, monkeypatch):
    """Beams, a penalty and sampling in the checkpoint's generation_config.json: the answer is plainly greedy."""
    monkeypatch.setattr(drift, "load", endless)
    plain, habitual = model_with_habits
    first, second = (
        drift.read(Settings(choice, Sampling(16), cache_dir=tmp_path), "none", asked(), None)
        for choice in (plain, habitual)
    )
    assert first.answers == second.answers and len(first.answers[0]) == 16
    assert len(set(first.answers[0])) < 16  # where nothing may come twice, there would be no repetition
    assert same(first.traces[0], second.traces[0])


@pytest.fixture
def model_with_habits(tmp_path) -> tuple[ModelChoice, ModelChoice]:
    folders = [qwen3_vl().save(tmp_path / name) for name in ("plain", "habitual")]
    habits = {"num_beams": 3, "repetition_penalty": 1.9, "do_sample": True, "no_repeat_ngram_size": 1, "top_k": 5}
    habits |= {"min_new_tokens": 20, "min_length": 200}
    path = folders[1] / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | habits))
    return tuple(ModelChoice(str(folder), None, "nf4", "cpu") for folder in folders)


def test_no_answer_holds_a_picture(tmp_path, monkeypatch):
    """A random model that would answer with nothing but the token of a picture has to say something else."""
    choice = ModelChoice(str(qwen3_vl().save(tmp_path / "model")), None, "nf4", "cpu")
    monkeypatch.setattr(drift, "load", lambda *arguments: biased(endless(*arguments), 1e4))
    (trace,), (answer,), _ = drift.read(Settings(choice, Sampling(LONGEST), cache_dir=tmp_path), "none", asked(), None)
    image = qwen3_vl().config.image_token_id
    assert len(answer) == LONGEST and image not in answer and image in [token.id for token in trace.tokens]


def test_weights_that_are_stored_in_4_bit_have_nothing_to_be_compared_with(checkpoint, moe_lora, tmp_path):
    stored = load(ModelChoice(str(checkpoint), None, "nf4", "cpu"), tmp_path, lambda step: None)
    stored.model.save_pretrained(tmp_path / "stored")
    stored.processor.save_pretrained(tmp_path / "stored")
    choice = ModelChoice(str(tmp_path / "stored"), str(moe_lora), "nf4", "cpu")
    with pytest.raises(TraceError, match="are stored in nf4, so there is nothing to compare"):
        drift.read(Settings(choice, Sampling(LONGEST), cache_dir=tmp_path), "none", asked(), None)


def test_text_alone_is_compared_too(command):
    assert json.loads(command(image=None).read_text())["quantization"] == "nf4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": None}, "No router can be read"),
        ({"quantization": "none"}, "would be compared with itself"),
        ({"moe_llava_noise": True}, "change by chance; leave the noise out"),
        ({"question": None}, "one --question for each --image"),
        ({"question": " "}, "--question is empty"),
        ({"json": "nowhere/drift.json"}, "must name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(command, capsys, changes, words):
    assert run(lambda: command(**changes)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
