"""The page as a person meets it, on whichever engine this run has: asking, looking around, sharing nothing."""

import re

import pytest
from playwright.sync_api import expect

from mllm_demo.routing.trace import RoutingTrace
from tests.browser import looking

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def asked(chromium, url):
    """A page on which one example was answered; tests of looking around share it."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(240_000)
    page.goto(f"{url}?__theme=light")
    looking.ask_example(page)
    yield page
    context.close()


def test_a_first_visitor_sees_the_recorded_example_before_asking(visit, url):
    page = visit(url)
    expect(page.get_by_text("recorded example")).to_be_visible()
    expect(looking.selection(page)).to_have_text(
        re.compile(r"^token \d+ .* · layer \d+ · .*expert \d+ \(weight \d\.\d\d\)")
    )
    expect(looking.words(page).first).to_be_visible()


def test_clicking_an_example_streams_an_answer_and_draws_its_routing(visit, url):
    page = visit(url)
    looking.ask_example(page)
    expect(looking.answers(page).last).to_have_text(re.compile(r"\w"))
    expect(page.get_by_role("status", name="Model")).to_contain_text("tokens/s")
    expect(looking.patch(page, 1, 1)).to_be_visible()


def test_a_clicked_patch_is_selected_in_every_view(asked):
    looking.patch(asked, 2, 3).click()
    expect(looking.selection(asked)).to_contain_text("patch")
    expect(looking.patch(asked, 2, 3)).to_have_attribute("aria-pressed", "true")
    expect(looking.pressed(asked, "Image view")).to_have_count(1)
    expect(looking.pressed(asked, "Words view")).to_have_accessible_name(re.compile("^image 1"))
    expect(
        asked.get_by_role("region", name="Selected token").get_by_role("img", name="the selected patch")
    ).to_be_visible()


def test_a_clicked_word_is_selected_in_every_view(asked):
    word = looking.words(asked).last
    name = word.get_attribute("aria-label")
    word.click()
    expect(looking.selection(asked)).to_have_text(re.compile("^" + re.escape(name)))
    expect(looking.pressed(asked, "Words view")).to_have_accessible_name(name)
    expect(looking.pressed(asked, "Image view")).to_have_count(0)


def test_a_clicked_cell_sets_token_and_layer(asked):
    canvas = looking.the_map(asked)
    box = canvas.bounding_box()
    canvas.click(position={"x": 3, "y": box["height"] - 4})
    last = asked.get_by_role("slider", name="Layer").get_attribute("max")
    expect(looking.selection(asked)).to_have_text(re.compile("^token 0 "))
    expect(asked.get_by_role("slider", name="Layer")).to_have_value(last)


def test_the_layer_slider_changes_the_layer_and_keeps_the_token(asked):
    looking.patch(asked, 1, 1).click()
    before = looking.selection(asked).inner_text().split(" · ")[0]
    slider = asked.get_by_role("slider", name="Layer")
    slider.fill("0")
    expect(looking.selection(asked)).to_have_text(re.compile(f"^{re.escape(before)} · layer 0 · "))
    slider.press("ArrowRight")
    expect(looking.selection(asked)).to_have_text(re.compile(f"^{re.escape(before)} · layer 1 · "))


def test_the_router_choice_changes_what_is_drawn(asked):
    routers = asked.get_by_role("radiogroup", name="Router").get_by_role("radio")
    for number in range(routers.count()):
        label = routers.nth(number).get_attribute("value")
        routers.nth(number).check()
        expect(looking.selection(asked)).to_contain_text(f" · {label} · ")


def test_entropy_is_a_switch_with_its_own_legend(asked):
    colour = asked.get_by_role("radiogroup", name="Colour")
    colour.get_by_role("radio", name="entropy").check()
    expect(asked.get_by_text("undecided")).to_be_visible()
    expect(asked.get_by_role("list", name="Colours of the experts")).to_be_hidden()
    colour.get_by_role("radio", name="expert").check()
    expect(asked.get_by_role("list", name="Colours of the experts")).to_be_visible()


def test_arrow_keys_move_through_patches_words_and_cells(asked):
    looking.patch(asked, 1, 1).click()
    asked.keyboard.press("ArrowRight")
    asked.keyboard.press("ArrowDown")
    expect(looking.patch(asked, 2, 2)).to_be_focused()
    expect(looking.patch(asked, 2, 2)).to_have_attribute("aria-pressed", "true")

    first = looking.words(asked).first
    first.click()
    first.focus()
    asked.keyboard.press("End")
    expect(looking.words(asked).last).to_be_focused()
    expect(looking.words(asked).last).to_have_attribute("aria-pressed", "true")

    looking.the_map(asked).focus()
    asked.keyboard.press("Home")
    expect(looking.selection(asked)).to_have_text(re.compile("^token 0 "))
    asked.keyboard.press("ArrowRight")
    expect(looking.selection(asked)).to_have_text(re.compile("^token 1 "))


def test_the_views_are_one_tab_stop_each(asked):
    for region in ("Image view", "Words view"):
        group = asked.get_by_role("region", name=region).get_by_role("group").last
        assert group.locator("button[tabindex='0']").count() == 1


def test_the_probabilities_of_the_selected_token_sum_to_one(asked):
    looking.patch(asked, 1, 1).click()
    rows = asked.get_by_role("region", name="Selected token").get_by_role("listitem").all_inner_texts()
    shown = [float(re.search(r"\d\.\d\d", row).group()) for row in rows]
    assert sum(shown) == pytest.approx(1, abs=0.02 * len(shown))


def test_the_trace_can_be_downloaded_and_opened_again(visit, url, tmp_path):
    page = visit(url)
    looking.ask_example(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download trace").click()
    path = tmp_path / "routing_trace.safetensors"
    download.value.save_as(path)
    assert RoutingTrace.load(path).tokens

    other = visit(url)
    other.locator("input[type=file][accept*=safetensors]").set_input_files(str(path))
    expect(other.get_by_text("opened file")).to_be_visible()
    looking.patch(other, 1, 1).click()
    expect(looking.selection(other)).to_contain_text("patch")


def test_a_file_that_is_no_trace_says_so_and_changes_nothing(visit, url, tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"not a trace at all")
    page = visit(url)
    before = looking.selection(page).inner_text()
    page.locator("input[type=file][accept*=safetensors]").set_input_files(str(path))
    expect(page.get_by_role("alert")).to_contain_text("other.safetensors")
    expect(looking.selection(page)).to_have_text(before)


@pytest.mark.parametrize("hostile", ["bomb", "no picture", "cut off"])
def test_a_hostile_upload_is_refused_in_words_and_the_question_is_kept(visit, url, hostile, bomb, picture, tmp_path):
    path = bomb
    if hostile != "bomb":
        path = tmp_path / "upload.png"
        path.write_bytes(b"<script>alert(1)</script>" if hostile == "no picture" else picture.read_bytes()[:300])
    page = visit(url)
    looking.attach(page, path)
    looking.ask(page, "What is this?")
    expect(page.get_by_role("alert")).to_contain_text(path.name)
    expect(page.get_by_placeholder("Ask about a picture")).to_have_value("What is this?")
    expect(page.get_by_role("listitem", name="File thumbnail")).to_have_count(0)
    looking.attach(page, picture)
    page.get_by_role("button", name="Submit").click()
    looking.wait_for_answer(page)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_two_people_never_see_each_others_chat(visit, url, picture):
    one, two = visit(url), visit(url)
    looking.attach(one, picture)
    looking.ask(one, "a private question of one person")
    looking.wait_for_answer(one)
    expect(two.get_by_text("a private question")).to_have_count(0)
    expect(looking.answers(two)).to_have_count(0)
    expect(two.get_by_text("recorded example")).to_be_visible()
    two.reload()
    expect(two.get_by_text("recorded example")).to_be_visible()
    expect(two.get_by_text("a private question")).to_have_count(0)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways(visit, url, theme, width):
    page = visit(url, theme=theme, width=width, height=844)
    expect(page.get_by_text("recorded example")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Overview").click()
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_a_narrow_page_the_models_name_begins_beside_its_lamp(visit, url):
    line = visit(url, width=390, height=844).get_by_role("status", name="Model")
    lamp, name = (line.locator(part).bounding_box() for part in (".dot", ".name"))
    assert lamp["x"] + lamp["width"] <= name["x"]
    assert name["y"] <= lamp["y"] and lamp["y"] + lamp["height"] <= name["y"] + name["height"]


def test_the_dark_page_draws_the_views_on_dark_paper(visit, url):
    page = visit(url, theme="dark")
    card = page.get_by_role("region", name="Words view")
    expect(card).to_be_visible()
    shade = page.evaluate("node => getComputedStyle(node).backgroundColor", card.element_handle())
    assert max(int(value) for value in re.findall(r"\d+", shade)[:3]) < 60


def test_the_overview_shows_load_and_modality(visit, url):
    page = visit(url)
    page.get_by_role("tab", name="Overview").click()
    expect(page.get_by_text("Expert load")).to_be_visible()
    expect(page.get_by_text("Picture or text?")).to_be_visible()
    expect(page.get_by_text("Pathways")).to_be_visible()
