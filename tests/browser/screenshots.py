"""Takes the README's screenshots of the page after a real question to the bundled model.

    python -m tests.browser.screenshots

Writes `assets/screenshots/{answer,dark,narrow,overview}.png`.
"""

from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from mllm_demo.chat.engine import ChatEngine
from mllm_demo.settings import Settings
from tests.browser import looking
from tests.browser.conftest import CHROMIUM, FLAGS, serve

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "screenshots"
SHOTS = (
    ("answer", "light", 1280, 1000),
    ("dark", "dark", 1280, 1000),
    ("narrow", "light", 390, 844),
)


def main() -> None:
    engine = ChatEngine(Settings())
    for _ in engine.load(Settings().choice):
        pass
    url, close = serve(engine)
    FOLDER.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=60_000)  # a first answer waits for kernels, too
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, theme, width, height in SHOTS:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(240_000)
            page.goto(f"{url}?__theme={theme}")
            page.get_by_role("region", name="Routing").wait_for()
            looking.ask_example(page)
            page.wait_for_timeout(1500)  # the last picture of a tab's transition
            page.screenshot(path=FOLDER / f"{name}.png", full_page=name != "dark")
            if name == "answer":
                page.get_by_role("tab", name="Overview").click()
                page.wait_for_timeout(2500)  # plotly draws
                page.screenshot(path=FOLDER / "overview.png")
            page.close()
        browser.close()
    close()


if __name__ == "__main__":
    main()
