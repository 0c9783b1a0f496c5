"""Trains a MoE-LoRA adapter on a person's own image, question and answer lines, for any base that can be loaded.

    python -m mllm_demo.training.train --data my.jsonl --base smolvlm-256m --out runs/my-adapter

Run again after a kill, it goes on from its last checkpoint and ends at the same weights. The base stays frozen, in 4
bit unless told otherwise. What a line looks like stands in `training.userdata`; it knows nothing of the page.
"""

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from mllm_demo.cli import Parser, TerminalProgress, run
from mllm_demo.errors import GenerationError, OutOfMemoryError, SettingsError
from mllm_demo.models.fetching import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mllm_demo.models.loading import LoadedModel, fetch, load_resolved
from mllm_demo.moe_lora import MoeLoraConfig
from mllm_demo.settings import DEVICES, ModelChoice
from mllm_demo.training.answers import AnswerEncoder, Taught
from mllm_demo.training.lessons import Course, Learner, batches, usable
from mllm_demo.training.runs import Run, cosine
from mllm_demo.training.targets import find_targets
from mllm_demo.training.userdata import UserData, read_lines, report, require_some

CLIP_NORM = 1.0
# Every step is shown where one takes this long, else every so many.
SLOW_STEP_S, SHOW_STEPS = 2.0, 10


def load_base(options: argparse.Namespace) -> LoadedModel:
    """The base alone: a preset that comes with an adapter is loaded without it."""
    choice = ModelChoice(options.base, None, options.quantization, options.device)
    progress = TerminalProgress(sys.stderr)
    try:
        resolved = fetch(choice, options.cache_dir, progress)
        resolved = replace(resolved, adapter_names=(), adapter_folders=(), adapter_revision=None)
        return load_resolved(resolved, progress)
    finally:
        progress.close()


def adapt(loaded: LoadedModel, options: argparse.Namespace) -> PeftModel:
    """`loaded` with a fresh float32 MoE-LoRA adapter, the only part that learns, in training mode."""
    experts, plain = find_targets(loaded.model, options.target_modules, options.plain_target_modules, loaded.title)
    try:
        config = MoeLoraConfig(
            r=options.r,
            lora_alpha=options.lora_alpha if options.lora_alpha is not None else 2 * options.r,
            lora_dropout=options.lora_dropout,
            num_experts=options.num_experts,
            num_experts_per_tok=options.num_experts_per_tok,
            use_shared_expert=options.shared_expert,
            router_scope=options.router_scope,
            granularity=options.granularity,
            router_noise_std=options.router_noise,
            router_aux_loss_coef=options.balance,
            target_modules=experts,
            plain_target_modules=plain,
            task_type="CAUSAL_LM",
        )
    except ValueError as error:
        raise SettingsError(f"The adapter cannot be made: {error}") from error
    torch.manual_seed(options.seed)
    model = get_peft_model(loaded.model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # a frozen base keeps its statistics
    return model


def encoder_for(loaded: LoadedModel, options: argparse.Namespace) -> AnswerEncoder:
    eos = loaded.model.generation_config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), loaded.processor.tokenizer.eos_token_id} - {None}
    return AnswerEncoder(
        loaded.processor, sorted(ends), loaded.context_length, together=options.granularity == "token"
    )


def train(
    options: argparse.Namespace, state: Run, course: Course, optimizer: torch.optim.Optimizer, learner: Learner,
    rows_of_steps: Iterator[list[Taught]], stopped: threading.Event,
) -> bool:  # fmt: skip
    """Runs to the last step; False when `stopped` was set before it, which is saved too."""
    parameters = optimizer.param_groups[0]["params"]
    for rows in rows_of_steps:
        began = time.monotonic()
        # What the routers' noise and the dropout draw depends on the step alone, so nothing of it needs saving.
        torch.manual_seed((options.seed << 32) + state.step)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * cosine(state.step, state.steps, options.warmup)
        losses = learner.backward(rows)
        if not math.isfinite(losses["loss"]):
            numbers = ", ".join(map(str, course.batch(state.step, options.batch_size)))
            raise GenerationError(
                f"The loss is no number at step {state.step + 1} (lines {numbers}); lower --lr in another --out, or "
                "look at those lines."
            )
        learner.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        learner.scaler.step(optimizer)
        learner.scaler.update()
        optimizer.zero_grad()
        state.advance(losses, every=SHOW_STEPS if time.monotonic() - began < SLOW_STEP_S else 1)
        if stopped.is_set() and state.step < state.steps:
            state.save()
            return False
        state.save_when_due(options.save_every, 60 * options.save_minutes)
    return True


