"""Which tokens of a prompt a choice made for the whole sequence looks at: the first turn of the user.

The rule is Awaker2.5-VL's: from where the first picture begins, or else from the end of the turn's header, up to the
token that ends the turn. Where that is empty, because the pictures come in a later turn only, the header's end
counts; the original fails there. Every token id comes from the chat template, the tokenizer or the configuration.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mllm_demo.chat.layout import image_token_id
from mllm_demo.chat.messages import Conversation, Message, to_chat_template
from mllm_demo.chat.prompt import Prompt
from mllm_demo.errors import CheckpointError
from mllm_demo.models.loading import LoadedModel
from mllm_demo.moe_lora import MoeLoraModel

# What stands between the token that opens a turn and what the user says: the role. Its line end is in the region.
HEADER = 2


@dataclass(frozen=True)
class Markers:
    """The ids that structure a prompt; `turns_before`: how many turns stand before the user's first."""

    turn_start: int
    turn_end: int
    picture_start: int | None
    picture: int | None
    turns_before: int = 1


def markers(processor, config, messages: Conversation) -> Markers:
    """The markers that the chat template writes around the turns of `messages`, which begin with the user's.

    Raises `CheckpointError` when the template does not open and close a turn with one token each.
    """
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *(n for n, t in tokenizer.added_tokens_decoder.items() if t.special)}
    first, answer = Message("user", ("a",)), Message("assistant", ("a",))

    def rendered(*turns: Message) -> str:
        return processor.apply_chat_template(to_chat_template(turns), add_generation_prompt=False, tokenize=False)

    before = rendered(first, answer)
    turn = rendered(first, answer, first).removeprefix(before)
    marks = [number for number in _ids(tokenizer, turn) if number in special]
    if len(marks) != 2 or marks[0] == marks[1]:
        raise CheckpointError(
            "This adapter routes by the user's first turn, and the model's chat template does not mark where a turn "
            "begins and ends; load the processor that was made for it."
        )
    own = rendered(first).removesuffix(turn)
    declared = sum(message.role == "system" for message in messages[:1])
    return Markers(
        turn_start=marks[0],
        turn_end=marks[1],
        picture_start=getattr(config, "vision_start_token_id", None),
        picture=image_token_id(processor, config),
        # A system message of the conversation takes the place of the template's own.
        turns_before=declared or _ids(tokenizer, own).count(marks[0]),
    )


def first_user_turn(input_ids: torch.Tensor, marks: Markers) -> torch.Tensor:
    """int64 [batch, T] for `input_ids` [batch, T], padded or not: 1 at the tokens of the region."""
    rows = [_row(row, marks) for row in input_ids.tolist()]
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    bounds = torch.tensor(rows, device=input_ids.device)
    return ((position >= bounds[:, :1]) & (position < bounds[:, 1:])).long()


@contextmanager
def routed_region(loaded: LoadedModel, prompt: Prompt) -> Iterator[None]:
    """Tells the routers of an adapter that chooses by the first turn which tokens of `prompt` those are."""
    tuner = getattr(loaded.model, "base_model", None)
    configs = tuner.peft_config.values() if isinstance(tuner, MoeLoraModel) else ()
    if all(config.prompt_region != "first_user_turn" for config in configs):
        yield
        return
    marks = markers(loaded.processor, loaded.model.config, prompt.messages)
    with tuner.routing_context(prompt_mask=first_user_turn(prompt.inputs["input_ids"], marks)):
        yield


def _row(ids: list[int], marks: Markers) -> tuple[int, int]:
    """(first, one past the last) position of the region."""
    opened = [position for position, number in enumerate(ids) if number == marks.turn_start]
    closed = [position for position, number in enumerate(ids) if number == marks.turn_end]
    if len(opened) <= marks.turns_before:
        return 0, len(ids)
    end = next((p for p in closed[marks.turns_before :] if p > opened[marks.turns_before]), len(ids))
    start = opened[marks.turns_before] + HEADER
    if marks.picture in ids and marks.picture_start in ids:
        picture = ids.index(marks.picture_start)
        start = picture if picture < end else start
    return start, end


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
