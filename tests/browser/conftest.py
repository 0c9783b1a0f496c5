"""The page on a free port and Chromium to look at it.

`MLLM_TEST_ENGINE` chooses what answers: "real", the bundled model (default), or "fake", words without a
model. Tests that need a staged state (failing, slow, loading) always use the fake one.
"""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from mllm_demo.settings import Settings
from mllm_demo.ui.page import ASSETS, build_page, launch_kwargs
from tests.browser.fake_engine import FakeEngine, picture_png, sample_trace

# The names under which `install_browser.sh` looks for it.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ENGINE = os.environ.get("MLLM_TEST_ENGINE", "real")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), "chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
ANSWER_MS = 30_000 if ENGINE == "fake" else 240_000
QUESTIONS = ("What is in the picture?", "What colour is the circle?", "How many shapes are there?")


@pytest.fixture(scope="session")
def engine_factory():
    """Makes the engine that answers in this run; ready to be asked."""
    if ENGINE == "fake":
        return FakeEngine
    # Importing torch takes seconds that a run on the fake engine need not spend.
    from mllm_demo.chat.engine import ChatEngine  # noqa: PLC0415

    def make():
        engine = ChatEngine(Settings())
        for _ in engine.load(Settings().choice):
            pass
        return engine

    return make


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """The shipped example cards and trace, or made-up ones as long as none are shipped."""
    if (ASSETS / "examples" / "examples.json").is_file() and (ASSETS / "sample_trace.safetensors").is_file():
        return ASSETS
    folder = tmp_path_factory.mktemp("assets")
    (folder / "examples").mkdir()
    entries = []
    for index, question in enumerate(QUESTIONS):
        (folder / "examples" / f"{index}.png").write_bytes(picture_png())
        entries.append({"image": f"{index}.png", "question": question})
    (folder / "examples" / "examples.json").write_text(json.dumps(entries))
    sample_trace().save(folder / "sample_trace.safetensors")
    return folder


def serve(engine, assets=ASSETS):
    """Starts a page; returns `(url, close)`."""
    settings = Settings()
    page = build_page(engine, settings, assets)
    page.queue(max_size=64)
    options = launch_kwargs(settings) | {"server_port": None, "quiet": True, "prevent_thread_lock": True}
    _, url, _ = page.launch(**options)
    return url, page.close


@pytest.fixture(scope="session")
def url(engine_factory, assets):
    """The page that most tests share."""
    address, close = serve(engine_factory(), assets)
    yield address
    close()


@pytest.fixture
def staged(assets):
    """Serves the page with a fake engine in a state of the test's choice: `staged(state="loading")`."""
    closers = []

    def start(folder: Path | None = None, **options):
        engine = FakeEngine(**options)
        address, close = serve(engine, folder or assets)
        closers.append(close)
        return address, engine

    yield start
    for close in closers:
        close()


@pytest.fixture(scope="session")
def chromium():
    expect.set_options(timeout=ANSWER_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, request, tmp_path, staged):
    """Opens an address in a context of its own; afterwards the console must be clean and nothing foreign fetched.

    It asks for `staged` so that browsers close before the servers that they look at.
    """
    contexts, complaints = [], []

    def open_page(address, *, theme="light", width=1280, height=800):
        context = chromium.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        page = context.new_page()
        page.set_default_timeout(ANSWER_MS)
        page.on(
            "console",
            lambda m: complaints.append(f"{m.type}: {m.text} {m.location}") if m.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
        page.on("request", lambda r: complaints.append(f"fetched {r.url}") if _foreign(r.url) else None)
        contexts.append((context, page))
        page.goto(f"{address}?__theme={theme}")
        page.get_by_role("region", name="Routing").wait_for()
        return page

    yield open_page
    failed = getattr(request.node, "failed", False)
    for number, (context, page) in enumerate(contexts):
        if failed:
            folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
            folder.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=folder / f"{request.node.name}-{number}.png", full_page=True)
        context.close()
    assert complaints == []


def _foreign(address):
    return not address.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))


def pytest_collection_modifyitems(items):
    # Gradio, its client and Playwright leave sockets to the garbage collector.
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for careless in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{careless}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.failed = getattr(item, "failed", False) or report.failed
    return report


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "shapes.png"
    path.write_bytes(picture_png())
    return path


@pytest.fixture
def bomb(tmp_path):
    """A small file that claims to be an enormous picture."""
    path = tmp_path / "bomb.png"
    out = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(out, "PNG")
    path.write_bytes(out.getvalue())
    return path
