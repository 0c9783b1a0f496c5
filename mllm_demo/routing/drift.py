"""Does quantization change the routing? The same prompts in 16 bit and in 4 bit, router by router.

    python -m mllm_demo.routing.drift
    python -m mllm_demo.routing.drift --model FOLDER --image picture.png --question "What is this?" --json drift.json

The 16-bit model answers greedily; then both models read exactly that sequence, prompt and answer, so every position is
compared with itself. A command: it wires loading, prompts and the tap together, and nothing imports it.
"""

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from mllm_demo.chat.images import read_pictures
from mllm_demo.chat.layout import decoded_tokens, image_token_id, prompt_tokens
from mllm_demo.chat.messages import Message, pictures
from mllm_demo.chat.prompt import Prompt, make_prompt
from mllm_demo.chat.provenance import trace_image
from mllm_demo.chat.region import routed_region
from mllm_demo.cli import Parser, TerminalProgress, add_model_flags, run, settings_from
from mllm_demo.errors import SettingsError, TraceError
from mllm_demo.models.loading import LoadedModel, load
from mllm_demo.routing.divergence import Divergence, divergence, merged
from mllm_demo.routing.tap import RoutingTap
from mllm_demo.routing.trace import RoutingTrace
from mllm_demo.settings import Settings

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
    limits = {"max_bytes": settings.max_upload_mb * 10**6, "max_pixels": settings.max_image_megapixels * 10**6}
    limits["max_frames"] = settings.frames
    shown = [() if image is None else read_pictures(image.expanduser(), **limits) for image, _ in asked]
    return settings, [Message("user", (*p, q)) for p, (_, q) in zip(shown, asked, strict=True)], arguments.json


def _read(loaded: LoadedModel, prompt: Prompt, answer: list[int]) -> RoutingTrace:
    """The routing of one forward over prompt and answer."""
    length, inputs = len(prompt.ids), dict(prompt.inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == (1, length):
            # The answer's tokens are text and attended to; other per-token inputs are 0 for text.
            more = {"input_ids": answer, "attention_mask": [1] * len(answer)}.get(name, [0] * len(answer))
            inputs[name] = torch.cat([value, value.new_tensor([more])], dim=1)
    with torch.inference_mode(), RoutingTap(loaded.model) as tap, routed_region(loaded, prompt):
        loaded.model(**inputs, use_cache=False)
        before = prompt_tokens(loaded.processor, loaded.model.config, prompt.messages, prompt.ids, prompt.inputs)
        images = [trace_image(picture) for picture in pictures(prompt.messages)]
        return tap.trace((*before, *decoded_tokens(loaded.processor, answer)), images)


def _answer(loaded: LoadedModel, prompt: Prompt) -> list[int]:
    # An answer holds no picture, so the token that stands for one may not come out.
    image = image_token_id(loaded.processor, loaded.model.config)
    config = GenerationConfig(
        **loaded.model.generation_config.to_diff_dict()
        | {"max_new_tokens": prompt.max_new_tokens, "do_sample": False}
        | ({} if image is None else {"suppress_tokens": [image]})
    )
    with torch.inference_mode(), routed_region(loaded, prompt):
        made = loaded.model.generate(**prompt.inputs, generation_config=config)
    return made[0, len(prompt.ids) :].tolist()


def traces(
    settings: Settings, quantization: str, messages: list[Message], answers: list[list[int]] | None
) -> tuple[list[RoutingTrace], list[list[int]]]:
    """Loads the model in `quantization` and reads every prompt with its answer, which it makes where there is none."""
    progress = TerminalProgress(sys.stderr)
    try:
        loaded = load(replace(settings.choice, quantization=quantization), settings.cache_dir, progress)
    finally:
        progress.close()
    if not RoutingTap(loaded.model).sites:
        raise TraceError(f"No router can be read in {loaded.title}; name a model or an adapter that has experts.")
    found, made = [], []
    for number, message in enumerate(messages):
        prompt = make_prompt(loaded, (message,), settings.sampling.max_new_tokens)
        answer = _answer(loaded, prompt) if answers is None else answers[number]
        found.append(_read(loaded, prompt, answer))
        made.append(answer)
        print(f"{quantization}: {number + 1} of {len(messages)} prompts", file=sys.stderr, flush=True)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found, made


def table(rows: Sequence[Divergence]) -> str:
    """What a person reads: a line a router, then all of them."""
    width = max(len("all routers"), *(len(row.site.name) for row in rows))
    head = f"{'router':{width}}  first choice changed  set changed  TV mean  TV max"
    lines = [
        f"{row.site.name:{width}}  {row.first_changed:20.1%}  {row.set_changed:11.1%}  {row.variation:7.3f}  "
        f"{row.largest:6.3f}"
        for row in rows
    ]
    means = np.mean([row[2:5] for row in rows], axis=0)
    last = (
        f"{'all routers':{width}}  {means[0]:20.1%}  {means[1]:11.1%}  {means[2]:7.3f}  "
        f"{max(row.largest for row in rows):6.3f}"
    )
    return "\n".join([head, *lines, last])


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    settings, messages, out = parse(argv, environ)
    before, answers = traces(settings, "none", messages, None)
    after, _ = traces(settings, settings.choice.quantization, messages, answers)
    rows = merged([divergence(a, b) for a, b in zip(before, after, strict=True)])
    print(f"16 bit against {settings.choice.quantization}, {len(messages)} prompts, {rows[0].tokens} tokens")
    print(table(rows))
    if out:
        named = [row._asdict() | {"site": row.site.name, "layer_idx": row.site.layer_idx} for row in rows]
        report = {"quantization": settings.choice.quantization, "routers": named}
        out.expanduser().write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
