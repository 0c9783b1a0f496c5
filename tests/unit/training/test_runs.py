"""A training run survives being killed, and its narrow weights follow their float32 copies."""

import json

import pytest
import torch
from torch import nn

from mllm_demo.training.runs import Masters, Run, average_gradients, cosine


def steps(folder, count: int, stop: int | None = None) -> torch.Tensor:
    """Trains one linear layer on data numbered by step; the checkpoint is written every second step."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    run = Run(folder, {"layer": layer, "optimizer": optimizer}, count, 1)
    while run.step < (stop or count):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(run.step))
        loss = (layer(x) - x.sum(-1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.advance({"loss": loss.item()}, every=2)
        if run.step % 2 == 0:
            run.save()
    return layer.weight.detach()


def test_a_run_that_was_cut_off_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = steps(tmp_path / "whole", 10)
    steps(tmp_path / "cut", 10, stop=5)  # the fifth step is lost: the checkpoint is of the fourth
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 4
    assert torch.equal(steps(tmp_path / "cut", 10), whole)


def test_the_curve_is_logged_line_by_line(tmp_path):
    steps(tmp_path, 6)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all({"samples/s", "minutes left", "loss"} <= row.keys() for row in rows)


def test_only_the_first_process_writes(tmp_path):
    run = Run(tmp_path, {}, 4, 1, rank=1)
    run.advance({"loss": 1.0}, every=1)
    run.save()
    assert not list(tmp_path.iterdir())


def test_small_steps_are_not_lost_in_narrow_weights():
    """A step of a thousandth vanishes in bfloat16 (8 bits of mantissa), but not in its float32 copy."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = Masters([weight])
    optimizer = torch.optim.SGD(masters.copies, lr=1e-3)
    for _ in range(8):
        weight.sum().backward()
        masters.take_gradients()
        assert weight.grad is None
        optimizer.step()
        masters.give_back()
    assert masters.copies[0][0].item() == pytest.approx(1 - 8e-3, abs=1e-6)
    assert weight.dtype == torch.bfloat16 and weight[0].item() == pytest.approx(1 - 8e-3, abs=4e-3)


def test_the_learning_rate_rises_and_falls():
    rates = [cosine(step, 100, 10) for step in range(101)]
    assert rates[0] < rates[5] < max(rates) <= 1 and rates[100] == pytest.approx(0.02)
    assert rates.index(max(rates)) == 9


def test_one_process_averages_with_nobody():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    average_gradients([weight])
    assert weight.grad.tolist() == [1.0, 2.0]
