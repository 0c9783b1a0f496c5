"""A conversation as plain frozen values: messages made of text and pictures.

It knows nothing of models, tensors or the page; `chat.images` makes `Picture`s from untrusted bytes.
"""

import hashlib
import io
from dataclasses import dataclass

from PIL import Image

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Picture:
    """A decoded, safe picture: `png` holds RGB, upright, `width` x `height` pixels.

    `label` says which frame of a moving picture it is and when it is shown; empty for any other picture. Models are
    not told: to them a frame is a picture like others.
    """

    png: bytes
    width: int
    height: int
    name: str = "image"
    label: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.png).hexdigest()

    def to_pil(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png)).convert("RGB")


@dataclass(frozen=True)
class Message:
    """One turn; `content` is a tuple of `str` and `Picture` in reading order."""

    role: str
    content: tuple[str | Picture, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}, not {self.role!r}")

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.content if isinstance(part, Picture))

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))


Conversation = tuple[Message, ...]


def pictures(messages: Conversation) -> tuple[Picture, ...]:
    """Every picture of the conversation, in the order in which the processor meets them."""
    return tuple(picture for message in messages for picture in message.pictures)


def to_chat_template(messages: Conversation) -> list[dict]:
    """The structure that `processor.apply_chat_template` takes; pictures become bare `{"type": "image"}`."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}
                for part in message.content
            ],
        }
        for message in messages
    ]
