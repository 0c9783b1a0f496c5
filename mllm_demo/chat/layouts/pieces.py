"""The readable text of each token of a sequence.

It knows nothing of roles, pictures or routing.
"""

from collections.abc import Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
PART = "\N{MIDDLE DOT}"
# Characters have at most 4 bytes; a token may end one and begin another, so a group can be longer.
_LONGEST_GROUP = 8


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """One string per token, leading spaces kept, special tokens as they are written.

    A character whose bytes are spread over several tokens stands whole at its last token; the others show a
    middle dot. Bytes that never become a character stay as U+FFFD.
    """
    anchor = next(iter(tokenizer.encode("a", add_special_tokens=False)[-1:]), None)
    head = [] if anchor is None else [anchor]
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    # Behind another token a word keeps the space in front of it, which decoders strip at the beginning.
    skip = len(_decode(tokenizer, head))
    known: dict[int, str] = dict(added)
    texts: list[str] = []
    group: list[int] = []
    for number in ids:
        if number not in known:
            known[number] = _decode(tokenizer, [*head, number])[skip:]
        texts.append(known[number])
        if BROKEN not in known[number] or number in added:
            group = []
            continue
        group = [*group[1 - _LONGEST_GROUP :], number]
        # Broken bytes may stand before a character, hence the look at shorter and shorter ends of the group.
        for start in range(len(group) - 1):
            whole = _decode(tokenizer, [*head, *group[start:]])[skip:]
            if BROKEN not in whole:
                first = [known[member].replace(BROKEN, "") for member in group[start:-1]]
                texts[start - len(group) :] = [text + PART for text in first] + [
                    whole.removeprefix("".join(first))
                ]
                group = []
                break
    # The answer may still be streaming: these bytes may be the beginning of a character to come.
    for back, number in enumerate(reversed(group), start=1):
        texts[-back] = known[number].replace(BROKEN, "") + PART
    return texts


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
