"""What stage 0 taught is kept small and read back as it was, from a checkpoint or from the file beside the project."""

import pytest
import torch
from torch import nn

from mllm_demo.models.bundled.weights import ASSETS
from mllm_demo.training.base import read_heads, read_taught, save_taught
from mllm_demo.training.placing import PlaceHead
from mllm_demo.training.tower import DenseHeads


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    tower[1].running_mean.fill_(1 / 3)
    return {"tower": tower, "connector": nn.Linear(4, 2)}


def states() -> dict[str, dict[str, torch.Tensor]]:
    return {name: module.state_dict() for name, module in parts().items()}


def test_weights_come_back_to_half_precision_and_statistics_exactly(tmp_path):
    save_taught(states(), tmp_path / "deep" / "tower.safetensors")
    state = read_taught(tmp_path / "deep" / "tower.safetensors")
    for name, module in parts().items():
        for key, value in module.state_dict().items():
            assert state[name][key].dtype == value.dtype
            exact = "running_" in key or "num_batches" in key
            assert torch.allclose(state[name][key], value, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3)
        module.load_state_dict(state[name])


def test_a_checkpoint_of_a_run_is_read_too(tmp_path):
    torch.save(states() | {"step": 3}, tmp_path / "last.pt")
    assert torch.equal(read_taught(tmp_path / "last.pt")["connector"]["weight"], parts()["connector"].weight)


def test_the_shipped_model_has_the_heads_that_the_next_training_goes_on_with():
    heads, width = read_heads(ASSETS), 576
    PlaceHead(width).load_state_dict(heads["places"])
    DenseHeads(width, torch.zeros(1, width)).load_state_dict(heads["dense"])


def test_a_folder_without_heads_is_told_by_name(tmp_path):
    with pytest.raises(SystemExit, match=r"heads\.safetensors is missing: go on from a folder that --export wrote"):
        read_heads(tmp_path)
