"""Between Gradio's chat history and a `Conversation`; knows nothing of engines and raises `ImageError` only.

A history is a list of `{"role", "content": [{"type": "text" | "file", ...}], "metadata"}`. Messages with a
metadata title (progress, errors) are the page's own remarks and never reach a model; nor does the question
that such a remark stands below, so that one question too many does not spoil those after it.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from mllm_demo.chat.messages import Conversation, Message, Picture

History = list[dict]
# Path and name of a file to the pictures in it: one, or frames of a moving picture.
ReadPictures = Callable[[str, str], Sequence[Picture]]

# Gradio draws messages as Markdown with HTML in it. An invisible joiner after "<" and "!" keeps tags and pictures
# as the letters they are, so that no words, of a person or a model, make the browser fetch anything.
_JOINER = "\u2060"
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")


def shown(text: str) -> str:
    return _MARKUP.sub(lambda found: found.group() + _JOINER, text)


def typed(text: str) -> str:
    """What `shown` was made from."""
    return text.replace(_JOINER, "")


def user_messages(text: str, files: Sequence[str]) -> History:
    """One turn of a person: a message for each picture, then one for the text, so that editing spares pictures."""
    return [{"role": "user", "content": {"path": path}} for path in files] + [{"role": "user", "content": shown(text)}]


def answer_message(text: str, drawn: str | None = None, described: str = "") -> dict:
    """`drawn`: path of a picture that shows what the answer points at, `described` in words for who cannot see it."""
    if drawn is None:
        return {"role": "assistant", "content": shown(text)}
    return {"role": "assistant", "content": [shown(text), {"path": drawn, "alt_text": described}]}


def remark(title: str, text: str = "", *, pending: bool = False) -> dict:
    """A message of the page itself: progress with a spinner, or an error that can be retried."""
    metadata = {"title": title, **({"status": "pending"} if pending else {})}
    return {"role": "assistant", "content": shown(text), "metadata": metadata}


def text_of(message: Mapping) -> str:
    return typed("".join(part if isinstance(part, str) else part.get("text", "") for part in _parts(message)))


def files_of(message: Mapping) -> list[tuple[str, str]]:
    """`(path, the name its owner gave it)` of each file of a message."""
    found = []
    for part in _parts(message):
        if isinstance(part, str):
            continue
        file = part.get("file", part)
        if path := file.get("path"):
            found.append((path, file.get("orig_name") or path.rpartition("/")[2]))
    return found


def _parts(message: Mapping) -> list:
    content = message["content"]
    return content if isinstance(content, list) else [content]


def is_remark(message: Mapping) -> bool:
    return bool((message.get("metadata") or {}).get("title"))


def conversation(history: History, read: ReadPictures) -> Conversation:
    """What the model is asked: a person's messages in a row are one turn, questions that failed are left out.

    Pictures beside an answer were drawn by the page; no model said or saw them.
    """
    messages: list[Message] = []
    for message in history:
        if is_remark(message):
            if messages and messages[-1].role == "user":
                messages.pop()
            continue
        files = files_of(message) if message["role"] == "user" else []
        parts = [picture for path, name in files for picture in read(path, name)]
        parts += [text] if (text := text_of(message)) else []
        if messages and messages[-1].role == message["role"]:
            parts = [*messages.pop().content, *parts]
        messages.append(Message(message["role"], tuple(parts)))
    return tuple(messages)


def turn_start(history: History, index: int) -> int:
    """Where the turn begins whose last message is the user message at `index`."""
    while index > 0 and history[index - 1]["role"] == "user":
        index -= 1
    return index
