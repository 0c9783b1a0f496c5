"""The pieces of a text, put side by side, read as the text does, however its bytes were cut into tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_demo.chat.layouts.pieces import token_texts


def byte_level(merges=()):
    """A byte tokenizer whose `merges` (pairs of pieces in GPT-2's byte alphabet) are tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<|e|>"])


def sentencepiece_like():
    """Words with a leading mark and single bytes for what no word covers, as Llama's tokenizer has them."""
    words = ["<unk>", "\u2581a", "\u2581the", "\u2581cat", "s"] + [f"<0x{byte:02X}>" for byte in range(256)]
    core = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def pieces(tokenizer, text):
    return token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def test_leading_spaces_and_special_tokens_stay():
    tokenizer = byte_level([("\u0120", "h"), ("\u0120h", "i")])
    assert pieces(tokenizer, "a hi hi<|e|>\n b") == ["a", " hi", " hi", "<|e|>", "\n", " ", "b"]


def test_a_word_keeps_its_space_where_the_decoder_strips_the_first():
    tokenizer = sentencepiece_like()
    ids = tokenizer.convert_tokens_to_ids(["\u2581the", "\u2581cat", "s", "<0xE2>", "<0x82>", "<0xAC>"])
    assert token_texts(tokenizer, ids) == [" the", " cat", "s", "\u00b7", "\u00b7", "\u20ac"]


@pytest.mark.parametrize("text", ["\u20ac", "a\U0001f600b", "\u65e5\u672c", "\u00e9\u00e8", "\U0001f600" * 6])
def test_a_split_character_stands_whole_at_its_last_token(text):
    found = pieces(byte_level(), text)
    assert len(found) == len(text.encode())
    assert "".join(piece for piece in found if piece != "\u00b7") == text


def test_a_token_may_end_one_character_and_begin_the_next():
    # The bytes of the euro sign are E2 82 AC; here its last and the next one's first are one token.
    tokenizer = byte_level([("\u00ac", "\u00e2")])
    assert pieces(tokenizer, "\u20ac\u20ac") == ["\u00b7", "\u00b7", "\u00b7", "\u00b7", "\u20ac\u20ac"]


def test_a_space_joined_to_a_first_byte_stays_in_front():
    tokenizer = byte_level([("\u0120", "\u00e2")])
    assert pieces(tokenizer, "a \u20ac") == ["a", " \u00b7", "\u00b7", "\u20ac"]


def test_bytes_that_never_become_a_character_show_the_replacement_sign():
    tokenizer = byte_level()
    euro = tokenizer("\u20ac")["input_ids"]
    a = tokenizer("a")["input_ids"]
    assert token_texts(tokenizer, euro[:2] + a) == ["\ufffd", "\ufffd", "a"]
    assert token_texts(tokenizer, euro[:1] + euro) == ["\ufffd", "\u00b7", "\u00b7", "\u20ac"]


def test_the_beginning_of_a_character_to_come_is_marked():
    tokenizer = byte_level()
    assert token_texts(tokenizer, tokenizer("a\u20ac")["input_ids"][:-1]) == ["a", "\u00b7", "\u00b7"]
    assert token_texts(tokenizer, []) == []
