"""What every training command shares: checkpoints that survive a kill, a logged curve, pace, several processes.

    torchrun --nproc-per-node 2 -m mllm_demo.training.tower --threads 1    # one process a core

It knows nothing of models or data; a run is a folder with `last.pt` and `log.jsonl`.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mllm_demo.errors import CheckpointError, SettingsError
from mllm_demo.models.quantize import resolve_device


def add_flags(
    parser: argparse.ArgumentParser, *, steps: int, batch_size: int, lr: float, out: Path, every: int = 100
) -> None:
    """The flags of a command that trains, with its own defaults."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size, help="pictures a step, over all processes")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures, beside each that learns")
    parser.add_argument("--every", type=int, default=every, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--art", type=Path, default=Path("runs/art"))
    parser.add_argument("--base", type=Path, default=Path("runs/base"))


def join_processes() -> tuple[int, int]:
    """(rank, number of processes); joins them when started by torchrun."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def begin(options: argparse.Namespace) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device), with the threads and the seed of `options`."""
    torch.set_num_threads(options.threads)
    rank, world = join_processes()
    torch.manual_seed(options.seed)
    return rank, world, resolve_device("auto")


def wait_for_others() -> None:
    """Returns once every process is here."""
    if dist.is_initialized():
        dist.barrier()


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """One exchange between processes for all gradients together; nothing when there is one process."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten().float() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a ramp, then half a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))


class Masters:
    """Float32 copies of `parameters`, which an optimizer steps while the model computes in a narrower dtype."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.copies = nn.ParameterList(p.detach().float().clone() for p in parameters)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Moves the model's gradients to the copies."""
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    def become(self, average: AveragedModel) -> None:
        """Makes the copies what `average` has kept of them."""
        self.copies.load_state_dict(average.module.state_dict())

    @torch.no_grad()
    def blend(self, others: list[torch.Tensor], share: float) -> None:
        """Moves the copies to `share` of the way from `others`, where there are any, to themselves. Weights half-way
        between two ends of one training are often better than both (Wortsman et al., arXiv:2109.01903)."""
        if others:
            torch._foreach_lerp_(list(self.copies), others, 1.0 - share)

    @torch.no_grad()
    def give_back(self) -> None:
        """Writes the copies into the model."""
        torch._foreach_copy_(self.parameters, list(self.copies))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.copies.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.copies.load_state_dict(state)
        self.give_back()


class Run:
    """A training run in `folder`. `parts`: what a checkpoint holds, each with a `state_dict`.

    `settings`: what must not change between the sessions of one run, as plain values under the names of their flags.

    Raises `SettingsError` when the folder holds a run with other settings, `CheckpointError` when it cannot be read.
    """

    def __init__(
        self, folder: Path, parts: Mapping[str, object], steps: int, batch_size: int, rank: int = 0,
        settings: Mapping[str, object] | None = None,
    ):  # fmt: skip
        self.folder, self.parts, self.steps, self.batch_size, self.rank = folder, parts, steps, batch_size, rank
        self.settings = dict(settings or {})
        folder.mkdir(parents=True, exist_ok=True)
        self.last = folder / "last.pt"
        self.step = 0
        self._averages: dict[str, float] = {}
        self.resumed = self.last.exists()
        if self.resumed:
            self._resume()
        self._began, self._first = time.monotonic(), self.step
        self._saved = self._began

    def _resume(self) -> None:
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
        except Exception as error:  # torch answers a damaged file with any exception there is
            raise CheckpointError(f"{self.last} is damaged; delete it to train from the start.") from error
        self._check_settings(state.get("settings", self.settings))
        missing = sorted(self.parts.keys() - state.keys())
        if missing:
            raise CheckpointError(
                f"{self.last} holds no {', '.join(missing)}: another version of this command wrote it; "
                "choose another --out, or delete it to train from the start."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self._averages = state.get("averages", {})
        self._forget_rows_since()
        self.say(f"resumed at step {self.step}")

    def _check_settings(self, former: Mapping[str, object]) -> None:
        for name in sorted({*former, *self.settings}):
            if former.get(name) != self.settings.get(name):
                raise SettingsError(
                    f"{self.folder} holds a run with {name} {former.get(name)}, not {self.settings.get(name)}; "
                    "repeat its settings to go on, or choose another --out."
                )

    def _forget_rows_since(self) -> None:
        """Drops from the curve what came after the checkpoint and will be computed again, or was cut by the kill."""
        log = self.folder / "log.jsonl"
        if self.rank > 0 or not log.exists():
            return
        kept = []
        for line in log.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("step", 0) <= self.step:
                kept.append(line + "\n")
        partial = log.with_suffix(".part")
        partial.write_text("".join(kept))
        partial.replace(log)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def save(self) -> None:
        """Written beside the old checkpoint and put in its place whole, so that a kill costs only the steps since."""
        self._saved = time.monotonic()
        if self.rank > 0:
            return
        own = {"step": self.step, "settings": self.settings, "averages": self._averages}
        partial = self.last.with_suffix(".part")
        with partial.open("wb") as file:
            torch.save({name: part.state_dict() for name, part in self.parts.items()} | own, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.last)

    def save_when_due(self, every: int, seconds: float) -> None:
        """Saves every so many steps, when so many seconds have gone since the last time, and at the end."""
        late = time.monotonic() - self._saved >= seconds
        if late or self.step % every == 0 or self.step == self.steps:
            self.save()

    def advance(self, losses: Mapping[str, float], every: int = 10) -> bool:
        """Counts a step, logs its smoothed losses `every` so many steps; True where it did."""
        self.step += 1
        for name, value in losses.items():
            self._averages[name] = 0.9 * self._averages.get(name, value) + 0.1 * value
        if self.step % every and self.step != self.steps:
            return False
        pace = (self.step - self._first) / (time.monotonic() - self._began)
        row = {"step": self.step, "samples/s": round(pace * self.batch_size, 2)}
        row["minutes left"] = round((self.steps - self.step) / pace / 60, 1)
        self.log(row | {name: round(value, 4) for name, value in self._averages.items()})
        return True

    def log(self, row: Mapping[str, object]) -> None:
        if self.rank == 0:
            print(dict(row), flush=True)
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(dict(row)) + "\n")


def teach(
    run: Run,
    optimizer: torch.optim.Optimizer,
    batches: Iterable,
    losses_of: Callable[..., dict[str, torch.Tensor]],
    held_out: Callable[[], dict[str, float]],
    options: argparse.Namespace,
    *,
    warmup: int,
    clip: float,
    weights: Mapping[str, float] | None = None,
    masters: Masters | None = None,
) -> None:
    """The rest of a run: a step a batch, on the sum of `losses_of(*batch)`, each times its weight, if any; `masters`:
    what `optimizer` steps for a model in a narrower dtype. A group of the optimizer with a "share" learns at that share
    of the rate.

    Every `options.every` steps and at the end the first process logs `held_out()` and a checkpoint is written.
    """
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for batch in batches:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * group.get("share", 1.0) * cosine(run.step, run.steps, warmup)
        losses = losses_of(*batch)
        sum(loss * (weights[name] if weights else 1) for name, loss in losses.items()).backward()
        if masters:
            masters.take_gradients()
        average_gradients(learning)
        nn.utils.clip_grad_norm_(learning, clip)
        optimizer.step()
        optimizer.zero_grad()
        if masters:
            masters.give_back()
        run.advance(dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True)))
        if run.step % options.every == 0 or run.step == run.steps:
            if run.rank == 0:
                run.log({"step": run.step, "held-out": held_out()})
            run.save()
