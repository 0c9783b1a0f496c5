"""Boxes in an answer are drawn where they say; anything that is no box draws nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from mllm_demo.chat.grounding import BRIGHT, DARK, MAX_BOXES, MAX_SIDE, MIN_SIDE, Box, draw_boxes, find_boxes
from mllm_demo.chat.messages import Picture


def picture(width=400, height=200, colour="#808080") -> Picture:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return Picture(out.getvalue(), width, height, "grey.png")


def where(drawn: Picture, colour: str) -> np.ndarray:
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (np.asarray(drawn.to_pil()) == wanted).all(-1)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("It is at [10, 20, 30, 40].", [Box(10, 20, 30, 40)]),
        ("[0,0,100,100]", [Box(0, 0, 100, 100)]),
        ("one [ 1 , 2 , 3 , 4 ] and [5, 6, 7, 8], again [1, 2, 3, 4]", [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]),
        ("[[1, 2, 3, 4]]", [Box(1, 2, 3, 4)]),
    ],
)
def test_boxes_are_read_in_order_and_once(text, boxes):
    assert list(find_boxes(text)) == boxes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[30, 20, 10, 40]",
        "[10, 40, 30, 20]",
        "[10, 20, 10, 40]",
        "[10, 20, 30, 101]",
        "[10, 20, 30, 1000]",
        "[-1, 20, 30, 40]",
        "[1.5, 2, 3, 4]",
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[a, b, c, d]",
        "(1, 2, 3, 4)",
        "[1, 2, 3, 4",
        "x[1, 2, 3, 4]",
        "[1, 2, 3, 4](http://example.org)",
        "[١, ٢, ٣, ٤]",
        "[1 2 3 4]",
    ],
)
def test_what_is_no_box_is_none(text):
    assert find_boxes(text) == ()


def test_an_answer_of_nothing_but_boxes_is_bounded():
    text = " ".join(f"[{n}, 1, {n + 1}, 2]" for n in range(90))
    assert len(find_boxes(text)) == MAX_BOXES


def test_the_bright_line_is_where_the_box_says_with_dark_on_both_sides():
    drawn = draw_boxes(picture(), [Box(25, 10, 75, 90)])
    assert (drawn.width, drawn.height, drawn.name) == (400, 200, "grey.png")
    rows, columns = np.nonzero(where(drawn, BRIGHT))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (100, 299, 20, 179)
    middle = np.asarray(drawn.to_pil())[100]
    bright, dark = where(drawn, BRIGHT)[100], where(drawn, DARK)[100]
    left = np.nonzero(bright[:200])[0]
    assert dark[left.min() - 1] and dark[left.max() + 1]
    assert (middle[200] == 0x80).all(), "the inside is the picture's own"


@pytest.mark.parametrize("size", [(400, 200), (1, 1), (7, 300), (5000, 40)])
@pytest.mark.parametrize("box", [Box(0, 0, 100, 100), Box(0, 0, 1, 1), Box(99, 99, 100, 100), Box(50, 50, 51, 51)])
def test_any_box_is_seen_on_any_picture(size, box):
    assert where(draw_boxes(picture(*size), [box]), BRIGHT).any()


@pytest.mark.parametrize(("size", "longest"), [((40, 20), MIN_SIDE), ((4096, 100), MAX_SIDE), ((640, 480), 640)])
def test_the_drawing_has_a_size_for_a_chat(size, longest):
    drawn = draw_boxes(picture(*size), [Box(1, 2, 30, 40)])
    assert max(drawn.width, drawn.height) == longest
    assert drawn.width / drawn.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_several_boxes_are_numbered_and_one_is_not():
    one, two = Box(10, 10, 40, 60), Box(50, 20, 90, 80)
    alone = where(draw_boxes(picture(), [one]), BRIGHT)
    both = where(draw_boxes(picture(), [one, two]), BRIGHT)
    inside = np.s_[28:50, 46:60]  # right behind the first box's upper left corner
    assert not alone[inside].any() and both[inside].any()


def test_the_picture_itself_stays_as_it_is():
    given = picture()
    before = given.png
    draw_boxes(given, [Box(1, 2, 3, 4)])
    assert given.png == before
