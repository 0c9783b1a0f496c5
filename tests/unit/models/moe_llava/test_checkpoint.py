"""MoE-LLaVA checkpoints as published: one command answers, what is wrong with them is said by name, once is enough."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mllm_demo import ask, cli
from mllm_demo.errors import CheckpointError, LoadError
from mllm_demo.models import fetching
from mllm_demo.models.catalog import MOE_LLAVA, find
from mllm_demo.models.moe_llava import checkpoint
from mllm_demo.models.moe_llava.fetch import fetch
from mllm_demo.routing.trace import RoutingTrace
from tests.unit.models.moe_llava.originals import FAMILIES, FEATURES, TOWER, change_state, moe, save_original

WIDE = (80, 40)
# The command of the README.
COMMAND = "python -m mllm_demo.ask --model {model} --image {picture} --trace {trace}"
QUESTION = "What is in the picture?"
PRESETS = {
    "moe-llava-phi2": ("moe_llava_phi", "clip", None),
    "moe-llava-phi2-384": ("moe_llava_phi", "siglip", None),
    "moe-llava-stablelm": ("moe_llava_stablelm", "clip", "arcade100k.tiktoken"),
    "moe-llava-stablelm-384": ("moe_llava_stablelm", "siglip", "arcade100k.tiktoken"),
    "moe-llava-qwen": ("moe_llava_qwen", "clip", "qwen.tiktoken"),
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a shell command of this program: exit status, stdout and stderr."""

    def run(command: str, *more: str):
        monkeypatch.setattr(sys, "argv", [*command.split()[2:], *more])
        status = cli.run(ask.main)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (WIDE[1], WIDE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_original(tmp_path_factory.mktemp("originals") / "phi")


class Hub:
    """Stands where the hub's client is: `repositories` by id, of which only the files asked for are handed out."""

    def __init__(self, repositories: dict[str, Path], cache: Path):
        self.repositories, self.cache, self.fetched = repositories, cache, []

    def __call__(self, name, *, local_files_only=False, allow_patterns=(), **_) -> str:
        here = self.cache / name.replace("/", "--")
        wanted = [
            path for path in self.repositories[name].iterdir() if any(path.match(pattern) for pattern in allow_patterns)
        ]
        if any(not (here / path.name).exists() for path in wanted):
            if local_files_only:
                raise LocalEntryNotFoundError("not cached")
            here.mkdir(parents=True, exist_ok=True)
            self.fetched.append(name)
            for path in wanted:
                shutil.copy(path, here)
        return str(here)


@pytest.mark.parametrize("preset", [entry.name for entry in MOE_LLAVA])
def test_every_preset_answers_by_its_name_alone(run, picture, tmp_path, monkeypatch, preset):
    family, tower, tiktoken = PRESETS[preset]
    published = save_original(tmp_path / "published", family, tower, tiktoken=tiktoken)
    shutil.move(published / TOWER, tmp_path / TOWER)
    repositories = {find(preset).hub_id: published, f"openai/{TOWER}": tmp_path / TOWER}
    hub = Hub(repositories, tmp_path / "hub")
    monkeypatch.setattr(fetching, "snapshot_download", hub)
    trace = tmp_path / "routing.safetensors"
    flags = ("--cache-dir", str(tmp_path / "cache"), "--device", "cpu", "--max-new-tokens", "2", QUESTION)
    command = COMMAND.format(model=preset, picture=picture, trace=trace)
    status, out, err = run(command, *flags)
    assert status == 0, err
    assert sum(token.modality == "image" for token in RoutingTrace.load(trace).tokens) == FEATURES[tower]
    fetched = list(hub.fetched)
    assert set(fetched) == set(repositories)
    assert run(command, *flags)[:2] == (0, out) and hub.fetched == fetched, "a second start fetches nothing"


def convert(folder: Path, cache: Path, steps: list | None = None) -> Path:
    return fetch(str(folder), folder, cache, "Tiny", (steps if steps is not None else []).append).folder


@pytest.mark.parametrize(
    ("family", "tower", "tiktoken"),
    [
        ("moe_llava_phi", "clip", None),
        ("moe_llava_stablelm", "siglip", "arcade100k.tiktoken"),
        ("moe_llava_qwen", "clip", "qwen.tiktoken"),
        ("moe_llava_qwen1_5", "siglip", None),
    ],
    ids=FAMILIES,
)
def test_the_command_of_the_readme(run, picture, tmp_path, family, tower, tiktoken):
    folder = save_original(tmp_path / family, family, tower, tiktoken=tiktoken)
    trace = tmp_path / "routing.safetensors"
    flags = ("--cache-dir", str(tmp_path / "cache"), "--device", "cpu", "--max-new-tokens", "3", QUESTION)
    command = COMMAND.format(model=folder, picture=picture, trace=trace)
    status, out, err = run(command, *flags)
    assert status == 0 and out.endswith("\n") and "Converting" in err, err

    routed = RoutingTrace.load(trace)
    assert [(site.layer_idx, site.num_experts, site.num_experts_per_tok) for site in routed.sites] == [
        (0, 4, 2),
        (2, 4, 2),
    ]
    seen = [token for token in routed.tokens if token.modality == "image"]
    assert len(seen) == FEATURES[tower]
    if tower == "clip":  # cropped in the middle: a square of the picture's height
        assert seen[0].box[:2] == (20, 0) and seen[-1].box[2:] == (60, 40)
    else:  # stretched, and the first patch is not read
        assert seen[0].box == (20, 0, 40, 10) and seen[-1].box[2:] == WIDE
    said = "".join(token.text for token in routed.tokens if (token.role, token.modality) == ("user", "text"))
    assert QUESTION in said
    for site in routed.sites:
        np.testing.assert_allclose(routed.routing_weights[site.name].sum(1), 1, atol=2e-3)

    _, again, err = run(command, *flags)
    assert again == out and "Converting" not in err


def lacking(name: str):
    return lambda state: state.pop(name)


def holding(name: str, *shape: int):
    return lambda state: state.update({name: torch.zeros(shape)})


ROUTER = "model.layers.2.mlp.deepspeed_moe.gate.wg.weight"
BIAS = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.3.fc2.bias"
WORDS = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lacking(ROUTER), f"{ROUTER} is missing"),
        (lacking(BIAS), f"{BIAS} is missing"),
        (lacking(WORDS), f"lacks {WORDS}"),
        (holding("model.layers.7.mlp.fc1.bias", 3), "the tensor model.layers.7.mlp.fc1.bias, for which"),
        (holding(ROUTER, 3, 128), f"{ROUTER} of Tiny is [3, 128], where the configuration asks for [4, 128]"),
        (holding(WORDS, 100, 128), "has 257 tokens and its weights have 100"),
    ],
)
def test_wrong_weights_are_refused_by_name(original, tmp_path, change, words):
    folder = Path(shutil.copytree(original, tmp_path / "phi"))
    change_state(folder, change)
    with pytest.raises(CheckpointError) as refused:
        convert(folder, tmp_path / "cache")
    assert words in str(refused.value)
    assert not [path for path in tmp_path.glob("cache/moe_llava/*") if not path.name.startswith(".")]


