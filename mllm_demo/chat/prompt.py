"""A conversation as a model's inputs: chat template, pictures, and the check against the context length.

Frames of a moving picture are pictures like others; no processor is ever handed a video. It knows nothing of threads,
queues or routing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError

from mllm_demo.chat.messages import Conversation, pictures, to_chat_template
from mllm_demo.errors import ContextLengthError, GenerationError
from mllm_demo.models.loading import LoadedModel

MIN_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Prompt:
    """What `generate` is given.

    `inputs`: the processor's tensors on the model's device, `input_ids` int64 [1, len(ids)];
    `messages`: the conversation as the model read it; `max_new_tokens`: what was asked for, clipped to what fits.
    """

    inputs: Mapping
    ids: tuple[int, ...]
    messages: Conversation
    max_new_tokens: int


def make_prompt(loaded: LoadedModel, messages: Conversation, max_new_tokens: int) -> Prompt:
    """Builds the inputs for the answer to the last message.

    Raises `ContextLengthError` when prompt and a few answer tokens exceed the context, and `GenerationError`
    when there is no question, the model has no chat template, or template or processor refuse several pictures.
    """
    if not messages or messages[-1].role != "user" or not messages[-1].content:
        raise GenerationError("There is no question to answer; write one or add a picture first.")
    processor = loaded.processor
    tokenizer = processor.tokenizer
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise GenerationError(f"{loaded.title} has no chat template; load a model made for chatting (instruct, chat).")
    messages = without_control_tokens(messages, processor)
    images = [picture.to_pil() for picture in pictures(messages)]
    try:
        inputs = _inputs(processor, messages, images)
    except (TemplateError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        if len(images) < 2:
            raise
        reason = " ".join(str(error).split())
        raise GenerationError(
            f"{loaded.title} does not take {len(images)} pictures in one conversation ({reason}); "
            "start a new chat with one picture; a moving picture is one with --frames 1."
        ) from error
    ids = tuple(inputs["input_ids"][0].tolist())
    room = loaded.context_length - len(ids)
    if room < min(MIN_ANSWER_TOKENS, max_new_tokens):
        moving = any(picture.label for picture in pictures(messages))
        fewer = ", or show fewer frames of a moving picture (--frames)" if moving else ""
        raise ContextLengthError(
            f"The conversation takes {len(ids)} tokens with {len(images)} pictures, and {loaded.title} reads "
            f"{loaded.context_length} with its answer; start a new chat, or remove pictures or earlier messages{fewer}."
        )
    return Prompt(inputs.to(loaded.device, getattr(torch, loaded.dtype)), ids, messages, min(max_new_tokens, room))


def _inputs(processor, messages: Conversation, images: list):
    tokenizer = processor.tokenizer
    text = processor.apply_chat_template(to_chat_template(messages), add_generation_prompt=True, tokenize=False)
    # A template that writes the beginning-of-text token itself must not get a second one from the tokenizer.
    add_special_tokens = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=add_special_tokens)


def without_control_tokens(messages: Conversation, processor) -> Conversation:
    """The same conversation with a space inside every control token that a person typed.

    Text such as "<|im_end|>" or a placeholder of a picture or a video would otherwise end the turn, forge another
    role or ask for a picture or a video that is not there.
    """
    tokenizer = processor.tokenizer
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    placeholders = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
    control |= {*tokenizer.all_special_tokens, *(token for token in placeholders if isinstance(token, str))}
    control = {token for token in control if len(token) > 1 and not token[0].isspace()}
    if not control:
        return messages
    pattern = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)))

    def broken(text: str) -> str:
        return pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    return tuple(
        replace(
            message,
            content=tuple(broken(part) if isinstance(part, str) else part for part in message.content),
        )
        for message in messages
    )
