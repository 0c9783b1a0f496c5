"""What watching costs: greedy `generate` on a routed model, without a tap, with one, and with traces on the way.

    python -m benchmarks.tap_overhead --layers 4 --repeats 3

The chat makes a trace every few hundred milliseconds, for at most a share of the time; the worst case makes one
after every token. The tokens of all cases are checked to be the same. It knows nothing of pictures or pages.
"""

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.moe_lora_overhead import moe_lora
from benchmarks.timing import Options, measure, now, options, random_llama, random_prompt, setup, table
from mllm_demo.chat.generation import TRACE_EVERY_S, TRACE_TIME_SHARE
from mllm_demo.cli import run
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import Token


class _Tracing(StoppingCriteria):
    """Makes a trace when `due`; never stops."""

    def __init__(self, tap: RoutingTap, due: Callable[[float, float], bool]) -> None:
        self.made = 0
        self._tap = tap
        self._due = due
        self._ended = time.perf_counter()
        self._cost = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: object, **kwargs: object) -> torch.BoolTensor:
        started = time.perf_counter()
        if self._due(started - self._ended, self._cost):
            self._tap.trace(tokens(input_ids[0, : self._tap.positions].tolist()))
            self._ended = time.perf_counter()
            self._cost = self._ended - started
            self.made += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def tokens(ids: Sequence[int]) -> tuple[Token, ...]:
    """A description for each position, as the chat would give; here without text."""
    return tuple(Token(number, "", "text", "user", "prefill") for number in ids)


def as_in_the_chat(waited: float, cost: float) -> bool:
    return waited > max(TRACE_EVERY_S, cost / TRACE_TIME_SHARE)


def after_every_token(waited: float, cost: float) -> bool:
    return True


class Watching:
    """One case: `generate` with a tap (unless `tapped` is False) and traces when `due`."""

    def __init__(
        self,
        model: nn.Module,
        prompt: torch.Tensor,
        chosen: Options,
        *,
        tapped: bool = True,
        due: Callable[[float, float], bool] | None = None,
    ) -> None:
        self.ids: list[int] = []
        self.traces = 0
        self._model, self._prompt, self._device = model, prompt, chosen.device
        self._tapped, self._due = tapped, due
        self._config = GenerationConfig(
            max_new_tokens=chosen.new_tokens, do_sample=False, use_cache=True, pad_token_id=0
        )

    def __call__(self) -> tuple[float]:
        started = now(self._device)
        if not self._tapped:
            self._generate([])
        else:
            with RoutingTap(self._model) as tap:
                tracing = [_Tracing(tap, self._due)] if self._due else []
                self._generate(tracing)
                tap.trace(tokens(self.ids[: tap.positions]))
                self.traces = 1 + sum(each.made for each in tracing)
        return (now(self._device) - started,)

    def _generate(self, criteria: list[StoppingCriteria]) -> None:
        mask = torch.ones_like(self._prompt)
        self.ids = self._model.generate(
            input_ids=self._prompt,
            attention_mask=mask,
            generation_config=self._config,
            stopping_criteria=StoppingCriteriaList(criteria),
        )[0].tolist()


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options("tap_overhead", "What recording the routing costs while a model answers.", argv)
    model, prompt = moe_lora(random_llama(chosen), "block"), random_prompt(chosen)
    cases = {
        "no tap": Watching(model, prompt, chosen, tapped=False),
        "tap, a trace at the end": Watching(model, prompt, chosen),
        "tap, traces as in the chat": Watching(model, prompt, chosen, due=as_in_the_chat),
        "tap, a trace after every token": Watching(model, prompt, chosen, due=after_every_token),
    }
    seconds = measure(cases, chosen.repeats)
    if len({tuple(case.ids) for case in cases.values()}) != 1:
        raise AssertionError("the tap changed the tokens")
    routers = len(RoutingTap(model).sites)
    what = (
        f"generate (prefill and all new tokens) of a float32 model with MoE-LoRA and its {routers} routers, "
        "with and without recording; the same tokens came out of every case."
    )
    print(setup(chosen, what))
    made = {"traces": [str(case.traces) for case in cases.values()]}
    print(table(seconds, {"generate": 1}, made))


if __name__ == "__main__":
    sys.exit(run(main))
