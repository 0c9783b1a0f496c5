"""What each position of a chat is: its text, whose message it is, and which part of a picture it covers.

Image tokens are placed by the processor's family (`chat.layouts.families`). It knows nothing of routing.
"""

from collections.abc import Mapping, Sequence

from mllm_demo.chat.layouts.families import places
from mllm_demo.chat.layouts.pieces import token_texts
from mllm_demo.chat.layouts.places import Place, Prompt
from mllm_demo.chat.layouts.roles import roles
from mllm_demo.chat.messages import Conversation, pictures
from mllm_demo.routing.trace import Token


def prompt_tokens(
    processor, config, messages: Conversation, input_ids: Sequence[int], inputs: Mapping
) -> tuple[Token, ...]:
    """One `Token` for each of `input_ids` (one sequence, ids as ints), in phase "prefill".

    `inputs`: what the processor returned for these `messages`. For a processor of a family nobody described
    an image token's `box` is None, and its `image_index` too where the picture cannot be told.
    """
    ids = [int(number) for number in input_ids]
    image_id = image_token_id(processor, config)
    positions = [position for position, number in enumerate(ids) if number == image_id]
    sizes = [(picture.width, picture.height) for picture in pictures(messages)]
    found = dict(zip(positions, places(processor, Prompt(ids, positions, sizes, inputs)), strict=True))
    spans = _spans(found, len(sizes))
    special = _special_ids(processor.tokenizer)
    between = {position for first, last in spans for position in range(first, last)}
    texts = token_texts(processor.tokenizer, ids)
    owners, markup = roles(processor, messages, ids, image_id, spans)
    return tuple(
        Token(
            id=number,
            text=texts[position],
            modality=_modality(position in found, number in special or position in between or position in markup),
            role=owners[position],
            phase="prefill",
            image_index=found[position].image_index if position in found else None,
            box=found[position].box if position in found else None,
        )
        for position, number in enumerate(ids)
    )


def decoded_tokens(processor, ids: Sequence[int]) -> tuple[Token, ...]:
    """One `Token` for each new token `ids` of the answer: phase "decode", role "assistant"."""
    ids = [int(number) for number in ids]
    special = _special_ids(processor.tokenizer)
    return tuple(
        Token(number, text, _modality(False, number in special), "assistant", "decode")
        for number, text in zip(ids, token_texts(processor.tokenizer, ids), strict=True)
    )


def image_token_id(processor, config) -> int | None:
    """The id that stands for one piece of a picture, as processor or config declare it, or None."""
    # Llama 4 calls the mark in front of the whole picture its image token; patches have their own.
    patch = getattr(processor, "img_patch_token", None)
    candidates = (
        None if patch is None else processor.tokenizer.convert_tokens_to_ids(patch),
        getattr(processor, "image_token_id", None),
        getattr(config, "image_token_id", None),
        getattr(config, "image_token_index", None),
    )
    return next((number for number in candidates if number is not None), None)


def _modality(image: bool, special: bool) -> str:
    return "image" if image else "special" if special else "text"


def _special_ids(tokenizer) -> frozenset[int]:
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added])


def _spans(found: Mapping[int, Place], count: int) -> list[tuple[int, int]]:
    """First and last position of the tokens of each of `count` pictures; empty when one has none."""
    by_picture: dict[int | None, list[int]] = {}
    for position, place in found.items():
        by_picture.setdefault(place.image_index, []).append(position)
    if sorted(by_picture, key=str) != sorted(range(count), key=str):
        return []
    return [(by_picture[index][0], by_picture[index][-1]) for index in range(count)]
