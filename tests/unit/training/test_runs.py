"""A training run survives being killed and goes on only as what it was; narrow weights follow their float32 copies."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mllm_demo.errors import CheckpointError, SettingsError
from mllm_demo.training.runs import Masters, Run, average_gradients, cosine, teach


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


def test_parameters_with_a_share_move_at_that_share_of_the_rate(tmp_path):
    slow, fast = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": [slow], "share": 0.25}, {"params": [fast]}])
    options = SimpleNamespace(lr=0.1, every=10)
    run = Run(tmp_path, {}, steps=3, batch_size=1)

    def losses_of(target: float) -> dict[str, torch.Tensor]:
        return {"loss": (slow + fast - target).sum()}

    teach(run, optimizer, [(1.0,)] * 3, losses_of, dict, options, warmup=1, clip=100.0)
    assert fast.abs().min() > 0.1
    assert torch.allclose(slow, 0.25 * fast)


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


def test_masters_that_become_their_average_are_the_mean_of_where_they_stood():
    masters = Masters([nn.Parameter(torch.tensor([0.0]))])
    average = AveragedModel(masters.copies, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    for value in (4.0, 8.0):  # the first one starts the average, every later one moves it by a fourth
        masters.load_state_dict({"0": torch.tensor([value])})
        average.update_parameters(masters.copies)
    masters.become(average)
    masters.give_back()
    assert masters.parameters[0].item() == 5.0


def test_blended_masters_stand_on_the_way_from_where_others_are_and_stay_where_there_are_none():
    masters = Masters([nn.Parameter(torch.tensor([4.0, 8.0]))])
    masters.blend([], 0.5)
    assert masters.copies[0].tolist() == [4.0, 8.0]
    masters.blend([torch.tensor([0.0, 4.0])], 0.25)
    assert masters.copies[0].tolist() == [1.0, 5.0]


def test_the_learning_rate_rises_and_falls():
    rates = [cosine(step, 100, 10) for step in range(101)]
    assert rates[0] < rates[5] < max(rates) <= 1 and rates[100] == pytest.approx(0.02)
    assert rates.index(max(rates)) == 9


def test_one_process_averages_with_nobody():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    average_gradients([weight])
    assert weight.grad.tolist() == [1.0, 2.0]


def start(folder, **settings) -> tuple[Run, nn.Linear]:
    part = nn.Linear(2, 1)
    return Run(folder, {"part": part}, 100, 4, settings=settings), part


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_its_checkpoint_and_keeps_the_curve_up_to_it(tmp_path):
    run, part = start(tmp_path)
    for _ in range(20):
        run.advance({"loss": 1.0})
    run.save()
    for _ in range(20):
        run.advance({"loss": 3.0})
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 41, "lo')  # the kill came in the middle of a line
    assert [row["step"] for row in rows_whole(tmp_path)] == [10, 20, 30, 40]

    again, other = start(tmp_path)
    assert (again.resumed, again.step) == (True, 20)
    assert torch.equal(part.weight, other.weight)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    for _ in range(10):
        again.advance({"loss": 1.0})
    assert rows(tmp_path)[-1]["step"] == 30 and rows(tmp_path)[-1]["loss"] == pytest.approx(1.0)


def rows_whole(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line.endswith("}")]


def test_a_checkpoint_that_was_half_written_leaves_the_last_whole_one(tmp_path):
    run, _ = start(tmp_path)
    run.advance({"loss": 1.0})
    run.save()
    (tmp_path / "last.part").write_bytes(b"half")
    again, _ = start(tmp_path)
    assert again.step == 1


def test_other_settings_are_refused_by_name_and_change_nothing(tmp_path):
    run, _ = start(tmp_path, **{"--lr": 0.1, "--seed": 0})
    run.save()
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(SettingsError, match=r"holds a run with --lr 0.1, not 0.2; repeat its settings .* --out"):
        start(tmp_path, **{"--lr": 0.2, "--seed": 0})
    assert (tmp_path / "last.pt").read_bytes() == before
    again, _ = start(tmp_path, **{"--lr": 0.1, "--seed": 0})
    assert again.resumed


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged; delete it"):
        start(tmp_path)


def test_a_checkpoint_of_another_version_says_what_it_lacks_and_stays(tmp_path):
    start(tmp_path)[0].save()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["part"]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="holds no part: another version .* choose another --out"):
        start(tmp_path)
    assert (tmp_path / "last.pt").exists()


def test_it_is_saved_by_steps_by_time_and_at_the_end(tmp_path):
    run, _ = start(tmp_path)
    run.steps = 7

    def saved(seconds):
        (tmp_path / "last.pt").unlink(missing_ok=True)
        run.advance({"loss": 1.0})
        run.save_when_due(every=3, seconds=seconds)
        return (tmp_path / "last.pt").exists()

    assert [saved(3600) for _ in range(3)] == [False, False, True]
    assert saved(0)
    assert [saved(3600) for _ in range(3)] == [False, True, True]