@contextmanager
def stop_switch() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, so that the step in work is finished and saved; a second one ends at once."""
    stopped = threading.Event()
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        stopped.set()
        signal.signal(number, former[number])

    for number in former:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def export(model: PeftModel, folder: Path, base: str) -> None:
    """Puts the adapter into `folder` as PEFT saves it, each file whole."""
    partial = folder / "adapter.part"
    shutil.rmtree(partial, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = base
    # Embeddings are frozen, and PEFT would ask the hub whether they grew.
    model.save_pretrained(partial, save_embedding_layers=False)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)


def settings_of(options: argparse.Namespace, data: UserData, loaded: LoadedModel) -> dict[str, object]:
    """What a run that goes on must have in common with its beginning."""
    free = {"out", "data", "device", "threads", "save_every", "save_minutes", "cache_dir", "gradient_checkpointing"}
    named = {f"--{name.replace('_', '-')}": value for name, value in vars(options).items() if name not in free}
    return {**named, "--data": f"of content {data.digest}", "--base": f"{options.base} ({loaded.base_revision})"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m mllm_demo.training.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON lines with image, question and answer, or turns")
    add("--base", required=True, help="preset, folder or hub id of the model to adapt")
    add("--out", type=Path, default=Path("runs/my-adapter"), help="folder of the run and of the adapter it ends in")
    add("--epochs", type=float, default=3.0, help="how often every line is learned")
    add("--steps", type=int, help="how many batches instead of --epochs")
    add("--batch-size", type=int, default=8, help="lines a step")
    add("--lr", type=float, default=2e-4, help="highest learning rate")
    add("--warmup", type=int, default=20, help="steps until it is reached")
    add("--r", type=int, default=8, help="rank of each expert")
    add("--lora-alpha", type=float, help="scale of the experts; twice --r when not given")
    add("--lora-dropout", type=float, default=0.0, help="dropout on the experts' input")
    add("--num-experts", type=int, default=4, help="experts that are chosen from")
    add("--num-experts-per-tok", type=int, default=1, help="how many of them serve a token")
    add("--shared-expert", action=argparse.BooleanOptionalAction, default=True, help="one more that serves every token")
    add("--router-scope", choices=("module", "block", "layer", "model"), default="block", help="what shares a router")
    add("--granularity", choices=("token", "sequence"), default="token", help="what makes a choice")
    add("--router-noise", type=float, default=0.1, help="standard deviation of the noise on the routers' logits")
    add("--balance", type=float, default=0.02, help="weight of the loss that keeps experts equally busy")
    add("--target-modules", nargs="+", metavar="NAME", help="linear layers of the decoder that get experts")
    add("--plain-target-modules", nargs="+", metavar="NAME", help="linear layers that get one ordinary LoRA")
    add("--quantization", choices=("nf4", "none"), default="nf4", help="how the base's weights are held")
    add("--device", choices=DEVICES, default="auto", help="where it is trained")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    add("--seed", type=int, default=0, help="draws the adapter's first weights and the order of the lines")
    add("--threads", type=int, help="CPU threads; all of them when not given")
    add("--save-every", type=int, default=100, metavar="STEPS", help="steps between two checkpoints")
    add("--save-minutes", type=float, default=10.0, help="minutes after which one is due anyway")
    add("--cache-dir", type=Path, help="folder for fetched and quantized weights")
    options = parser.parse_args(argv)
    for name in ("epochs", "steps", "batch_size", "lr", "warmup", "threads", "save_every", "save_minutes"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise SettingsError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
    if not 0 <= options.seed < 2**31:
        raise SettingsError(f"--seed must be 0 to {2**31 - 1}, not {options.seed}.")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    data = read_lines(options.data)
    total = len(data.lines) + len(data.problems)
    require_some(data.lines, data.problems, options.data)
    loaded = load_base(options)
    encoder, model = encoder_for(loaded, options), adapt(loaded, options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.lr, weight_decay=0.0)
    learner, course = Learner(model, loaded, options.balance), Course(options.seed)
    parts = {"adapter": nn.ParameterList(parameters), "optimizer": optimizer}
    parts |= {"scaler": learner.scaler, "course": course}
    state = Run(options.out, parts, 0, options.batch_size, settings=settings_of(options, data, loaded))
    if not state.resumed:
        course.numbers, problems = usable(data, encoder)
        for sentence in report(problems, total):
            state.say(sentence)
        require_some(course.numbers, problems, options.data)
    state.steps = options.steps or math.ceil(options.epochs * len(course.numbers) / options.batch_size)
    trained = sum(parameter.numel() for parameter in parameters)
    state.say(
        f"{len(course.numbers)} of {total} lines, {state.steps} steps of {options.batch_size}; {trained:,} parameters "
        f"learn on {loaded.device}, the base is {loaded.quantization}, computing in {loaded.dtype}"
    )
    if not state.resumed:
        state.save()
    lines = {line.number: line for line in data.lines}
    rows = batches(lines, course, encoder, options.batch_size, range(state.step, state.steps))
    try:
        with stop_switch() as stopped:
            finished = train(options, state, course, optimizer, learner, rows, stopped)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "The device's memory ran out; add --gradient-checkpointing, use smaller pictures or a smaller base."
        ) from error
    if not finished:
        state.say(f"saved at step {state.step}; the same command goes on from there")
        raise KeyboardInterrupt
    export(model, options.out, options.base)
    command = ["python", "app.py", "--model", options.base, "--adapter", str(options.out)]
    command += ["--quantization", options.quantization] if options.quantization != "nf4" else []
    state.say(f"The adapter is in {options.out}; talk to it with\n\n    {shlex.join(command)}\n")


if __name__ == "__main__":
    sys.exit(run(main))
