"""Tokenizers in the three layouts in which MoE-LLaVA's checkpoints carry them; none of their code is run."""

import base64
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from mllm_demo.errors import CheckpointError
from mllm_demo.models.moe_llava.processor import END_OF_ANSWER, IMAGE_TOKEN, load_tokenizer, vocabulary_of

MERGED = (b"in", b"ng", b"ing", b" t", b"th", b" th", b"the", b" the", b"hing", b"tt", b"  ")
RANKS = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *MERGED])}
TOP = len(RANKS)


def ranks_file(folder: Path, name: str) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items())
    (folder / name).write_text("".join(lines), encoding="ascii")
    return folder


def by_rank(word: bytes) -> list[int]:
    """Byte pair encoding as tiktoken does it: always the neighbours whose union has the lowest rank."""
    parts = [word[index : index + 1] for index in range(len(word))]
    while True:
        unions = [(RANKS.get(one + two, TOP), index) for index, (one, two) in enumerate(pairwise(parts))]
        best, index = min(unions, default=(TOP, 0))
        if best == TOP:
            return [RANKS[part] for part in parts]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


@pytest.mark.parametrize(("name", "first"), [("qwen.tiktoken", TOP), ("arcade100k.tiktoken", TOP + 1)])
def test_ranks_are_merged_as_tiktoken_merges_them(tmp_path, name, first):
    words = load_tokenizer(ranks_file(tmp_path, name), "Tiny")
    draw = random.Random(0)
    for _ in range(50):
        text = " ".join("".join(draw.choices("thinge", k=draw.randint(1, 9))) for _ in range(4))
        expected = [number for piece in re.findall(" ?[a-z]+", text) for number in by_rank(piece.encode())]
        assert words(text)["input_ids"] == expected, text
        assert words.decode(expected) == text
    assert words.convert_tokens_to_ids(END_OF_ANSWER) == words.eos_token_id == words.pad_token_id == first
    assert words.convert_tokens_to_ids("<|im_end|>") > first
    assert vocabulary_of(words) == words.convert_tokens_to_ids(IMAGE_TOKEN)
    assert words("a" + END_OF_ANSWER + "b")["input_ids"] == [97, first, 98]
    # An accent that stands apart is joined with its letter, as both originals do.
    apart, joined = "e\N{COMBINING ACUTE ACCENT}", "\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert words(apart)["input_ids"] == words(joined)["input_ids"]


def test_the_layout_of_the_phi_checkpoints(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate([*alphabet, "th", "the", END_OF_ANSWER])}
    described = {
        "tokenizer_class": "CodeGenTokenizer",
        "add_prefix_space": False,
        **{f"{name}_token": END_OF_ANSWER for name in ("bos", "eos", "unk")},
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"  ": 259, "   ": 260}), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    words = load_tokenizer(tmp_path, "Tiny")
    ids = words(f"the {IMAGE_TOKEN}\nx   y{END_OF_ANSWER}")["input_ids"]
    space, line, x, y = (vocab[piece] for piece in ("Ġ", "Ċ", "x", "y"))
    assert ids == [257, space, 261, line, x, 260, y, 258]
    assert (words.pad_token_id, vocabulary_of(words)) == (258, 261)


def test_a_damaged_ranks_file(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("not base64! 0\n")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_tokenizer(tmp_path, "Tiny")
