"""Lines of other people's data: the good ones are read as they mean, the bad ones are named by number and reason."""

import io
import json

import pytest
from PIL import Image

from mllm_demo.errors import DataError, SettingsError
from mllm_demo.training.userdata import read_lines, report, require_some


@pytest.fixture
def written(tmp_path):
    """Writes lines (objects, text or bytes) into a data file beside one picture."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")

    def write(*lines):
        lines = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        raw = [line.encode() if isinstance(line, str) else line for line in lines]
        (tmp_path / "data.jsonl").write_bytes(b"\n".join(raw))
        return read_lines(tmp_path / "data.jsonl")

    return write


def good(**changes):
    return {"image": "red.png", "question": "What colour?", "answer": "red"} | changes


def test_a_line_becomes_a_conversation_whose_picture_stands_before_the_first_question(written):
    data = written(good(), good(image=["red.png", "red.png"]), good(image=None))
    first, second, third = (line.conversation() for line in data.lines)
    assert [message.role for message in first] == ["user", "assistant"]
    assert (first[0].pictures[0].width, first[0].text, first[1].text) == (8, "What colour?", "red")
    assert len(second[0].pictures) == 2 and third[0].pictures == ()
    assert data.problems == {}


def test_turns_follow_each_other_and_share_the_picture(written):
    turns = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    (line,) = written({"image": "red.png", "turns": turns}).lines
    assert [message.text for message in line.conversation()] == ["a", "b", "c", "d"]
    assert [len(message.pictures) for message in line.conversation()] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "not JSON"),
        (b'{"image": "\xff"}', "UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "not an object"),
        ({"question": "a", "answer": "b"}, "no image"),
        ({"image": None, "answer": "b"}, "no question"),
        ({"image": None, "question": "a"}, "no answer"),
        (good(answer="  "), "answer is empty"),
        (good(answer=3), "answer is not text"),
        (good(image=3), "image is not a path"),
        (good(image=[""]), "image is not a path"),
        ({"image": None, "turns": []}, "at least one"),
        ({"image": None, "turns": [{"question": "a", "answer": "b"}, {"question": "c"}]}, "no answer in turn 2"),
        (good(turns=[{"question": "a", "answer": "b"}]), "write one of the two"),
    ],
)
def test_a_bad_line_is_skipped_and_says_why_in_one_sentence(written, line, said):
    data = written(good(), line, "", good())
    assert [line.number for line in data.lines] == [1, 4]
    assert list(data.problems) == [2] and said in data.problems[2]
    assert "\n" not in data.problems[2] and data.problems[2].endswith(".")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.png", None, "not there"),
        ("..\0.png", None, "not there"),
        ("x" * 5000, None, "not there"),
        ("words.png", b"<script>alert(1)</script>", "not a picture"),
        ("cut.png", "cut", "damaged"),
        ("bomb.png", "bomb", "megapixels"),
    ],
)
def test_a_hostile_picture_is_a_bad_line(written, tmp_path, name, content, said):
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000) if content == "bomb" else (64, 64)).save(out, "PNG")
    content = {"bomb": out.getvalue(), "cut": out.getvalue()[:40]}.get(content, content)
    if content:
        (tmp_path / name).write_bytes(content)
    (line,) = written(good(image=name)).lines
    with pytest.raises(DataError, match=said):
        line.conversation()


def test_the_first_problems_are_told_and_the_rest_counted():
    said = report({number: f"reason {number}." for number in range(1, 26)}, 100)
    assert said[0] == "skipped line 1: reason 1." and said[9] == "skipped line 10: reason 10."
    assert said[10:] == ["... and 15 more lines", "25 of 100 lines were skipped"]
    assert report({}, 3) == []


def test_nothing_to_learn_is_an_error_that_names_the_first_reason(written, tmp_path):
    data = written("x", "y")
    with pytest.raises(DataError, match="No line of .* can be used; line 1: it is not JSON"):
        require_some(data.lines, data.problems, tmp_path / "data.jsonl")
    data = written("", "")
    with pytest.raises(DataError, match="is empty"):
        require_some(data.lines, data.problems, tmp_path / "data.jsonl")


def test_a_file_that_is_not_there_is_a_setting_to_correct(tmp_path):
    with pytest.raises(SettingsError, match="check --data"):
        read_lines(tmp_path / "none.jsonl")
