"""States that must be staged: waiting, stopping, failing, loading, nothing to show; always on the fake engine."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser import looking

pytestmark = pytest.mark.browser


def test_stop_ends_a_running_answer_and_keeps_its_words(visit, staged):
    address, engine = staged(pause=0.2)
    page = visit(address)
    looking.ask(page, "a slow answer please")
    expect(looking.answers(page).last).to_contain_text("There is")
    page.get_by_role("button", name="Stop").click()
    looking.wait_for_answer(page)
    expect(page.get_by_text("You stopped this answer.")).to_be_visible()
    expect(looking.answers(page).last).to_contain_text("There is")
    assert engine.stopped == 1


def test_closing_the_tab_stops_the_answer(visit, staged):
    address, engine = staged(pause=0.05)
    page = visit(address)
    looking.ask(page, "a slow answer please")
    expect(looking.answers(page).last).to_contain_text("There is")
    page.close()
    assert engine.ended.wait(timeout=20)


def test_while_an_answer_streams_the_routing_grows_and_the_selection_stays(visit, staged):
    address, _ = staged(pause=0.2)
    page = visit(address)
    looking.ask(page, "a slow answer please")
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    looking.words(page).first.click()
    before = looking.selection(page).inner_text()
    count = looking.words(page).count()
    expect(looking.words(page).nth(count + 5)).to_be_attached()
    expect(looking.selection(page)).to_have_text(before)
    page.get_by_role("button", name="Stop").click()
    looking.wait_for_answer(page)
    expect(looking.selection(page)).to_have_text(before)


def test_who_waits_sees_the_place_in_the_queue(visit, staged):
    address, _ = staged(pause=0.05)
    first, second = visit(address), visit(address)
    looking.ask(first, "a slow answer please")
    expect(looking.answers(first).last).to_contain_text("There is")
    looking.ask(second, "and mine?")
    expect(second.get_by_text("One person is before you")).to_be_visible()
    first.get_by_role("button", name="Stop").click()
    looking.wait_for_answer(second)


def test_a_failed_answer_says_why_and_can_be_retried(visit, staged):
    address, engine = staged()
    page = visit(address)
    looking.ask(page, "please fail")
    expect(page.get_by_text("The model ran out of memory while answering")).to_be_visible()
    expect(page.get_by_text("please fail")).to_be_visible()
    engine.healed = True
    page.get_by_role("button", name="Retry").click()
    looking.wait_for_answer(page)
    expect(page.get_by_text("Not answered")).to_have_count(0)


def test_an_error_nobody_foresaw_is_put_into_words(visit, staged):
    address, _ = staged()
    page = visit(address)
    looking.ask(page, "please crash")
    expect(page.get_by_text("Something unexpected went wrong")).to_be_visible()


def test_undo_brings_the_question_back_and_edit_asks_again(visit, staged, picture):
    address, engine = staged()
    page = visit(address)
    looking.attach(page, picture)
    looking.ask(page, "first wording")
    looking.wait_for_answer(page)
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("log").get_by_role("textbox").fill("second wording")
    page.get_by_role("log").get_by_role("button", name="Submit").click()
    looking.until(page, lambda: len(engine.asked) == 2)
    looking.wait_for_answer(page)
    assert engine.asked[-1][-1].text == "second wording"
    assert len(engine.asked[-1]) == 1
    assert len(engine.asked[-1][0].pictures) == 1
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_placeholder("Ask about a picture")).to_have_value("second wording")
    expect(page.get_by_role("listitem", name="File thumbnail")).to_have_count(1)
    expect(looking.answers(page)).to_have_count(0)


def test_a_later_question_carries_the_conversation_but_not_what_failed(visit, staged):
    address, engine = staged()
    page = visit(address)
    looking.ask(page, "please fail")
    expect(page.get_by_text("ran out of memory")).to_be_visible()
    looking.ask(page, "and now?")
    looking.wait_for_answer(page)
    looking.ask(page, "and then?")
    expect(looking.answers(page)).to_have_count(3)
    looking.wait_for_answer(page)
    first, answer, second = engine.asked[-1]
    assert (first.text, answer.role, second.text) == ("and now?", "assistant", "and then?")


def test_clear_empties_the_chat_and_shows_the_recorded_example_again(visit, staged):
    address, _ = staged()
    page = visit(address)
    looking.ask_example(page)
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("recorded example")).to_be_visible()
    expect(page.get_by_role("button", name=looking.EXAMPLE)).to_be_visible()


def test_a_question_asked_while_the_model_loads_is_answered_when_it_is_ready(visit, staged):
    address, engine = staged(state="loading")
    page = visit(address)
    expect(page.get_by_role("status", name="Model")).to_contain_text("fetching weights, 42 %")
    looking.ask(page, "early question")
    expect(page.get_by_role("log").get_by_text("The model is still loading: fetching weights, 42 %")).to_be_visible()
    engine.state = "ready"
    looking.wait_for_answer(page)
    expect(page.get_by_role("status", name="Model")).to_contain_text("in 4 bit")


@pytest.mark.parametrize(("state", "said"), [("failed", "could not be fetched"), ("empty", "No model is loaded")])
def test_without_a_model_the_page_says_so_and_offers_one(visit, staged, state, said):
    address, _ = staged(state=state)
    page = visit(address)
    expect(page.get_by_role("status", name="Model")).to_contain_text(said)
    expect(page.get_by_role("button", name="Load this model")).to_be_visible()
    looking.ask(page, "hello?")
    expect(page.get_by_role("log").get_by_text(re.compile(said))).to_be_visible()


def test_who_comes_when_the_model_is_there_finds_its_settings_folded(visit, staged):
    """The program makes the page before it loads the model, and visitors come after both."""
    address, engine = staged(state="empty")
    engine.state = "ready"
    page = visit(address)
    expect(page.get_by_role("status", name="Model")).to_contain_text("in 4 bit")
    expect(page.get_by_role("button", name="Load this model")).to_be_hidden()
    page.get_by_role("button", name=re.compile("^Model")).click()
    expect(page.get_by_role("button", name="Load this model")).to_be_visible()


def test_loading_another_model_shows_progress_and_then_its_name(visit, staged):
    address, _ = staged(pause=0.1)
    page = visit(address)
    page.get_by_role("button", name=re.compile("^Model")).click()
    page.get_by_role("combobox", name="Model").fill("some/folder")
    page.get_by_role("combobox", name="Model").press("Enter")
    page.get_by_role("button", name="Load this model").click()
    expect(page.get_by_role("progressbar", name="Loading the model")).to_be_visible()
    expect(page.get_by_role("status", name="Model")).to_contain_text("some/folder")


def test_a_preset_says_what_is_known_of_it(visit, staged):
    address, _ = staged()
    page = visit(address)
    page.get_by_role("button", name=re.compile("^Model")).click()
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name=re.compile("SmolVLM")).click()
    expect(page.get_by_text("Verified on a tiny model. Licence: Apache-2.0.")).to_be_visible()
    page.get_by_role("combobox", name="Model").fill("some/folder")
    page.get_by_role("combobox", name="Model").press("Enter")
    expect(page.get_by_text("Verified on a tiny model. Licence: Apache-2.0.")).to_be_hidden()


def test_what_a_model_takes_is_a_table_and_what_does_not_fit_a_sentence(visit, staged):
    page = visit(staged()[0], width=390)
    page.get_by_role("button", name=re.compile("^Model")).click()
    seen = page.get_by_role("status", name="Footprint")
    table = page.get_by_role("table", name="Memory by part of the model")
    expect(table.get_by_role("row", name=re.compile("^experts 1.0 B"))).to_be_visible()
    expect(seen).to_contain_text("A graphics card of 8 GB holds it.")
    expect(seen).not_to_contain_text("does not fit")

    page.get_by_role("combobox", name="Model").fill("large/model")
    page.get_by_role("combobox", name="Model").press("Enter")
    expect(seen).to_contain_text("It does not fit here: 2.0 GB is free on the CPU.")
    expect(table.get_by_role("row", name=re.compile("^all 60.0 B"))).to_be_visible()
    assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")

    page.get_by_role("combobox", name="Model").fill("missing/model")
    page.get_by_role("combobox", name="Model").press("Enter")
    expect(page.get_by_text("missing/model is neither a folder nor a known model")).to_be_visible()
    expect(table).to_be_hidden()


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(visit, staged):
    address, _ = staged()
    page = visit(address)
    page.get_by_role("button", name=re.compile("^Model")).click()
    page.get_by_role("combobox", name="Model").fill("missing/model")
    page.get_by_role("combobox", name="Model").press("Enter")
    page.get_by_role("button", name="Load this model").click()
    expect(page.get_by_role("alert")).to_contain_text("missing/model is neither a folder nor a known model")
    expect(page.get_by_role("status", name="Model")).to_contain_text("in 4 bit")


def test_a_model_without_routers_says_why_nothing_is_drawn(visit, staged):
    address, _ = staged()
    page = visit(address)
    looking.ask(page, "a plain answer")
    expect(page.get_by_text("This answer has no routing to show")).to_be_visible()
    expect(page.get_by_role("button", name="Download trace")).to_be_disabled()


def test_a_choice_for_the_whole_conversation_is_never_drawn_as_if_tokens_had_chosen(visit, staged, picture):
    address, _ = staged()
    page = visit(address)
    looking.attach(page, picture)
    looking.ask(page, "sequence routing")
    looking.wait_for_answer(page)
    expect(page.get_by_text("one choice for the whole conversation")).to_be_visible()
    expect(looking.selection(page)).to_have_text(re.compile("^whole conversation · layer"))
    shades = looking.words(page).evaluate_all("nodes => nodes.map(node => node.style.backgroundColor)")
    assert set(shades) == {""}


def test_a_second_choice_for_the_answer_is_shown_beside_the_prompts(visit, staged, picture):
    address, _ = staged()
    page = visit(address)
    looking.attach(page, picture)
    looking.ask(page, "sequence twice")
    looking.wait_for_answer(page)
    expect(page.get_by_text("makes two choices in layer")).to_be_visible()
    expect(page.get_by_text("two choices in each layer: for the prompt and for the answer")).to_be_visible()
    expect(looking.selection(page)).to_have_text(re.compile("^whole answer · layer"))
    answered = looking.selection(page).inner_text()
    looking.the_map(page).press("ArrowLeft")
    expect(looking.selection(page)).to_have_text(re.compile("^whole prompt · layer"))
    assert re.search(r"expert \d", answered)[0] != re.search(r"expert \d", looking.selection(page).inner_text())[0]
    shades = looking.words(page).evaluate_all("nodes => nodes.map(node => node.style.backgroundColor)")
    assert set(shades) == {""}


def test_hostile_words_are_drawn_as_text(visit, staged):
    address, engine = staged()
    page = visit(address)
    looking.ask(page, "<img src=x onerror=alert(1)> <b>bold</b> ![a](http://203.0.113.1/a.png)")
    looking.wait_for_answer(page)
    expect(page.get_by_role("log")).to_contain_text("onerror=alert(1)>")
    assert page.get_by_role("log").locator(".message img, .message b").count() == 0
    assert engine.asked[-1][0].text == "<img src=x onerror=alert(1)> <b>bold</b> ![a](http://203.0.113.1/a.png)"
    expect(looking.words(page).filter(has_text="onerror=alert(1)>")).to_be_visible()
    assert page.get_by_role("region", name="Words view").locator("b").count() == 0


def test_without_shipped_assets_the_page_still_works(visit, staged, tmp_path):
    address, _ = staged(folder=tmp_path)
    page = visit(address)
    expect(page.get_by_text("Ask about a picture, and the expert that every patch")).to_be_visible()
    looking.ask(page, "hello")
    looking.wait_for_answer(page)


def test_the_pace_of_the_last_answer_stays_until_another_model_is_there(visit, staged, monkeypatch):
    for module in ("callbacks", "page"):
        monkeypatch.setattr(f"mllm_demo.ui.{module}.SLOW_TICK_S", 0.5)
    address, engine = staged()
    page = visit(address)
    looking.ask(page, "what is this?")
    looking.wait_for_answer(page)
    told, looked, status = page.get_by_role("status", name="Model"), [], engine.status
    monkeypatch.setattr(engine, "status", lambda: looked.append(1) or status())
    looking.until(page, lambda: len(looked) > 6)  # the page looks for itself again and again
    expect(told).to_contain_text("tokens/s")
    engine.title = "Another"
    expect(told).to_contain_text("Another")
    expect(told).not_to_contain_text("tokens/s")
