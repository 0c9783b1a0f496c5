"""Does quantization change the routing? The same prompts unquantized and in 4 bit, router by router.

    python -m mllm_demo.routing.drift
    python -m mllm_demo.routing.drift --model FOLDER --image picture.png --question "What is this?" --json drift.json

The unquantized model answers greedily. The other one is led through the same answer token by token, so that every
position is compared with itself, and routers that choose anew while a model answers do so in both. A command: it wires
loading, prompts and the tap together, and nothing imports it.
"""

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mllm_demo.chat.generation import generation_config
from mllm_demo.chat.images import read_pictures
from mllm_demo.chat.layout import decoded_tokens, image_token_id, prompt_tokens
from mllm_demo.chat.messages import Message, pictures
from mllm_demo.chat.prompt import Prompt, make_prompt
from mllm_demo.chat.provenance import trace_image
from mllm_demo.chat.region import routed_region
from mllm_demo.cli import Parser, TerminalProgress, add_model_flags, run, settings_from
from mllm_demo.errors import SettingsError, TraceError
from mllm_demo.models.loading import LoadedModel, load
from mllm_demo.routing.divergence import Divergence, Summary, by_block, divergence, merged, summary
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import Sampling, Settings

EXAMPLES = Path(__file__).resolve().parents[2] / "assets" / "examples"


def parse(argv: Sequence[str] | None, environ: Mapping[str, str]) -> tuple[Settings, list[Message], Path | None]:
    """Settings, one message per prompt, and where the figures go."""
    parser = Parser(prog="python -m mllm_demo.routing.drift", description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture; one for each --question")
    parser.add_argument("--question", action="append", default=[], help="what to ask (default: the page's examples)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    add_model_flags(parser, environ)
    parser.set_defaults(max_new_tokens=32)
    arguments = parser.parse_args(argv)
    settings = settings_from(arguments)
    if settings.choice.quantization == "none":
        raise SettingsError("--quantization none would be compared with itself; choose nf4, fp4 or int8.")
    if settings.choice.moe_llava_noise:
        raise SettingsError("Experts drawn with noise change by chance; leave the noise out to see what 4 bit changes.")
    if not all(question.strip() for question in arguments.question):
        raise SettingsError("A --question is empty; put it in quotes after the flag.")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.expanduser().parent.is_dir()):
        raise SettingsError(f"--json {arguments.json} must name a file in a folder that exists.")
    asked = list(zip(arguments.image, arguments.question, strict=False))
    if len(arguments.image) not in (0, len(arguments.question)):
        raise SettingsError("Give one --question for each --image, or no --image at all.")
    if not arguments.image:
        asked = [(None, question) for question in arguments.question]
    if not asked:
        examples = json.loads((EXAMPLES / "examples.json").read_text())
        asked = [(EXAMPLES / example["image"], example["question"]) for example in examples]
    limits = settings.picture_limits
    shown = [() if image is None else read_pictures(image.expanduser(), **limits) for image, _ in asked]
    return settings, [Message("user", (*p, q)) for p, (_, q) in zip(shown, asked, strict=True)], arguments.json


class Reading(NamedTuple):
    """What one model did with every prompt. `answers`: ids of the tokens that it read after each; `dtype`: what it
    computes in."""

    traces: list[RoutingTrace]
    answers: list[list[int]]
    dtype: str


def _read(loaded: LoadedModel, prompt: Prompt, answer: list[int] | None) -> tuple[RoutingTrace, list[int]]:
    """The routing of `prompt` and of `answer`, which is drawn greedily where there is none."""
    # An answer holds no picture, so the token that stands for one may not come out.
    image = image_token_id(loaded.processor, loaded.model.config)
    length = prompt.max_new_tokens if answer is None else len(answer)
    # The token drawn last is not read, whether it ends the answer or is one too many.
    config = generation_config(loaded, Sampling(), length + 1, never=() if image is None else (image,))
    led = [*(answer or ()), config.pad_token_id]

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        return [led[len(ids) - len(prompt.ids)]]

    with torch.inference_mode(), RoutingTap(loaded.model) as tap, routed_region(loaded, prompt):
        made = loaded.model.generate(
            **prompt.inputs, generation_config=config, prefix_allowed_tokens_fn=None if answer is None else allowed
        )
    answer = made[0, len(prompt.ids) : -1].tolist()
    before = prompt_tokens(loaded.processor, loaded.model.config, prompt.messages, prompt.ids, prompt.inputs)
    images = [trace_image(picture) for picture in pictures(prompt.messages)]
    return tap.trace((*before, *decoded_tokens(loaded.processor, answer)), images), answer


def read(settings: Settings, quantization: str, messages: list[Message], answers: list[list[int]] | None) -> Reading:
    """Loads the model in `quantization` and lets it answer every prompt, with `answers` where they are given."""
    progress = TerminalProgress(sys.stderr)
    try:
        loaded = load(replace(settings.choice, quantization=quantization), settings.cache_dir, progress)
    finally:
        progress.close()
    if loaded.quantization != quantization:
        raise TraceError(
            f"The weights of {loaded.title} are stored in {loaded.quantization}, so there is nothing to compare them "
            "with; name the checkpoint that they were made from."
        )
    if not RoutingTap(loaded.model).sites:
        raise TraceError(f"No router can be read in {loaded.title}; name a model or an adapter that has experts.")
    found = Reading([], [], loaded.dtype)
    for number, message in enumerate(messages):
        prompt = make_prompt(loaded, (message,), settings.sampling.max_new_tokens)
        trace, answer = _read(loaded, prompt, answers and answers[number])
        found.traces.append(trace)
        found.answers.append(answer)
        print(f"{quantization}: {number + 1} of {len(messages)} prompts", file=sys.stderr, flush=True)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _summaries(rows: Sequence[Divergence]) -> dict[str, Summary]:
    """Every kind of block where there are several, and all together, by the name that a person reads."""
    kinds = by_block(rows)
    named = {f"{kind} routers": found for kind, found in kinds.items()} if len(kinds) > 1 else {}
    return named | {"all routers": summary(rows)}


def table(rows: Sequence[Divergence]) -> str:
    """What a person reads: a line a router, then a line a kind of block, then all of them."""
    lines: list[tuple[str, Divergence | Summary]] = [(row.site.name, row) for row in rows]
    lines += _summaries(rows).items()
    width = max(len(name) for name, _ in lines)
    head = f"{'router':{width}}  first choice changed  set changed  TV mean  TV max"
    return "\n".join([head, *(
        f"{name:{width}}  {row.first_changed:20.1%}  {row.set_changed:11.1%}  {row.variation:7.3f}  {row.largest:6.3f}"
        for name, row in lines
    )])  # fmt: skip


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    settings, messages, out = parse(argv, environ)
    before = read(settings, "none", messages, None)
    after = read(settings, settings.choice.quantization, messages, before.answers)
    rows = merged([divergence(a, b) for a, b in zip(before.traces, after.traces, strict=True)])
    print(f"{before.dtype} against {settings.choice.quantization}, {len(messages)} prompts, {rows[0].tokens} tokens")
    print(table(rows))
    if out:
        report = {
            "unquantized": before.dtype,
            "quantization": settings.choice.quantization,
            "all": summary(rows)._asdict(),
            "blocks": [{"block": kind} | found._asdict() for kind, found in by_block(rows).items()],
            "routers": [row._asdict() | {"site": row.site.name, "layer_idx": row.site.layer_idx} for row in rows],
        }
        out.expanduser().write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
