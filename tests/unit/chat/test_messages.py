"""A conversation is plain values, and pictures keep their place and order in it."""

import io

import pytest
from PIL import Image

from mllm_demo.chat.messages import Message, Picture, pictures, to_chat_template


def picture(colour: str) -> Picture:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(out, "PNG")
    return Picture(out.getvalue(), 4, 3, colour)


RED, BLUE = picture("red"), picture("blue")
TALK = (
    Message("system", ("Be brief.",)),
    Message("user", ("First ", RED, " then ", BLUE)),
    Message("assistant", ("Two.",)),
    Message("user", (RED, "Again?")),
)


def test_pictures_come_in_reading_order_with_repeats():
    assert pictures(TALK) == (RED, BLUE, RED)


def test_the_template_gets_every_part_in_its_place():
    turns = to_chat_template(TALK)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[1]["content"] == [
        {"type": "text", "text": "First "},
        {"type": "image"},
        {"type": "text", "text": " then "},
        {"type": "image"},
    ]


def test_a_message_knows_its_text_and_pictures():
    assert TALK[1].text == "First  then " and TALK[1].pictures == (RED, BLUE)


def test_a_picture_is_identified_by_its_pixels_and_decodes():
    assert RED.digest == picture("red").digest != BLUE.digest
    assert RED.to_pil().getpixel((0, 0)) == (255, 0, 0) and RED.to_pil().size == (4, 3)


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role"):
        Message("tool", ("x",))
