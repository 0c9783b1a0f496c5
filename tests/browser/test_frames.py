"""A moving picture is shown to the model frame by frame, and the page says which frame is which; on the fake engine."""

import os
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import expect

from tests.browser import looking

pytestmark = pytest.mark.browser
# Inside the part of the list of pictures that is scrolled to.
IN_SIGHT = """chip => {
  const [inner, outer] = [chip, chip.parentElement].map(node => node.getBoundingClientRect());
  return inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
}"""
LABELS = ["frame 1 of 4, 0.0 s", "frame 2 of 4, 0.8 s", "frame 3 of 4, 1.6 s", "frame 4 of 4, 2.4 s"]


@pytest.fixture
def clip(tmp_path):
    """Seven frames of a ball that crosses the picture."""
    frames = []
    for step in range(7):
        frame = Image.new("RGB", (320, 180), "#e8eef5")
        ImageDraw.Draw(frame).ellipse([20 + 38 * step, 60, 72 + 38 * step, 112], fill="#d33a2c")
        frames.append(frame)
    path = tmp_path / "ball.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=400, loop=0)
    return path


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_the_frames_of_an_uploaded_gif_are_seen_one_by_one(visit, staged, clip, theme, width):
    address, engine = staged(pause=0)
    page = visit(address, theme=theme, width=width, height=900)
    looking.attach(page, clip)
    looking.ask(page, "Where does the ball go?")
    looking.wait_for_answer(page)
    (asked,) = engine.asked
    assert [picture.label for picture in asked[0].pictures] == LABELS
    view = page.get_by_role("region", name="Image view")
    choices = view.get_by_role("group", name="Choose a picture").get_by_role("button")
    expect(choices).to_have_text([label.capitalize() for label in LABELS])
    sources = set()
    for number, label in enumerate(LABELS):
        choices.nth(number).click()
        sources.add(view.get_by_role("img", name=f"{label.capitalize()} of the conversation").get_attribute("src"))
        looking.patch(page, 3, 4).click()
        expect(looking.selection(page)).to_contain_text(f"patch of {label}")
        expect(page.get_by_role("region", name="Selected token")).to_contain_text(f"· {label} ·")
        assert looking.selection(page).evaluate("line => line.scrollWidth <= line.clientWidth"), "nothing is cut off"
    assert len(sources) == 4
    strips = page.get_by_role("region", name="Words view").get_by_role("button", name="tokens")
    expect(strips).to_have_count(4)
    expect(strips.nth(1)).to_have_accessible_name(f"{LABELS[1]} · 49 tokens")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(700)
        page.screenshot(path=Path(folder) / f"frames-{width}-{theme}.png", full_page=True)


def test_frames_of_two_moving_pictures_are_told_apart(visit, staged, clip, picture):
    address, _ = staged(pause=0)
    page = visit(address, width=390, height=900)
    looking.attach(page, clip, picture, clip)
    looking.ask(page, "Which is faster?")
    looking.wait_for_answer(page)
    view = page.get_by_role("region", name="Image view")
    choices = view.get_by_role("group", name="Choose a picture").get_by_role("button")
    names = choices.all_inner_texts()
    numbered = [f"Image {number}, {label}" for number, label in enumerate([*LABELS, "", *LABELS], start=1)]
    assert names == [name.removesuffix(", ") for name in numbered]
    choices.last.focus()
    page.keyboard.press("Enter")
    expect(choices.last).to_be_focused()
    expect(choices.last).to_have_attribute("aria-pressed", "true")
    assert choices.last.evaluate(IN_SIGHT)
    looking.words(page).first.click()
    page.get_by_role("region", name="Words view").get_by_role("button", name="image 1, frame 1 of 4").click()
    expect(choices.first).to_have_attribute("aria-pressed", "true")
    assert choices.first.evaluate(IN_SIGHT)


def test_a_video_file_is_refused_with_what_to_do_and_the_question_is_kept(visit, staged, tmp_path):
    path = tmp_path / "ball.mp4"
    path.write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + b"\0" * 200)
    address, engine = staged(pause=0)
    page = visit(address)
    looking.attach(page, path)
    looking.ask(page, "Where does the ball go?")
    expect(page.get_by_role("alert")).to_contain_text("ball.mp4 is a video file")
    expect(page.get_by_role("alert")).to_contain_text("animated GIF")
    expect(page.get_by_placeholder("Ask about a picture")).to_have_value("Where does the ball go?")
    assert engine.asked == []
