"""From usable lines to gradients: the order in which they are learned, their sequences, the loss on their answers.

It knows nothing of optimizers, checkpoints or flags.
"""

import inspect
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional

from mllm_demo.errors import DataError
from mllm_demo.models.loading import LoadedModel
from mllm_demo.training.answers import AnswerEncoder, Taught
from mllm_demo.training.userdata import Line, UserData

SHOW_EVERY_S = 2.0  # between two signs of life while lines are checked


class Course:
    """Which line is learned when: a fresh order for each epoch, drawn from the seed, so a position is all there is to
    remember. Holds the numbers of the usable lines as a part of the checkpoint."""

    def __init__(self, seed: int):
        self.seed, self.numbers = seed, []

    def state_dict(self) -> dict:
        return {"numbers": self.numbers}

    def load_state_dict(self, state: dict) -> None:
        self.numbers = state["numbers"]

    def batch(self, step: int, size: int) -> list[int]:
        """Line numbers of batch `step`; a batch may begin in one epoch and end in the next."""
        count = len(self.numbers)
        places = np.arange(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(count) for epoch in set(places // count)
        }
        return [self.numbers[orders[epoch][index]] for epoch, index in zip(*divmod(places, count), strict=True)]


def usable(data: UserData, encoder: AnswerEncoder) -> tuple[list[int], dict[int, str]]:
    """Numbers of the lines that can be learned from, and by number what is wrong with the others."""
    good, problems, shown = [], dict(data.problems), time.monotonic()
    for index, line in enumerate(data.lines, start=1):
        try:
            encoder.encode(line.conversation())
            good.append(line.number)
        except DataError as error:
            problems[line.number] = str(error)
        if time.monotonic() - shown >= SHOW_EVERY_S:
            print(f"checked {index} of {len(data.lines)} lines", flush=True)
            shown = time.monotonic()
    return good, problems


def batches(
    lines: dict[int, Line], course: Course, encoder: AnswerEncoder, size: int, steps: range
) -> Iterator[list[Taught]]:
    """The sequences of each step; the next step's pictures are decoded while the model learns from this one's."""

    def made(step: int) -> list[Taught]:
        rows = []
        for number in course.batch(step, size):
            try:
                rows += encoder.encode(lines[number].conversation())
            except DataError as error:
                raise DataError(f"Line {number} was usable before and is not any more: {error}") from error
        return rows

    with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
        coming = pool.submit(made, steps.start) if steps else None
        for step in steps:
            rows = coming.result()
            coming = pool.submit(made, step + 1) if step + 1 < steps.stop else None
            yield rows


class Learner:
    """Gradients of a batch, one sequence at a time: no padding, no rule about how a family's pictures are stacked."""

    def __init__(self, model: PeftModel, loaded: LoadedModel, balance_weight: float):
        self.model, self.device, self.balance_weight = model, loaded.device, balance_weight
        self.dtype = getattr(torch, loaded.dtype)
        self.narrow = self.dtype in (torch.bfloat16, torch.float16)
        self.scaler = torch.amp.GradScaler(loaded.device.type, enabled=self.dtype == torch.float16)
        # Only answers go through the output head, where the model can be told so.
        self.picks = "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters

    def _loss(self, row: Taught) -> torch.Tensor:
        """Sum of the cross entropies of the answer's tokens."""
        inputs = row.inputs.to(self.device, self.dtype)
        positions, targets = row.positions.to(self.device), row.targets.to(self.device)
        picked = {"logits_to_keep": positions} if self.picks else {}
        prompt = torch.arange(inputs["input_ids"].shape[1], device=self.device)[None] < row.prompt_length
        with (
            self.model.base_model.routing_context(prompt_mask=prompt.long()),
            torch.autocast(self.device.type, self.dtype, enabled=self.narrow),
        ):
            logits = self.model(**inputs, **picked, use_cache=False).logits[0]  # (A, vocabulary) or (T, vocabulary)
        logits = logits if self.picks else logits[positions]
        return functional.cross_entropy(logits.float(), targets, reduction="sum")

    def backward(self, rows: Sequence[Taught]) -> dict[str, float]:
        """Adds the batch's gradients; the means over answer tokens and over sequences."""
        tokens = sum(len(row.targets) for row in rows)
        losses = {"loss": 0.0, "balance": 0.0}
        for row in rows:
            loss = self._loss(row) / tokens
            balance = self.model.base_model.router_aux_loss() / len(rows)
            self.scaler.scale(loss + self.balance_weight * balance).backward()
            losses["loss"] += loss.item()
            losses["balance"] += balance.item()
        return losses
