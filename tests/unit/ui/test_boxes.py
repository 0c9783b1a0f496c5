"""An answer that names boxes is shown with its picture and the boxes in it; the model never sees that drawing."""

from types import SimpleNamespace

import pytest
from gradio_client.utils import strip_invalid_filename_characters
from PIL import Image

from mllm_demo.chat.grounding import Box, find_boxes
from mllm_demo.settings import Settings
from mllm_demo.ui import history as chat
from mllm_demo.ui import words
from mllm_demo.ui.callbacks import Callbacks
from tests.browser.fake_engine import BOX_ANSWER, FakeEngine, picture_png

SAMPLING = (64, 0.0, 1.0, 1.0, 0)


@pytest.fixture
def page():
    made = Callbacks(FakeEngine(pause=0), Settings(), None)
    yield made
    made.sessions.close()


@pytest.fixture
def request_of():
    return SimpleNamespace(session_hash="one")


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "first.png", tmp_path / "second.png"]
    for path in paths:
        path.write_bytes(picture_png())
    with Image.open(paths[1]) as image:
        image.resize((448, 224)).save(paths[1])
    return [str(path) for path in paths]


def last(updates) -> list[dict]:
    """The history that the page ends up with."""
    return [update[1] for update in updates if isinstance(update[1], list)][-1]


def test_the_last_picture_is_shown_with_its_boxes_and_told_in_words(page, request_of, files):
    answer = last(page.send(request_of, {"text": "where is it?", "files": files}, [], *SAMPLING))[-1]
    text, drawn = answer["content"]
    assert chat.typed(text) == BOX_ANSWER
    with Image.open(drawn["path"]) as image:
        assert image.width == 2 * image.height, "drawn on the second picture"
        assert (255, 214, 10) in {colour for _, colour in image.getcolors(1 << 20)}
    assert drawn["alt_text"] == "Picture with a box from 27 to 71 percent across and from 9 to 49 percent down"


def given_back(history) -> list[dict]:
    """As Gradio hands a history back: every content a list of typed parts."""

    def part(content):
        if isinstance(content, dict) and "type" in content:
            return content
        return {"type": "text", "text": content} if isinstance(content, str) else {"type": "file", "file": content}

    return [
        {**m, "content": [part(c) for c in (m["content"] if isinstance(m["content"], list) else [m["content"]])]}
        for m in history
    ]  # fmt: skip


def test_the_model_is_asked_on_without_the_drawing(page, request_of, files):
    shown = given_back(last(page.send(request_of, {"text": "where?", "files": files[:1]}, [], *SAMPLING)))
    list(page.send(request_of, {"text": "and now?", "files": []}, shown, *SAMPLING))
    asked = page.engine.asked[-1]
    assert [len(message.pictures) for message in asked] == [1, 0, 0]
    assert [message.text for message in asked] == ["where?", BOX_ANSWER, "and now?"]


def test_the_boxes_of_a_later_answer_are_drawn_on_the_picture_before_it_and_so_are_those_of_a_retry(
    page, request_of, files
):
    shown = given_back(last(page.send(request_of, {"text": "hello", "files": files[:1]}, [], *SAMPLING)))
    assert all(part["type"] == "text" for part in shown[-1]["content"])
    shown = given_back(last(page.send(request_of, {"text": "where?", "files": []}, shown, *SAMPLING)))
    assert [part["type"] for part in shown[-1]["content"]] == ["text", "file"]
    asked_at = max(index for index, message in enumerate(shown) if message["role"] == "user")
    for index in (asked_at, (asked_at, 0)):
        again = last(page.retry(request_of, SimpleNamespace(index=index), shown, *SAMPLING))
        assert [message["role"] for message in again] == [message["role"] for message in shown]
        assert again[-1]["content"][1]["alt_text"].startswith("Picture with a box")
    edited = last(page.edit(request_of, SimpleNamespace(index=asked_at, value="where else?"), shown, *SAMPLING))
    assert len(edited[-1]["content"]) == 2


def test_boxes_without_a_picture_draw_nothing(page, request_of):
    answer = last(page.send(request_of, {"text": "where?", "files": []}, [], *SAMPLING))[-1]
    assert isinstance(answer["content"], str)


def test_the_trace_and_the_answer_know_nothing_of_the_drawing(page, request_of, files):
    list(page.send(request_of, {"text": "where?", "files": files[:1]}, [], *SAMPLING))
    trace = page.sessions.trace("one")
    assert trace.provenance["answer"] == BOX_ANSWER and len(trace.images) == 1
    assert trace.images[0].data == page.engine.asked[-1][0].pictures[0].png


def test_a_drawing_goes_with_its_session(page, request_of, files):
    answer = last(page.send(request_of, {"text": "where?", "files": files[:1]}, [], *SAMPLING))[-1]
    path = answer["content"][1]["path"]
    page.closed(request_of)
    with pytest.raises(FileNotFoundError):
        open(path)


def test_several_boxes_are_told_by_number():
    assert words.boxes_drawn(find_boxes("[1, 2, 3, 4] [5, 6, 7, 8]")) == (
        "Picture with box 1 from 1 to 3 percent across and from 2 to 4 percent down, "
        "and box 2 from 5 to 7 percent across and from 6 to 8 percent down"
    )
    assert words.boxes_drawn(find_boxes("[1, 2, 3, 4] [5, 6, 7, 8] [1, 1, 9, 9]")) == "Picture with 3 boxes"


def test_the_description_survives_as_the_name_of_a_file():
    """Gradio strips what it finds odd in a name, and the page reads the description from there."""
    longest = words.boxes_drawn([Box(10, 10, 100, 100), Box(10, 11, 100, 100)])
    assert strip_invalid_filename_characters(f"{longest}.png") == f"{longest}.png"
