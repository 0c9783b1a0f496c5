"""Finds the answers of a conversation among the tokens that a model reads, for any processor and chat template.

The template is rendered with and without each answer, and what the answer adds is what is learned: exactly the tokens
that the model should produce after the prompt that it will be given in a chat. It knows nothing of files or losses.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import BatchFeature

from mllm_demo.chat.messages import Conversation, pictures, to_chat_template
from mllm_demo.chat.prompt import without_control_tokens
from mllm_demo.errors import DataError


@dataclass(frozen=True)
class Taught:
    """One sequence. `inputs`: the processor's tensors, `input_ids` int64 `[1, T]`; `targets`: int64 `[A]`, the tokens
    to learn; `positions`: int64 `[A]`, where they are predicted; `prompt_length`: tokens before the first answer."""

    inputs: BatchFeature
    positions: torch.Tensor
    targets: torch.Tensor
    prompt_length: int


class AnswerEncoder:
    """Makes sequences with one processor.

    `end_ids`: tokens that end an answer; `context_length`: how many tokens the model reads; `together`: whether several
    turns may share a sequence, which costs less and is the same to a model whose choices are made for each token.
    """

    def __init__(self, processor, end_ids: Sequence[int], context_length: int, *, together: bool = True):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.context_length, self.together = context_length, together
        ends = filter(None, (self.tokenizer.convert_ids_to_tokens(index) for index in end_ids))
        self._end = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or "(?!)")

    def encode(self, messages: Conversation) -> list[Taught]:
        """`messages`: user and assistant in turn. One sequence where the template lets every answer be told from it,
        else one for each answer that needs its own.

        Raises `DataError` when the template refuses or loses an answer, or the sequence is too long.
        """
        messages = without_control_tokens(messages, self.processor)
        waiting = list(range(2, len(messages) + 1, 2))
        rows = []
        while waiting:
            last = waiting[-1]
            text, start = self._with_answer(messages[:last])
            spans = {last: (start, len(text))}
            for end in waiting[:-1] if self.together else ():
                if span := self._within(text, messages[:end]):
                    spans[end] = span
            rows.append(self._taught(text, [spans[end] for end in sorted(spans)], messages[:last]))
            waiting = [end for end in waiting if end not in spans]
        return rows

    def _render(self, messages: Conversation, *, ask: bool) -> str:
        try:
            return self.processor.apply_chat_template(
                to_chat_template(messages), add_generation_prompt=ask, tokenize=False
            )
        except Exception as error:  # templates are programs of other people
            reason = " ".join(str(error).split())[:120].rstrip(".")
            raise DataError(f"the model's chat template refuses it ({reason}); change the line.") from error

    def _with_answer(self, messages: Conversation) -> tuple[str, int]:
        """The prompt as a chat would give it, followed by what should come next up to the end token; where that starts.

        A template may write the answer of the past differently from the prompt for a new one, so the prompt wins.
        """
        prompt, whole = self._render(messages[:-1], ask=True), self._render(messages, ask=False)
        answer = messages[-1].text
        agreed = len(os.path.commonprefix([prompt, whole]))
        found = whole.find(answer, agreed)
        if found < 0:
            found = whole.rfind(answer)
            if found < 0 or found + len(answer) <= agreed:
                raise DataError("the model's chat template changes or drops its answer; write it in plain words.")
        before = whole[agreed:found] if agreed == len(prompt) else ""
        rest = whole[found + len(answer) :]
        end = self._end.search(rest)
        after = rest[: end.end()] if end else self.tokenizer.eos_token or ""
        return prompt + before + answer + after, len(prompt)

    def _within(self, text: str, messages: Conversation) -> tuple[int, int] | None:
        """Where in `text` the last answer of `messages` stands; None if its own prompt does not come before it."""
        prompt, answer = self._render(messages[:-1], ask=True), messages[-1].text
        if not text.startswith(prompt):
            return None
        found = text.find(answer, len(prompt))
        if found < 0 or text[len(prompt) : found].strip():
            return None
        rest = text[found + len(answer) :]
        end = self._end.match(rest.lstrip())
        return len(prompt), len(text) - len(rest.lstrip()) + end.end() if end else found + len(answer)

    def _taught(self, text: str, spans: Sequence[tuple[int, int]], messages: Conversation) -> Taught:
        tokenizer = self.tokenizer
        # As in a chat: a template that writes the beginning-of-text token itself must not get a second one.
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        images = [picture.to_pil() for picture in pictures(messages)]
        try:
            inputs = self.processor(
                text=[text], images=images or None, return_tensors="pt", add_special_tokens=special
            )
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120].rstrip(".")
            raise DataError(f"the model's processor refuses it ({reason}); change its pictures.") from error
        ids = inputs["input_ids"][0].tolist()
        if len(ids) > self.context_length:
            raise DataError(
                f"it takes {len(ids)} tokens and the model reads {self.context_length}; shorten it."
            )

        def tokens(part: str) -> list[int]:
            return tokenizer(part, add_special_tokens=special).input_ids

        # Pictures take one mark here and many tokens there, but all stand before the first answer.
        whole = tokens(text)
        moved = len(ids) - len(whole)
        bounds = [tuple(_shared(tokens(text[:place]), whole) for place in span) for span in spans]
        first = bounds[0][0]
        if ids[first + moved :] != whole[first:] or not all(start < stop for start, stop in bounds):
            raise DataError("its answer cannot be told from the question by tokens; change the wording.")
        places = torch.cat([torch.arange(start, stop) for start, stop in bounds]) + moved
        return Taught(inputs, places - 1, inputs["input_ids"][0][places], first + moved)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    apart = (n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(apart, min(len(first), len(second)))
