"""One question from the shell: the answer on stdout as it is made, everything else on stderr.

    python -m mllm_demo.ask --image photo.png "What is in the picture?" --trace routing.safetensors

It knows nothing of Gradio; it uses the same engine as the page.
"""

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from mllm_demo.chat.engine import ChatEngine
from mllm_demo.chat.events import Engine, Finished, Queued, TextDelta
from mllm_demo.chat.images import read_pictures
from mllm_demo.chat.messages import Message
from mllm_demo.cli import Parser, TerminalProgress, add_flag, add_model_flags, run, settings_from
from mllm_demo.errors import SettingsError, TraceError
from mllm_demo.settings import Sampling, Settings


def parse(
    argv: Sequence[str] | None, environ: Mapping[str, str]
) -> tuple[Settings, str, list[Path], Path | None]:
    """Settings, question, image files and trace file of the command line; raises `SettingsError`."""
    parser = Parser(
        prog="python -m mllm_demo.ask", description="Ask one question about one or more pictures."
    )
    parser.add_argument("question", help="what to ask")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="picture file, still or moving; may be repeated"
    )
    parser.add_argument(
        "--trace", type=Path, default=None, help="file to save the routing trace to (.safetensors)"
    )
    add_model_flags(parser, environ)
    sampling = Sampling()
    add_flag(parser, environ, "temperature", type=float, default=sampling.temperature, help="0 is greedy")
    add_flag(parser, environ, "seed", type=int, default=sampling.seed, help="seed of a sampled answer")
    arguments = parser.parse_args(argv)
    if not arguments.question.strip():
        raise SettingsError("The question is empty; put it in quotes after the flags.")
    if arguments.trace is not None:
        trace = arguments.trace.expanduser()
        if not trace.parent.is_dir():
            raise SettingsError(f"The folder of --trace {arguments.trace} does not exist; make it first.")
        if trace.is_dir():
            raise SettingsError(f"--trace {arguments.trace} is a folder; add the name of a file in it.")
    return settings_from(arguments), arguments.question, arguments.image, arguments.trace


def answer(engine: Engine, settings: Settings, message: Message) -> Finished:
    """Streams the answer to stdout; raises `GenerationError` as the engine does."""
    shown = ""
    stop = threading.Event()
    try:
        for event in engine.answer((message,), settings.sampling, stop):
            if isinstance(event, Queued):
                print(f"Waiting for {event.ahead} others", file=sys.stderr)
            elif isinstance(event, TextDelta | Finished):
                # A tokenizer may yet change its last, incomplete character; print what is settled.
                if event.text.startswith(shown):
                    print(event.text[len(shown) :], end="", flush=True)
                    shown = event.text
                if isinstance(event, Finished):
                    print()
                    return event
    except KeyboardInterrupt:
        stop.set()
        raise
    raise AssertionError("an engine ends with Finished or raises")


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Parses, loads, answers, saves the trace."""
    settings, question, images, trace_file = parse(argv, environ)
    limits = settings.picture_limits
    pictures = [picture for path in images for picture in read_pictures(path.expanduser(), **limits)]
    engine = ChatEngine(settings)
    progress = TerminalProgress(sys.stderr)
    try:
        for step in engine.load(settings.choice):
            progress(step)
    finally:
        progress.close()
    # Said before the answer, which may take minutes.
    if trace_file is not None and not engine.status().has_routing:
        unread = " and ".join(engine.status().unread_experts)
        why = f"can be read here of {unread}" if unread else "is in this model"
        raise TraceError(f"No router {why}, so there is no trace to save; leave out --trace.")
    finished = answer(engine, settings, Message("user", (*pictures, question)))
    print(f"{finished.new_tokens} tokens, {finished.tokens_per_s:.1f} tokens/s", file=sys.stderr)
    if trace_file is not None:
        if finished.trace is None:
            raise TraceError("The answer was stopped before it had a trace; ask again.")
        print(f"Routing saved to {finished.trace.save(trace_file.expanduser())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main))
