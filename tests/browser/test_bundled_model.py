"""The bundled model itself behind the page: it answers its examples rightly, and stops when told to."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser import looking
from tests.browser.conftest import ENGINE

pytestmark = [pytest.mark.browser, pytest.mark.skipif(ENGINE != "real", reason="needs the bundled model")]


def test_the_status_line_tells_what_runs_and_how_much_of_it_is_in_4_bit(visit, url):
    status = visit(url).get_by_role("status", name="Model")
    expect(status).to_contain_text("nf4")
    expect(status).to_contain_text("% of the weights in 4 bit")
    expect(status).to_contain_text("CPU")


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("What is this?", "helicopter"),
        ("How many ducks", "5"),
        ("What colour is the circle?", "orange"),
        ("What does it say?", "code"),
        ("Where is the sock relative to the pineapple?", "above"),
        ("Is there a horse?", "Yes"),
    ],
)
def test_it_answers_its_examples(visit, url, example, said):
    page = visit(url)
    page.get_by_role("button", name=re.compile("Select example")).filter(has_text=example).click()
    looking.wait_for_answer(page)
    expect(looking.answers(page).last).to_contain_text(said)


def test_talk_of_something_else_after_a_picture_gets_an_answer_of_its_own(visit, url):
    page = visit(url)
    page.get_by_role("button", name=re.compile("Select example")).filter(has_text="How many ducks").click()
    looking.wait_for_answer(page)
    looking.ask(page, "What is the capital of France?")
    looking.wait_for_answer(page)
    expect(looking.answers(page).last).to_contain_text("Paris")


def test_the_first_words_and_every_example_fit_the_empty_chat(visit, url):
    page = visit(url)
    chat, words = page.locator("#chat").bounding_box(), page.get_by_text("Drop or paste a picture below and ask,")
    last = page.get_by_role("button", name=re.compile("Select example")).last
    expect(last).to_be_visible()
    page.wait_for_timeout(1000)  # the chat scrolls to its end once pictures are there
    assert words.bounding_box()["y"] > chat["y"]
    assert sum(last.bounding_box()[side] for side in ("y", "height")) < chat["y"] + chat["height"]


def test_it_draws_the_place_that_it_names(visit, url):
    page = visit(url)
    page.get_by_role("button", name=re.compile("Select example")).filter(has_text="Where is the bread?").click()
    looking.wait_for_answer(page)
    expect(page.get_by_role("log")).to_contain_text("The bread is at [")
    expect(page.get_by_role("img", name=re.compile("Picture with a box from"))).to_be_visible()


def test_stop_ends_a_long_answer_early(visit, url):
    page = visit(url)
    looking.ask(page, "Write a long story about a ship on the sea.")
    expect(looking.answers(page).last).to_have_text(re.compile(r"\w+ \w+"))
    page.get_by_role("button", name="Stop").click()
    looking.wait_for_answer(page)
    expect(page.get_by_text("You stopped this answer.")).to_be_visible()
