"""Flags and environment become settings; whatever goes wrong is one sentence and a non-zero exit."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import app
from mllm_demo import ask, cli
from mllm_demo.chat.events import Finished, LoadProgress, Queued, TextDelta
from mllm_demo.chat.messages import Message
from mllm_demo.errors import DownloadError, SettingsError
from mllm_demo.settings import ModelChoice, Sampling, Settings, split_adapters

ROOT = Path(__file__).resolve().parents[2]


def test_no_flags_are_the_defaults():
    assert cli.server_settings([], {}) == Settings()


@pytest.mark.parametrize(
    ("flags", "environ", "adapters"),
    [
        ("", {}, ()),
        ("--adapter a", {}, ("a",)),
        ("--adapter a --adapter b/c", {}, ("a", "b/c")),
        ("", {"MLLM_DEMO_ADAPTER": "a, b/c"}, ("a", "b/c")),
        ("", {"MLLM_DEMO_ADAPTER": "a"}, ("a",)),
        ("--adapter d", {"MLLM_DEMO_ADAPTER": "a,b"}, ("d",)),
    ],
)
def test_several_adapters_come_by_repeating_the_flag_or_by_commas(flags, environ, adapters):
    """The page, the shell command and the variable name the same mixture; a flag wins over the variable."""
    choice = cli.server_settings(flags.split(), environ).choice
    assert choice.adapters == adapters
    assert ask.parse(["Hi?", *flags.split()], environ)[0].choice == choice
    assert split_adapters(choice.adapter_text or "") == adapters


def test_an_adapter_without_a_name_is_refused():
    with pytest.raises(SettingsError, match="adapter must be a folder or a hub id"):
        cli.server_settings(["--adapter", "a", "--adapter", " "], {})


def test_every_flag_arrives():
    flags = (
        "--model owner/name --adapter a --quantization fp4 --device cpu --host 0.0.0.0 --port 8000 --share "
        "--auth me:a:secret --max-new-tokens 7 --queue-size 3 --timeout 9.5 --cache-dir /tmp/weights "
        "--expert-quantization none --awaker-gate steady --frames 6"
    )
    assert cli.server_settings(flags.split(), {}) == Settings(
        choice=ModelChoice("owner/name", "a", "fp4", "cpu", expert_quantization="none", awaker_gate="steady"),
        sampling=Sampling(max_new_tokens=7),
        host="0.0.0.0",
        port=8000,
        share=True,
        auth=("me", "a:secret"),
        queue_size=3,
        timeout_s=9.5,
        frames=6,
        cache_dir=Path("/tmp/weights"),
    )


def test_every_flag_has_a_variable_and_the_flag_wins():
    environ = {
        "MLLM_DEMO_MODEL": "m",
        "MLLM_DEMO_ADAPTER": "a",
        "MLLM_DEMO_QUANTIZATION": "int8",
        "MLLM_DEMO_DEVICE": "cuda",
        "MLLM_DEMO_EXPERT_QUANTIZATION": "nf4",
        "MLLM_DEMO_AWAKER_GATE": "steady",
        "MLLM_DEMO_HOST": "::1",
        "MLLM_DEMO_PORT": "8001",
        "MLLM_DEMO_SHARE": "true",
        "MLLM_DEMO_AUTH": "u:p",
        "MLLM_DEMO_MAX_NEW_TOKENS": "5",
        "MLLM_DEMO_QUEUE_SIZE": "2",
        "MLLM_DEMO_TIMEOUT": "1.5",
        "MLLM_DEMO_CACHE_DIR": "/tmp/c",
        "MLLM_DEMO_FRAMES": "8",
    }
    expected = Settings(
        choice=ModelChoice("m", "a", "int8", "cuda", expert_quantization="nf4", awaker_gate="steady"),
        sampling=Sampling(max_new_tokens=5),
        host="::1",
        port=8001,
        share=True,
        auth=("u", "p"),
        queue_size=2,
        timeout_s=1.5,
        frames=8,
        cache_dir=Path("/tmp/c"),
    )
    assert cli.server_settings([], environ) == expected
    assert cli.server_settings(["--port", "9000"], environ).port == 9000


@pytest.mark.parametrize(
    ("environ", "host", "port"),
    [
        ({"PORT": "8080"}, "127.0.0.1", 8080),
        ({"GRADIO_SERVER_PORT": "8081", "GRADIO_SERVER_NAME": "0.0.0.0"}, "0.0.0.0", 8081),
        ({"MLLM_DEMO_PORT": "1", "PORT": "2", "GRADIO_SERVER_PORT": "3"}, "127.0.0.1", 1),
        ({"SPACE_ID": "me/demo"}, "0.0.0.0", 7860),
        ({"MLLM_DEMO_PORT": ""}, "127.0.0.1", 7860),
    ],
)
def test_hosts_tell_where_to_listen_by_their_own_variables(environ, host, port):
    settings = cli.server_settings([], environ)
    assert (settings.host, settings.port) == (host, port)


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        (["--modle", "x"], {}, "Unrecognized arguments: --modle"),
        (["--port", "many"], {}, "invalid int value: 'many'"),
        (["--port", "0"], {}, "port must be 1 to 65535"),
        (["--frames", "0"], {}, "frames of a moving picture must be 1 to 32"),
        (["--quantization", "int4"], {}, "invalid choice: 'int4'"),
        (["--device"], {}, "expected one argument"),
        (["--auth", "nocolon"], {}, "must look like user:password"),
        (["--max-new-tokens", "-1"], {}, "max new tokens must be 1 to 4096"),
        (["--mod", "x"], {}, "Unrecognized arguments: --mod"),
        ([], {"MLLM_DEMO_QUANTIZATION": "int4"}, "MLLM_DEMO_QUANTIZATION must be one of nf4, fp4, int8, none"),
        ([], {"MLLM_DEMO_PORT": "many"}, "invalid int value: 'many'"),
    ],
)
def test_a_wrong_flag_or_variable_is_one_sentence(flags, environ, words):
    with pytest.raises(SettingsError) as refused:
        cli.server_settings(flags, environ)
    sentence = str(refused.value)
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence


def test_help_names_every_flag_with_its_variable_and_default(capsys):
    with pytest.raises(SystemExit) as left:
        cli.server_settings(["--help"], {})
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("model", "adapter", "quantization", "device", "host", "port", "share", "auth", "max-new-tokens"):
        assert f"--{flag}" in text and f"[MLLM_DEMO_{flag.replace('-', '_').upper()}]" in text
    assert "(default: 7860)" in text and "qwen2-vl-7b" in text


def test_an_error_is_a_sentence_on_stderr_and_a_non_zero_exit(capsys):
    def main():
        raise DownloadError("The hub is away; try later.")

    assert cli.run(main) == 2
    assert capsys.readouterr() == ("", "error: The hub is away; try later.\n")


def test_success_and_interruption_have_their_own_exits(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert cli.run(lambda: None) == 0
    assert cli.run(interrupt) == 130


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_moving_line_on_a_terminal():
    terminal = Terminal()
    progress = cli.TerminalProgress(terminal)
    progress(LoadProgress(0.0, "start"))
    progress(LoadProgress(0.5, "half"))
    progress.close()
    assert terminal.getvalue().count("\r") == 2
    assert "[############............]  50% half" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_progress_in_a_log_is_a_line_per_tenth():
    log = io.StringIO()
    progress = cli.TerminalProgress(log)
    for percent in range(101):
        progress(LoadProgress(percent / 100, "loading"))
    progress.close()
    assert "\r" not in log.getvalue()
    assert len(log.getvalue().splitlines()) == 11


# The page's start


def test_a_port_in_use_is_one_sentence_before_anything_is_fetched():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"Cannot listen on 127\.0\.0\.1:{port} .*--port"):
            app.check_address("127.0.0.1", port)
    app.check_address("127.0.0.1", port)


def test_an_address_that_is_not_this_machines_is_one_sentence():
    with pytest.raises(SettingsError, match="Cannot listen on no.such.host.invalid"):
        app.check_address("no.such.host.invalid", 7860)


def test_a_load_that_fails_behind_the_page_is_said_on_stderr_too(capsys):
    class Broken:
        def load(self, choice):
            yield LoadProgress(0.1, "starting")
            raise DownloadError("The hub is away; try later.")

    app.load_in_background(Broken(), ModelChoice()).join(5)
    assert capsys.readouterr().err == "error: The hub is away; try later.\n"


def start(*command: str) -> subprocess.CompletedProcess:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("app.py", "--model", "./no/such/folder", "--port", "7999"), "does not exist"),
        (("-m", "mllm_demo.ask", "--image", "no-such.png", "What?"), "no-such.png"),
    ],
)
def test_a_program_that_cannot_start_leaves_with_a_sentence_and_no_traceback(command, words):
    done = start(*command)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert "Traceback" not in done.stderr


# One question from the shell


class FakeEngine:
    def __init__(self, *events):
        self.events = events

    def answer(self, messages, sampling, stop=None):
        yield from self.events


def finished(text: str) -> Finished:
    return Finished(text, None, "end", new_tokens=2, prefill_s=0.1, decode_s=0.1)


def test_an_answer_is_printed_as_it_grows(capsys):
    engine = FakeEngine(Queued(1), TextDelta("A", 1), TextDelta("A cat", 2), finished("A cat."))
    assert ask.answer(engine, Settings(), Message("user", ("What?",))).text == "A cat."
    printed = capsys.readouterr()
    assert printed.out == "A cat.\n"
    assert "Waiting" in printed.err


def test_ask_takes_a_question_pictures_and_sampling():
    flags = ["--image", "a.png", "--image", "b.png", "--temperature", "0.5", "--seed", "3", "--device", "cpu", "What?"]
    settings, question, images, trace = ask.parse(flags, {})
    assert (question, images, trace) == ("What?", [Path("a.png"), Path("b.png")], None)
    assert settings.sampling == Sampling(temperature=0.5, seed=3)
    assert settings.choice.device == "cpu"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "required: question"),
        (["  "], "question is empty"),
        (["What?", "--trace", "/no/such/folder/t.safetensors"], "does not exist"),
        (["What?", "--temperature", "3"], "temperature must be"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_sentence(flags, words):
    with pytest.raises(SettingsError, match=words):
        ask.parse(flags, {})
