"""Flags and environment → settings → engine → page → launch: the only file that wires the rooms together.

Weights are fetched before the page is served, so that a download that fails ends the program with a sentence;
they are put into memory after it, so that a first visitor meets a page and not a blank tab.
"""

import importlib
import importlib.util
import os
import socket
import sys
import threading

# On ZeroGPU hardware this package must be imported before torch; elsewhere it is not installed.
spaces = importlib.import_module("spaces") if importlib.util.find_spec("spaces") else None

from mllm_demo.chat.engine import ChatEngine
from mllm_demo.chat.events import Engine
from mllm_demo.cli import TerminalProgress, run, server_settings
from mllm_demo.errors import DemoError, SettingsError
from mllm_demo.models.loading import fetch
from mllm_demo.settings import ModelChoice, Settings
from mllm_demo.ui.page import build_page, launch_kwargs


def check_address(host: str, port: int) -> None:
    """Raises `SettingsError` when nothing can listen there, before anything is fetched."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server does: a port that was closed a moment ago is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {host}:{port} ({error.strerror or error}); stop the program that uses it "
            "or choose another with --host and --port."
        ) from error


def fetch_first(settings: Settings) -> None:
    """Brings every file here with a bar on the terminal; raises `LoadError`."""
    progress = TerminalProgress(sys.stderr)
    try:
        fetch(settings.choice, settings.cache_dir, progress)
    finally:
        progress.close()


def load_in_background(engine: Engine, choice: ModelChoice) -> threading.Thread:
    """Loads while the page is served already; the page shows the engine's status, stderr what went wrong."""

    def work() -> None:
        try:
            for _ in engine.load(choice):
                pass
        except DemoError as error:
            print(f"error: {error}", file=sys.stderr)

    thread = threading.Thread(target=work, name="load", daemon=True)
    thread.start()
    return thread


def main() -> None:
    settings = server_settings()
    check_address(settings.host, settings.port)
    fetch_first(settings)
    lent_gpu = spaces is not None and bool(os.environ.get("SPACES_ZERO_GPU"))
    engine = ChatEngine(settings, gpu_wrapper=spaces.GPU if lent_gpu else None)
    page = build_page(engine, settings)
    # Gradio must not hold people back before they reach the engine, whose queue tells them their place.
    page.queue(default_concurrency_limit=settings.queue_size + 2)
    page.launch(**launch_kwargs(settings), prevent_thread_lock=True)
    load_in_background(engine, settings.choice)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(run(main))
