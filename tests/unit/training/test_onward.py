"""What training made of a model is kept as a small file, from which any share of the way can be gone again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_demo.errors import DataError
from mllm_demo.training.onward import FILES, go, keep

SHAPES = {"large": (96, 80), "small": (7,), "still": (40, 200)}


def model(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / name)
    return folder


@pytest.fixture
def way(tmp_path) -> tuple[Path, Path, Path]:
    """A model, what became of it and the file that keeps the difference."""
    torch.manual_seed(0)
    first = {name: torch.randn(shape).half() for name, shape in SHAPES.items()} | {"seen": torch.tensor(3)}
    last = {name: (v.float() + 0.05 * torch.randn(v.shape)).to(v.dtype) for name, v in first.items()}
    last |= {"still": first["still"], "seen": first["seen"]}
    start, end = model(tmp_path / "start", first), model(tmp_path / "end", last)
    keep(start, end, tmp_path / "kept" / "onward.safetensors")
    return start, end, tmp_path / "kept" / "onward.safetensors"


@pytest.mark.parametrize("share", [0.0, 0.65, 1.0])
def test_a_share_of_the_way_is_gone_to_within_an_eighth_of_the_difference(way, tmp_path, share):
    start, end, file = way
    go(start, file, share, tmp_path / "to")
    for name in FILES:
        first, last, gone = (load_file(folder / name) for folder in (start, end, tmp_path / "to"))
        assert gone.keys() == first.keys() and all(gone[key].dtype == first[key].dtype for key in first)
        for key in SHAPES:
            whole = last[key].float() - first[key].float()
            off = gone[key].float() - (first[key].float() + share * whole)
            assert off.norm() <= whole.norm() / 8
        assert torch.equal(gone["still"], first["still"]) and gone["seen"] == 3


def test_it_takes_a_quarter_of_what_has_changed_and_nothing_of_the_rest(way):
    start, _, file = way
    changed = sum(load_file(start / name)["large"].nbytes for name in FILES)
    assert file.stat().st_size < 0.3 * changed + 2000
    assert not any("still" in name or "seen" in name for name in load_file(file))


def test_models_of_other_shapes_and_files_that_are_none_are_told_in_a_sentence(way, tmp_path):
    start, _, file = way
    other = model(tmp_path / "other", {"large": torch.zeros(3)})
    with pytest.raises(DataError, match="began with"):
        keep(start, other, tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="--export"):
        keep(start, tmp_path / "nowhere", tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="kept from"):
        go(other, file, 1.0, tmp_path / "to")
    assert not (tmp_path / "to").exists()
    file.write_bytes(b"no weights")
    with pytest.raises(DataError, match="cannot be read"):
        go(start, file, 1.0, tmp_path / "to")
