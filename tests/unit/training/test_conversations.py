"""Questions become tokens whose answers are the only labels, and quoted text is spelled a character a token."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_demo.models.bundled.assembly import CHAT_TEMPLATE
from mllm_demo.training import conversations
from mllm_demo.training.concepts import cell_targets
from mllm_demo.training.conversations import (
    AGAIN_WEIGHT,
    COUNT_WEIGHT,
    FIRST_WEIGHT,
    IGNORED,
    TENS_WEIGHT,
    UNITS_WEIGHT,
    VERDICT_WEIGHT,
    Conversations,
    Encoder,
    collate,
)
from mllm_demo.training.placing import COMPARED, UNKNOWN
from mllm_demo.training.questions import Question
from mllm_demo.training.things import Chart, Scene, Thing


class Processor:
    """What an encoder asks of a processor: a byte-level tokenizer that joins letters, and the chat template."""

    def __init__(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        joined = ["oa", "oak", "Ġs", "Ġsa", "Ġsay", "Ġsays", 'Ġ"', '".']
        vocabulary = {token: index for index, token in enumerate([*alphabet, *joined])}
        pairs = [("o", "a"), ("oa", "k"), ("Ġ", "s"), ("Ġs", "a"), ("Ġsa", "y"), ("Ġsay", "s"), ("Ġ", '"'), ('"', ".")]
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<image>"])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<image>")

    def apply_chat_template(self, messages, **kwargs):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Processor(), 4)


TURNS = [("What does it say?", 'It says "oak tree".'), ("Is it oak?", "Yes, oak.")]


def test_the_sequence_is_what_the_chat_template_writes(encoder):
    sample = encoder.encode(TURNS, torch.zeros(3, 2, 2))
    messages = []
    for index, (question, answer) in enumerate(TURNS):
        content = [{"type": "text", "text": question}]
        content = [{"type": "image"}, *content] if index == 0 else content
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    wanted = encoder.processor.apply_chat_template(messages).replace("<image>", "<image>" * 4)
    assert encoder.tokenizer.decode(sample.input_ids) == wanted


def test_labels_are_the_answers_and_their_ends_shifted_by_one(encoder):
    sample = encoder.encode(TURNS, None)
    kept = sample.labels != IGNORED
    said = encoder.tokenizer.decode(sample.labels[kept])
    assert said == 'It says "oak tree".<|im_end|>Yes, oak.<|im_end|>'
    assert torch.equal(sample.labels[:-1][kept[:-1]], sample.input_ids[1:][kept[:-1]])


def test_an_answer_weighs_as_the_root_of_its_length(encoder):
    sample = encoder.encode([("What is it?", "An oak tree."), TURNS[1]], None)
    kept = sample.labels != IGNORED
    assert (sample.weights[~kept] == 0).all()
    ends = (sample.labels == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")).nonzero().flatten()
    starts = kept.nonzero().flatten()[0], ends[0] + 1
    for start, end in zip(starts, ends, strict=True):
        weights = sample.weights[start : end + 1][kept[start : end + 1]]
        assert torch.allclose(weights, weights[0]) and weights.sum() == pytest.approx(len(weights) ** 0.5)


def test_of_what_is_spelled_the_first_character_weighs_more_and_whatever_tells_that_it_goes_on_or_ends(encoder):
    sample = encoder.encode(TURNS, None)
    kept = sample.labels != IGNORED
    tokens = encoder.tokenizer.convert_ids_to_tokens(sample.labels[kept])
    weights = sample.weights[kept] / sample.weights[kept][0]
    answer = tokens.index("<|im_end|>")
    heavy = {i: weights[i].item() for i in range(answer) if weights[i] > 1}
    assert [tokens[i] for i in heavy] == ["o", "Ġ", "e", '".'] and tokens[tokens.index('".') - 2] == "e"
    assert [*heavy.values()] == pytest.approx([FIRST_WEIGHT, *[AGAIN_WEIGHT] * 3])


def test_what_a_comparison_concludes_weighs_most(encoder):
    sample = encoder.encode([("Is oak larger?", "Here oak is 12 and elm is 7, so yes.")], None)
    kept = sample.labels != IGNORED
    tokens = [encoder.tokenizer.decode([one]).strip() for one in sample.labels[kept].tolist()]
    weights = sample.weights[kept] / sample.weights[kept][0]
    heavy = [token for token, weight in zip(tokens, weights.tolist(), strict=True) if weight > 1]
    assert "".join(heavy) == "yes" and weights.max() == pytest.approx(VERDICT_WEIGHT)


@pytest.mark.parametrize(
    ("answer", "heavy"),
    [
        ("There are 4 cats.", " are 4"), ("There is 1 cat.", " is 1"), ("There are no cats.", " are no"),
        ("Yes, there are 4 cats.", ""), ("There is a cat at [1, 2, 3, 4].", ""),
    ],
)  # fmt: skip
def test_of_a_count_the_tokens_that_tell_it_weigh_most(encoder, answer, heavy):
    sample = encoder.encode([("How many cats are there?", answer)], None)
    kept = sample.labels != IGNORED
    weights = sample.weights[kept] / sample.weights[kept][0]
    told = weights.isclose(torch.tensor(COUNT_WEIGHT))
    assert not told.any() if not heavy else encoder.tokenizer.decode(sample.labels[kept][told]) == heavy


def test_first_digits_of_a_box_weigh_most_and_its_units_least_but_not_those_of_a_value(encoder):
    def weights_of(answer: str) -> tuple[list[str], list[float]]:
        sample = encoder.encode([("Where is it?", answer)], None)
        kept = sample.labels != IGNORED
        tokens = [encoder.tokenizer.decode([one]) for one in sample.labels[kept].tolist()]
        return tokens, (sample.weights[kept] * kept.sum() ** 0.5).tolist()

    tokens, weights = weights_of("The cat is at [7, 12, 100, 98].")
    digits = [(token.strip(), round(weight, 3)) for token, weight in zip(tokens, weights, strict=True)]
    assert [pair for pair in digits if pair[0].isdigit()] == [
        ("7", TENS_WEIGHT), ("1", TENS_WEIGHT), ("2", UNITS_WEIGHT), ("1", TENS_WEIGHT), ("0", UNITS_WEIGHT),
        ("0", UNITS_WEIGHT), ("9", TENS_WEIGHT), ("8", UNITS_WEIGHT),
    ]  # fmt: skip
    assert weights_of("The value is 47.")[1] == pytest.approx([1.0] * len(weights_of("The value is 47.")[0]))


def test_answers_that_one_token_tells_weigh_more_and_the_same_token_for_token(encoder, art, monkeypatch):
    turns = [("What is this?", "These are cats."), ("How many?", "There are 3 cats.")]
    more = conversations.TASK_WEIGHTS["counting"]
    plain, weighed = (encoder.encode(turns, None, turn_weights=weights).weights for weights in (None, [1.0, more]))
    factors = (weighed / plain)[plain > 0]
    ends = (plain > 0).nonzero().flatten()
    first = int((ends.diff() > 1).nonzero()[0]) + 1  # labels of the first answer, up to the question between
    assert (factors[:first] == 1).all() and factors[first:].tolist() == pytest.approx([more] * len(factors[first:]))

    asked = [Question("naming", *turns[0], "cat"), Question("counting", *turns[1], "3")]
    pixels = SimpleNamespace(pixel_values=[torch.zeros(3, 2, 2)])
    monkeypatch.setattr(encoder.processor, "image_processor", lambda image, return_tensors: pixels, raising=False)
    monkeypatch.setattr(conversations, "ask_all", lambda rng, scene, most: asked)
    monkeypatch.setattr(conversations.art, "load", lambda folder: art)
    drawn = Conversations(Path("unused"), "train", 0, 1, encoder)[0].weights
    assert torch.equal(drawn[drawn > 0], weighed[weighed > 0])


def test_quoted_text_is_spelled_and_nothing_else(encoder):
    ids = encoder.encode(TURNS, None).input_ids
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    start = tokens.index('Ġ"')
    assert tokens[start + 1 : start + 9] == ["o", "a", "k", "Ġ", "t", "r", "e", "e"]
    assert tokens[start - 1] == "Ġsays" and tokens[start + 9] == '".'
    assert "oak" in tokens  # in the question and the second answer, where it is prose


def test_tokens_know_the_places_of_what_they_mention_and_spell(encoder):
    letters = tuple(Thing("letter", char, (20 * i, 0, 20 * i + 20, 50)) for i, char in enumerate("oaktree"))
    scene = Scene(np.zeros((200, 200, 3), np.uint8), (Thing("object", "oak", (20, 40, 90, 120)), *letters))
    turns = [("Where is the oak?", "The oak is at [10, 20, 45, 60]."), ("Text?", 'It says "oak tree".')]
    sample = encoder.encode(turns, torch.zeros(3, 2, 2), scene)
    assert len(sample.places) == len(sample.input_ids)
    tokens = [encoder.tokenizer.decode([one]) for one in sample.input_ids.tolist()]
    told = [(token, tuple(place[:4])) for token, place in zip(tokens, sample.places.tolist(), strict=True)
            if place[0] != UNKNOWN]  # fmt: skip
    box = (1, 2, 4, 6)
    assert [token for token, place in told[:2]] == ["oak", "oak"] and {place for _, place in told[:6]} == {box}
    starts = [index for index, place in enumerate(sample.places.tolist()) if tuple(place[:4]) == box]
    assert [tokens[index + 1] for index in starts[2:]] == ["1", "2", "4", "6"]  # an edge is known before it is said
    assert [place[0] for _, place in told[6:]] == [0, 1, 2, 3, 3, 4, 5, 6]  # a space is where the next word begins
    assert all(place[2] == place[0] + 1 for _, place in told[6:])
    first = next(i for i, place in enumerate(sample.places.tolist()) if tuple(place[:4]) == told[6][1])
    assert tokens[first + 1] == "o"
    plain = encoder.encode(turns, torch.zeros(3, 2, 2))
    assert torch.equal(plain.input_ids, sample.input_ids) and (plain.places == UNKNOWN).all()


def test_text_alone_is_read_as_it_is_and_has_no_answers(encoder):
    sample = encoder.encode_text('<|im_start|>user\nSay "oak"<|im_end|>')
    tokens = encoder.tokenizer.convert_ids_to_tokens(sample.input_ids)
    assert "oak" in tokens and tokens[0] == "<|im_start|>"
    assert (sample.labels == IGNORED).all()
    assert collate([sample, encoder.encode(TURNS, None)], pad=7)["is_text"].tolist() == [True, False]


REPLY = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nOak"


@pytest.mark.parametrize("rest, said", [("", "Oak"), ("<|im_end|>\n<|im_start|>user\nBye", "Oak<|im_end|>")])
def test_talk_of_something_else_follows_as_the_template_writes_it_and_has_no_answer_to_learn(encoder, rest, said):
    sample = encoder.encode(TURNS, torch.zeros(3, 2, 2))
    longer = encoder.and_then(sample, REPLY + rest)
    first = len(sample.input_ids)
    assert torch.equal(longer.input_ids[:first], sample.input_ids)
    assert torch.equal(longer.input_ids[first:], longer.talk)
    assert encoder.tokenizer.decode(longer.talk) == REPLY[:-3] + said
    assert torch.equal(longer.labels[:first], sample.labels) and (longer.labels[first:] == IGNORED).all()
    assert not longer.weights[first:].any() and len(longer.places) == len(longer.input_ids)


def test_a_batch_knows_which_of_its_rows_end_with_which_talk(encoder):
    plain = encoder.encode(TURNS, torch.zeros(3, 2, 2))
    longer = encoder.and_then(plain, REPLY)
    batch = collate([plain, longer, encoder.encode_text("oak")], pad=7)
    assert batch["talkers"].tolist() == [1] and batch["talk_mask"].all()
    assert torch.equal(batch["talk"][0], longer.talk)
    assert "talk" not in collate([plain, encoder.encode_text("oak")], pad=7)


def test_talk_of_something_else_follows_some_pictures(encoder, art, monkeypatch):
    asked = [Question("naming", "What is this?", "This is a cat.", "cat")]
    pixels = SimpleNamespace(pixel_values=[torch.zeros(3, 2, 2)])
    monkeypatch.setattr(encoder.processor, "image_processor", lambda image, return_tensors: pixels, raising=False)
    monkeypatch.setattr(conversations, "ask_all", lambda rng, scene, most: asked)
    monkeypatch.setattr(conversations.art, "load", lambda folder: art)
    drawn = Conversations(Path("unused"), "train", 0, 60, encoder, texts=("prose",), talk=(REPLY,), text_share=0.0)
    talked = ["Hi!" in encoder.tokenizer.decode(drawn[index].input_ids) for index in range(60)]
    assert 4 <= sum(talked) <= 28


def test_a_picture_that_allows_no_question_gives_way_to_another(encoder, art, monkeypatch):
    tried = []

    def seldom(rng, scene, most):
        tried.append(scene)
        return [Question("naming", "What is this?", "This is a cat.", "cat")] if len(tried) > 2 else []

    pixels = SimpleNamespace(pixel_values=[torch.zeros(3, 2, 2)])
    monkeypatch.setattr(encoder.processor, "image_processor", lambda image, return_tensors: pixels, raising=False)
    monkeypatch.setattr(conversations, "ask_all", seldom)
    monkeypatch.setattr(conversations.art, "load", lambda folder: art)
    sample = Conversations(Path("unused"), "train", 0, 1, encoder)[0]
    assert len(tried) == 3 and sample.input_ids.dtype == torch.int64
    assert "This is a cat." in encoder.tokenizer.decode(sample.input_ids)
    side = math.isqrt(len(encoder.image))
    assert torch.equal(sample.cells.counts, torch.from_numpy(cell_targets(tried[2], side).counts))
    batch = collate([sample, encoder.encode_text("oak")], pad=7)
    assert batch["counts"].shape == (1, side**2) and batch["boxes"].shape == (1, side**2, 4)
    assert "counts" not in collate([encoder.encode_text("oak")], pad=7)


def test_a_batch_is_padded_on_the_right_and_holds_only_the_pictures_there_are(encoder):
    long, short = encoder.encode(TURNS, torch.ones(3, 2, 2)), encoder.encode(TURNS[1:], None)
    batch = collate([long, short], pad=7)
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    rest = len(short.input_ids)
    assert (batch["input_ids"][1, rest:] == 7).all() and (batch["labels"][1, rest:] == IGNORED).all()
    assert (batch["places"][1, rest:] == UNKNOWN).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(long.input_ids), rest]
    assert "pixel_values" not in collate([short], pad=7)


def test_the_label_of_an_extreme_is_asked_for_apart_where_its_first_character_is_said(encoder):
    letters = tuple(Thing("letter", char, (20 * i, 150, 20 * i + 20, 180)) for i, char in enumerate("oakelm"))
    regions = ((0, 0, 60, 150), (60, 0, 120, 150))
    chart = Chart("bar", ("oak", "elm"), (7, 3), ("red", None), 10, regions)
    scene = Scene(np.zeros((200, 200, 3), np.uint8), letters, chart=chart)
    turns = [("Which bar is the lowest?", 'It is "elm".'), ("What is written for the red bar?", 'It is "oak".')]
    sample = encoder.encode(turns, torch.zeros(3, 2, 2), scene)
    tokens = [encoder.tokenizer.decode([one]) for one in sample.input_ids.tolist()]
    told = [
        (token, after, tuple(place[:4]))
        for token, after, place in zip(tokens, tokens[1:], sample.places.tolist(), strict=False)
        if place[-1] == COMPARED
    ]
    word, label = told
    assert word[:2] == ("t", "?") and word[2] == (3, 0, 6, 7)  # the end of "lowest"
    assert label[1] == "e" and label[2] == (3, 7, 4, 9)