def test_other_wrong_folders(original, tmp_path):
    def refused(change) -> str:
        folder = Path(shutil.copytree(original, tmp_path / "phi"))
        change(folder)
        try:
            with pytest.raises(CheckpointError) as error:
                convert(folder, tmp_path / "cache")
        finally:
            shutil.rmtree(folder)
        return str(error.value)

    def configure(**changes):
        def change(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | changes))

        return change

    def cut(folder: Path) -> None:
        whole = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])

    assert "cut off" in refused(cut)
    assert "no usable tokenizer" in refused(lambda folder: [path.unlink() for path in folder.glob("tokenizer*")])
    assert "preprocessor_config.json" in refused(lambda folder: (folder / TOWER / "preprocessor_config.json").unlink())
    assert "names no vision tower" in refused(configure(mm_image_tower=None))
    assert "'qformer4_36'" in refused(configure(image_projector_type="qformer4_36"))
    assert "top-3" in refused(configure(moe=moe(top_k_experts=3)))
    assert "layers [0, 9]" in refused(configure(moe=moe(moe_layers_idx=[0, 9])))


def test_a_conversion_that_was_stopped_goes_on(original, tmp_path, monkeypatch):
    steps = []

    def stop(step):
        steps.append(step)
        if "Converting" in step.note and not step.note.endswith(" 0%"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(str(original), original, tmp_path, "Tiny", stop)
    (part,) = tmp_path.glob("moe_llava/.*.partial/*.part")
    kept = part.stat().st_size
    folder = convert(original, tmp_path)
    assert kept > 0 and not list(folder.glob("*.part")) and not list(folder.parent.glob(".*"))
    whole = convert(original, tmp_path / "elsewhere")
    for file in whole.glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_rows_beyond_the_tokenizer_are_cut_and_the_picture_has_the_next_id(original, tmp_path):
    folder = convert(original, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    state = torch.load(original / "pytorch_model.bin", weights_only=True)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"][:257])
    assert model.config.image_token_id == AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>") == 257
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2]])).logits
    assert logits.shape[-1] == 258 and torch.isneginf(logits[..., 257]).all()


def test_a_folder_of_another_kind_is_none_of_ours(original, tmp_path):
    assert checkpoint.read_original(original)["model_type"] == "moe_llava_phi"
    assert checkpoint.read_original(convert(original, tmp_path)) is None
    assert checkpoint.read_original(tmp_path) is None


def test_a_full_disk_is_said_before_anything_is_written(original, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(LoadError, match="GB is free; make room"):
        convert(original, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
