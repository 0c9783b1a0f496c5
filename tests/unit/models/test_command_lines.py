"""Whatever keeps the page or the shell command from starting is one sentence and a non-zero exit, never a traceback."""

import errno
import shutil
import socket
import struct
import sys
import zlib
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

import app
from mllm_demo import ask, cli
from mllm_demo.models import fetching, memory
from mllm_demo.routing.trace import RoutingTrace


class Network:
    """Stands where the hub's client is: nothing is cached, and every download fails."""

    def __init__(self):
        self.failure: Exception = ConnectionError("no network")

    def __call__(self, *args, local_files_only=False, **kwargs):
        raise LocalEntryNotFoundError("not cached") if local_files_only else self.failure


@pytest.fixture(autouse=True)
def network(monkeypatch) -> Network:
    network = Network()
    monkeypatch.setattr(fetching, "snapshot_download", network)
    return network


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch):
    monkeypatch.setattr(app, "build_page", lambda *_: pytest.fail("the program started"))


@pytest.fixture
def port() -> str:
    """A free one: another program may hold the default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def files(tmp_path, checkpoint, lora) -> dict[str, str]:
    """What flags may point to, by the names used below."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("This is not a picture.")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    (tmp_path / "bomb.png").write_bytes(bomb())
    misfit = Path(shutil.copytree(lora, tmp_path / "misfit"))
    tensors = load_file(misfit / "adapter_model.safetensors")
    save_file(
        {name: tensor[..., :3].contiguous() for name, tensor in tensors.items()}, misfit / "adapter_model.safetensors"
    )
    names = ("good.png", "text.png", "empty.png", "cut.png", "bomb.png", "misfit", "nothing")
    return {Path(name).stem: str(tmp_path / name) for name in names} | {
        "model": str(checkpoint),
        "lora": str(lora),
        "here": str(tmp_path),
    }


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it is 60000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def start(monkeypatch, capsys, files):
    """Runs a program as the shell does; returns its exit status, stdout and stderr."""

    def start(main, *flags: str):
        monkeypatch.setattr(sys, "argv", ["program", *(flag.format_map(files) for flag in flags)])
        status = cli.run(main)
        return status, *capsys.readouterr()

    return start


def check_refused(outcome, words: str) -> None:
    status, out, err = outcome
    last = err.strip().splitlines()[-1]
    assert (status, out) == (2, "")
    assert last.startswith("error: ") and last.endswith(".") and words in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quantization", "int4"], "invalid choice: 'int4'"),
        (["--model", "{nothing}"], "does not exist"),
        (["--model", "nonesuch"], "is no preset, no folder and no hub id"),
        (["--model", "owner/name"], "check the network"),
        (["--model", "smolvlm-256m"], "check the network"),
        (["--model", "{good}"], "is a file"),
        (["--model", "{here}"], "holds no config.json"),
        (["--model", "{model}", "--adapter", "{nothing}"], "does not exist"),
        (["--model", "{model}", "--adapter", "nonesuch"], "is no folder and no hub id"),
        (["--model", "{model}", "--adapter", "owner/name"], "check the network"),
        (["--model", "{model}", "--adapter", "{model}"], "not a PEFT adapter"),
        (["--model", "owner/name", "--cache-dir", "{good}"], "choose another --cache-dir"),
        (["--model", "{model}", "--max-new-tokens", "0"], "max new tokens must be 1 to 4096"),
    ],
)
def test_page_and_shell_command_refuse_alike(start, port, flags, words):
    check_refused(start(app.main, *flags, "--port", port), words)
    check_refused(start(ask.main, *flags, "What?"), words)


@pytest.mark.parametrize("flag", ["0", "65536", "many"])
def test_a_port_that_is_none(start, flag):
    check_refused(start(app.main, "--port", flag), "port")


def test_a_port_in_use(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check_refused(start(app.main, "--port", str(taken.getsockname()[1])), "Cannot listen on")


def test_too_little_memory(start, port, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    check_refused(start(app.main, "--model", "{model}", "--device", "cpu", "--port", port), "smaller model")
    check_refused(start(ask.main, "--model", "{model}", "--device", "cpu", "What?"), "smaller model")


def test_a_full_disk_is_not_blamed_on_the_network(start, network, tmp_path):
    network.failure = OSError(errno.ENOSPC, "No space left on device")
    flags = ("--model", "owner/name", "--cache-dir", str(tmp_path / "cache"))
    check_refused(start(ask.main, *flags, "What?"), "disk is full")


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("{nothing}", "cannot be opened"),
        ("{here}", "cannot be opened"),
        ("{text}", "not a picture"),
        ("{empty}", "is empty"),
        ("{cut}", "cut off"),
        ("{bomb}", "60000 x 60000 pixels"),
    ],
)
def test_a_picture_that_is_none(start, picture, words):
    check_refused(start(ask.main, "--model", "{model}", "--image", picture, "What?"), words)


def test_an_adapter_of_another_model(start):
    flags = ("--model", "{model}", "--adapter", "{misfit}", "--device", "cpu")
    check_refused(start(ask.main, *flags, "What?"), "does not fit this base model")


@pytest.mark.parametrize(
    ("trace", "words"),
    [("{nothing}/t.safetensors", "does not exist"), ("{here}", "is a folder"), ("{here}/t", "No router is in this")],
)
def test_a_trace_that_cannot_be_saved_is_refused_before_the_answer(start, trace, words):
    flags = ("--model", "{model}", "--adapter", "{lora}", "--device", "cpu", "--trace", trace)
    check_refused(start(ask.main, *flags, "what"), words)


def test_a_picture_a_question_and_a_trace_from_the_shell(start, files, moe_lora):
    flags = ("--model", "{model}", "--adapter", str(moe_lora), "--device", "cpu", "--max-new-tokens", "2")
    trace = Path(files["here"]) / "t.safetensors"
    status, out, err = start(ask.main, *flags, "--image", "{good}", "--trace", str(trace), "what is this")
    assert status == 0 and out.endswith("\n") and "tokens/s" in err
    assert RoutingTrace.load(trace).provenance["answer"].strip() == out.strip()


def test_help_of_the_shell_command(start):
    with pytest.raises(SystemExit) as left:
        start(ask.main, "--help")
    assert left.value.code == 0
