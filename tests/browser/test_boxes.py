"""Boxes that an answer names are drawn in the chat, once more after a retry; always on the fake engine."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser import looking
from tests.browser.fake_engine import BOX_ANSWER

pytestmark = pytest.mark.browser
ALT = "Picture with a box from 27 to 71 percent across and from 9 to 49 percent down"
# Its lower edge is inside the conversation, whichever part of that scrolls.
IN_SIGHT = """image => {
  const edge = image.getBoundingClientRect().bottom;
  return edge <= document.getElementById("chat").getBoundingClientRect().bottom;
}"""
LOADED = "image => image.complete && image.naturalWidth > 0"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_an_answer_that_names_a_box_shows_it_in_its_message(visit, staged, picture, theme, width):
    address, engine = staged(pause=0)
    page = visit(address, theme=theme, width=width, height=844)
    looking.attach(page, picture)
    looking.ask(page, "where is the circle?")
    looking.wait_for_answer(page)
    drawn = page.get_by_role("log").get_by_role("img", name=ALT)
    expect(drawn).to_have_count(1)
    looking.until(page, lambda: drawn.evaluate(LOADED))
    expect(looking.answers(page).filter(has_text=BOX_ANSWER)).to_have_count(1)
    looking.until(page, lambda: drawn.evaluate(IN_SIGHT))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder) / f"boxes-{width}-{theme}.png")


def test_a_retry_draws_it_again_and_no_drawing_reaches_the_model(visit, staged, picture):
    address, engine = staged(pause=0)
    page = visit(address)
    looking.attach(page, picture)
    looking.ask(page, "where is the circle?")
    looking.wait_for_answer(page)
    looking.ask(page, "and where is it now?")
    looking.until(page, lambda: len(engine.asked) == 2)
    drawings = page.get_by_role("log").get_by_role("img", name=ALT)
    expect(drawings).to_have_count(2)
    looking.wait_for_answer(page)
    page.get_by_role("button", name="Retry").last.click()
    looking.until(page, lambda: len(engine.asked) == 3)
    expect(drawings).to_have_count(2)
    for asked in engine.asked[1:]:
        assert [message.text for message in asked] == ["where is the circle?", BOX_ANSWER, "and where is it now?"]
        assert [len(message.pictures) for message in asked] == [1, 0, 0]
    looking.wait_for_answer(page)
    page.get_by_role("button", name="Undo").last.click()
    expect(drawings).to_have_count(1)
    expect(page.get_by_placeholder("Ask about a picture")).to_have_value("and where is it now?")
