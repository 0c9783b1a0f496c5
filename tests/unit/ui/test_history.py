"""A chat history becomes exactly what the person meant to ask."""

from mllm_demo.chat.messages import Picture
from mllm_demo.ui import history as chat


def read(path, name):
    """The files named "moving" have two frames."""
    labels = ("frame 1 of 2", "frame 2 of 2") if "moving" in name else ("",)
    return tuple(Picture(path.encode(), 1, 1, name, label) for label in labels)


def stored(message):
    """A message as Gradio hands it back."""
    content = message["content"]
    part = {"type": "text", "text": content} if isinstance(content, str) else {"type": "file", "file": content}
    return {**message, "content": [part]}


def as_given_back(*messages):
    return [stored(message) for message in messages]


def test_pictures_and_text_of_one_turn_are_one_message_in_order():
    history = as_given_back(*chat.user_messages("which is red?", ["/a.png", "/b.png"]))
    (message,) = chat.conversation(history, read)
    assert [part.name for part in message.pictures] == ["a.png", "b.png"]
    assert message.content[-1] == "which is red?"


def test_frames_of_a_moving_picture_stand_where_it_stood():
    history = as_given_back(*chat.user_messages("which is red?", ["/a.png", "/moving.gif", "/b.png"]))
    (message,) = chat.conversation(history, read)
    shown = [picture.label or picture.name for picture in message.pictures]
    assert shown == ["a.png", "frame 1 of 2", "frame 2 of 2", "b.png"]


def test_turns_alternate():
    history = as_given_back(
        *chat.user_messages("one", []), chat.answer_message("two"), *chat.user_messages("three", [])
    )
    assert [(m.role, m.text) for m in chat.conversation(history, read)] == [
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
    ]


def test_a_question_that_failed_is_left_out_with_the_remark_about_it():
    history = as_given_back(
        *chat.user_messages("too long", ["/a.png"]), chat.remark("Not answered", "why"), *chat.user_messages("ok", [])
    )
    assert [m.text for m in chat.conversation(history, read)] == ["ok"]


def test_an_answer_that_was_cut_short_by_an_error_stays():
    history = as_given_back(
        *chat.user_messages("q", []),
        chat.answer_message("half an"),
        chat.remark("Not answered", "why"),
        *chat.user_messages("go on", []),
    )
    assert [m.text for m in chat.conversation(history, read)] == ["q", "half an", "go on"]


def test_a_turn_begins_at_its_first_picture():
    history = as_given_back(chat.answer_message("before"), *chat.user_messages("text", ["/a.png", "/b.png"]))
    assert chat.turn_start(history, 3) == 1
    assert chat.turn_start(history[1:], 2) == 0


def test_markup_is_shown_as_letters_and_asked_as_typed():
    said = "<img src=x> 1 < 2, ![a](http://b/c.png) </b>!"
    (message,) = chat.user_messages(said, [])
    assert "<img" not in message["content"] and "![" not in message["content"] and "</b" not in message["content"]
    assert chat.text_of(stored(message)) == said


def test_plain_words_are_shown_unchanged():
    assert chat.shown("Is 1 < 2? Yes! [really]") == "Is 1 < 2? Yes! [really]"


def test_the_owner_s_name_of_a_file_is_the_one_that_errors_use():
    message = {"role": "user", "content": [{"type": "file", "file": {"path": "/x/y.png", "orig_name": "cat.png"}}]}
    assert chat.files_of(message) == [("/x/y.png", "cat.png")]
