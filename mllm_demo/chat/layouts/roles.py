"""Whose message each position of a prompt belongs to, and which positions only the template wrote.

The chat template is rendered for the messages up to each one; where those texts end, the role changes.
The text has one placeholder a picture and the prompt many tokens, so the tokens of the text are then found
again in the prompt. It knows nothing of boxes or routing.
"""

import bisect
from collections.abc import Sequence
from difflib import SequenceMatcher
from os.path import commonprefix

from jinja2 import TemplateError

from mllm_demo.chat.messages import Conversation, Message, to_chat_template

_TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)


def roles(
    processor,
    messages: Conversation,
    ids: Sequence[int],
    placeholder: int | None,
    spans: Sequence[tuple[int, int]],
) -> tuple[list[str], set[int]]:
    """One role per position of `ids`, and the positions of markup: what stands around the messages' own content.

    `placeholder`: the id of image tokens. `spans`: first and last position of each picture's tokens, in
    order; empty when they are not known, which only makes the search slower.

    Markup around a message counts as its own, a system text that the template adds by itself as "system", the
    invitation to answer as "assistant". When the template cannot be rendered everything is the user's.
    """
    try:
        text, starts = _starts(processor, messages)
    except _TEMPLATE_ERRORS:
        return ["user"] * len(ids), set()
    tokenizer = processor.tokenizer
    short, offsets = _tokenize(tokenizer, text)
    where = _positions(short, list(ids), placeholder, spans)
    found = ["user"] * len(ids)
    for role, start in starts:
        token = bisect.bisect_left(offsets, start)
        if token == 0:
            position = 0
        elif token == len(short):
            position = len(ids)
        elif short[token] == placeholder:
            # What a processor writes around a picture belongs to the message with the picture.
            position = where[token - 1] + 1
        else:
            position = where[token]
        found[position:] = [role] * (len(ids) - position)
    said = _said(text, messages)
    markup = {
        position
        for number, offset, position in zip(short, offsets, where, strict=True)
        if number != placeholder and said and not any(start <= offset < end for start, end in said)
    }
    return found, markup


def _said(text: str, messages: Conversation) -> list[tuple[int, int]]:
    """(first character, end) of every text of `messages` in the prompt; empty if one of them is not found."""
    spans, end = [], 0
    for part in (part for message in messages for part in message.content if isinstance(part, str) and part.strip()):
        start = text.find(part.strip(), end)  # some templates strip what was said
        if start < 0:
            return []
        end = start + len(part.strip())
        spans.append((start, end))
    return spans


def _starts(processor, messages: Conversation) -> tuple[str, list[tuple[str, int]]]:
    """The rendered prompt, and for each stretch of it (role, first character), in order."""
    text = _render(processor, messages, add_generation_prompt=True)
    starts = []
    own = len(_own_text(processor, messages, text))
    if own:
        starts.append(("system", 0))
    end = own
    for count, message in enumerate(messages, start=1):
        starts.append((message.role, end))
        try:
            upto = commonprefix([text, _render(processor, messages[:count])])
            end = max(end, len(upto))
        except _TEMPLATE_ERRORS:
            # Some templates refuse a system message alone; the next message is then found by what it says.
            following = next((part for part in messages[count].content if isinstance(part, str)), "")
            end = max(end, text.find(following, end))
    starts.append(("assistant", end))
    return text, starts


def _own_text(processor, messages: Conversation, text: str) -> str:
    """What the template writes before a first message of the user: often a system message of its own."""
    first = messages[:1]
    if not first or first[0].role != "user":
        return ""
    try:
        alone = _render(processor, first)
        before = _render(processor, (*first, Message("assistant", ("a",))))
        again = _render(processor, (*first, Message("assistant", ("a",)), *first))
    except _TEMPLATE_ERRORS:
        return ""
    turn = again.removeprefix(before)
    if turn and again.startswith(before) and alone.endswith(turn) and text.startswith(alone):
        return alone.removesuffix(turn)
    return ""


def _render(processor, messages: Conversation, add_generation_prompt: bool = False) -> str:
    return processor.apply_chat_template(
        to_chat_template(messages), add_generation_prompt=add_generation_prompt, tokenize=False
    )


def _tokenize(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The tokens of `text`, and the character each begins with."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Without offsets: each token as long as it decodes to, which is off by what the tokenizer normalizes.
    starts = [len(tokenizer.decode(ids[:count])) for count in range(len(ids))]
    return list(ids), starts


def _positions(
    short: list[int], long: list[int], placeholder: int | None, spans: Sequence[tuple[int, int]]
) -> list[int]:
    """Where each token of `short` (a placeholder for each picture: its last token) is in `long`."""
    pictures = [index for index, number in enumerate(short) if number == placeholder]
    if len(pictures) != len(spans):
        return _aligned(short, long, 0)
    where: list[int] = []
    position = 0
    for index, (first, last) in zip(pictures, spans, strict=True):
        where += [*_aligned(short[len(where) : index], long[position:first], position), last]
        position = last + 1
    return where + _aligned(short[len(where) :], long[position:], position)


def _aligned(short: list[int], long: list[int], offset: int) -> list[int]:
    """Positions of `short` in `long`, plus `offset`, never descending; one not found takes the next's."""
    for start in range(len(long) - len(short) + 1):
        if long[start : start + len(short)] == short:
            return list(range(offset + start, offset + start + len(short)))
    where = [len(long) - 1] * len(short)
    for block in SequenceMatcher(None, short, long, autojunk=False).get_matching_blocks():
        where[block.a : block.a + block.size] = range(block.b, block.b + block.size)
    for index in range(len(where) - 2, -1, -1):
        where[index] = min(where[index], where[index + 1])
    return [offset + max(0, position) for position in where]
