"""Flags and environment, shared by `app.py` and `mllm_demo.ask`: both end in one `Settings` value.

A flag wins over its variable, a variable over the default of `settings.py`. It knows nothing of models or pages.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from mllm_demo.chat.events import LoadProgress
from mllm_demo.errors import DemoError, SettingsError
from mllm_demo.models.catalog import presets
from mllm_demo.settings import (
    AWAKER_GATES,
    DEVICES,
    EXPERT_QUANTIZATIONS,
    QUANTIZATIONS,
    ModelChoice,
    Sampling,
    Settings,
    split_adapters,
)

EXIT_FAILURE = 2
BAR_WIDTH = 24


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a `SettingsError` instead of printing the usage and leaving."""

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see --help.")


class _Repeated(argparse.Action):
    """Collects a flag that may be given several times; the first one replaces the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        held = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if held is self.default else held), values))


def add_flag(
    parser: argparse.ArgumentParser, environ: Mapping[str, str], name: str, *also: str, **options
) -> None:
    """Adds `--name`, whose default is taken from MLLM_DEMO_NAME or the first of `also` that is set."""
    variables = (f"MLLM_DEMO_{name.replace('-', '_').upper()}", *also)
    value = next((environ[variable] for variable in variables if environ.get(variable)), None)
    if value is not None:
        if options.get("action") == "store_true":
            value = value.lower() in ("1", "true", "yes", "on")
        elif options.get("action") is _Repeated:
            value = split_adapters(value)
        # argparse converts a text default as it would the flag, but does not check it against the choices.
        elif "choices" in options and value not in options["choices"]:
            allowed = ", ".join(options["choices"])
            raise SettingsError(f"{variables[0]} must be one of {allowed}, not {value!r}.")
        options["default"] = value
    options["help"] += f" [{variables[0]}]"
    parser.add_argument(f"--{name}", **options)


def add_model_flags(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """What to load and how to answer: the flags that the page and the shell command share."""
    choice, sampling = ModelChoice(), Sampling()
    names = ", ".join(preset.name for preset in presets())
    add_flag(parser, environ, "model", default=choice.model, help=f"preset ({names}), folder or hub id")
    add_flag(
        parser,
        environ,
        "adapter",
        action=_Repeated,
        default=choice.adapter,
        help="PEFT adapter: folder or hub id; several LoRA adapters (repeat the flag) become one mixture, whose router "
        "(Arrow) needs no training; in the variable they are separated by commas",
    )
    add_flag(
        parser,
        environ,
        "quantization",
        choices=QUANTIZATIONS,
        default=choice.quantization,
        help="how the base model's weights are held",
    )
    add_flag(
        parser,
        environ,
        "expert-quantization",
        choices=EXPERT_QUANTIZATIONS,
        default=choice.expert_quantization,
        help="how a MoE-LoRA adapter's experts are held; auto: nf4 beside an nf4 base, from 1 GB on",
    )
    add_flag(
        parser,
        environ,
        "awaker-gate",
        choices=AWAKER_GATES,
        default=choice.awaker_gate,
        help="of an Awaker model: original chooses anew for the answer, steady keeps the prompt's choice",
    )
    add_flag(parser, environ, "device", choices=DEVICES, default=choice.device, help="where the model runs")
    add_flag(
        parser,
        environ,
        "moe-llava-noise",
        action="store_true",
        default=choice.moe_llava_noise,
        help="draw the second expert with noise where the original model does; the seed repeats it",
    )
    add_flag(
        parser, environ, "cache-dir", type=Path, default=None, help="folder for fetched and quantized weights"
    )
    add_flag(
        parser,
        environ,
        "frames",
        type=int,
        default=Settings().frames,
        help="how many frames of a moving picture the model is shown; each is a picture to it",
    )
    add_flag(
        parser,
        environ,
        "max-new-tokens",
        type=int,
        default=sampling.max_new_tokens,
        help="longest answer, in tokens",
    )
    add_flag(
        parser,
        environ,
        "timeout",
        type=float,
        default=Settings().timeout_s,
        help="seconds that one answer may take",
    )


def _credentials(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("must look like user:password")
    return user, password


def add_server_flags(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """Where the page is served and to whom."""
    defaults = Settings()
    # A Space is reached through its proxy, so it must listen on every interface.
    host = "0.0.0.0" if environ.get("SPACE_ID") else defaults.host
    add_flag(parser, environ, "host", "GRADIO_SERVER_NAME", default=host, help="address to listen on")
    add_flag(
        parser, environ, "port", "PORT", "GRADIO_SERVER_PORT", type=int, default=defaults.port, help="port"
    )
    add_flag(
        parser, environ, "share", action="store_true", default=False, help="also open a public Gradio link"
    )
    add_flag(parser, environ, "auth", type=_credentials, default=None, help="user:password to ask for")
    add_flag(
        parser,
        environ,
        "queue-size",
        type=int,
        default=defaults.queue_size,
        help="people who may wait for an answer",
    )


def settings_from(arguments: argparse.Namespace) -> Settings:
    """`Settings` of parsed flags; raises `SettingsError` naming the value that is out of range."""
    defaults = Settings()
    return Settings(
        choice=ModelChoice(
            arguments.model,
            arguments.adapter,
            arguments.quantization,
            arguments.device,
            moe_llava_noise=arguments.moe_llava_noise,
            expert_quantization=arguments.expert_quantization,
            awaker_gate=arguments.awaker_gate,
        ),
        sampling=Sampling(
            max_new_tokens=arguments.max_new_tokens,
            temperature=getattr(arguments, "temperature", defaults.sampling.temperature),
            seed=getattr(arguments, "seed", defaults.sampling.seed),
        ),
        host=getattr(arguments, "host", defaults.host),
        port=getattr(arguments, "port", defaults.port),
        share=getattr(arguments, "share", defaults.share),
        auth=getattr(arguments, "auth", defaults.auth),
        queue_size=getattr(arguments, "queue_size", defaults.queue_size),
        timeout_s=arguments.timeout,
        frames=arguments.frames,
        cache_dir=arguments.cache_dir.expanduser() if arguments.cache_dir else None,
    )


def server_settings(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of `app.py`."""
    parser = Parser(
        prog="app.py", description="Chat with a vision-language model and watch its experts being chosen."
    )
    add_model_flags(parser, environ)
    add_server_flags(parser, environ)
    return settings_from(parser.parse_args(argv))


class TerminalProgress:
    """Shows loading steps on `stream`: one moving bar on a terminal, a line per tenth in a log file."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._moving = stream.isatty()
        self._last = ""

    def __call__(self, step: LoadProgress) -> None:
        filled = round(step.fraction * BAR_WIDTH)
        bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {step.fraction:4.0%}"
        if self._moving:
            # Erase to the end of the line: notes differ in length.
            self._stream.write(f"\r{bar} {step.note}\x1b[K")
        elif (tenth := f"{step.fraction:.1f}") != self._last:
            self._last = tenth
            self._stream.write(f"{bar} {step.note}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the moving line, so that what follows starts on its own."""
        if self._moving:
            self._stream.write("\n")
            self._stream.flush()


def run(main: Callable[[], None]) -> int:
    """Runs `main`; a `DemoError` becomes one sentence on stderr and the exit status says so."""
    try:
        main()
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return 0
