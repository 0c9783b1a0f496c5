"""Between Gradio's chat history and a `Conversation`; knows nothing of engines and raises `ImageError` only.

A history is a list of `{"role", "content": [{"type": "text" | "file", ...}], "metadata"}`. Messages with a
metadata title (progress, errors) are the page's own remarks and never reach a model.
"""

from collections.abc import Callable, Mapping, Sequence

from mllm_demo.chat.messages import Conversation, Message, Picture

History = list[dict]
ReadPicture = Callable[[str, str], Picture]


def user_message(text: str, files: Sequence[str]) -> dict:
    parts: list[dict] = [{"path": path} for path in files]
    return {"role": "user", "content": [*parts, *([text] if text else [])]}


def answer_message(text: str) -> dict:
    return {"role": "assistant", "content": text}


def remark(title: str, text: str = "", *, pending: bool = False) -> dict:
    """A message of the page itself: progress with a spinner, or an error that can be retried."""
    metadata = {"title": title, **({"status": "pending"} if pending else {})}
    return {"role": "assistant", "content": text, "metadata": metadata}


def text_of(message: Mapping) -> str:
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in _parts(message))


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


def conversation(history: History, read: ReadPicture) -> Conversation:
    """What the model is asked: remarks are left out, pictures come before the text of their message."""
    messages = []
    for message in history:
        if is_remark(message):
            continue
        pictures = [read(path, name) for path, name in files_of(message)]
        text = text_of(message)
        messages.append(Message(message["role"], (*pictures, *([text] if text else []))))
    return tuple(messages)


def before_answer(history: History, index: int) -> History:
    """The history up to and with the user message at `index`."""
    return list(history[: index + 1])


def with_text(message: Mapping, text: str) -> dict:
    """`message` with its text replaced and its pictures kept."""
    return user_message(text, [path for path, _ in files_of(message)])
