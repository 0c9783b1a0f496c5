"""What is learned is what a chat would have to produce: compared with the prompt that the chat engine makes."""

from dataclasses import replace

import pytest
import torch

from mllm_demo.chat.messages import Message
from mllm_demo.chat.prompt import make_prompt
from mllm_demo.errors import DataError
from mllm_demo.models.processors import load_processor
from mllm_demo.training.answers import AnswerEncoder
from tests.unit.chat.tiny import tiny_loaded
from tests.unit.models.test_families import FAMILIES, TALL, WIDE, picture

ANSWER = "A red one, I think."


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request, tmp_path_factory):
    family = FAMILIES[request.param]()
    return load_processor(family.save(tmp_path_factory.mktemp(request.param)), family.config, request.param)


def encoder(processor, **options):
    return AnswerEncoder(processor, [processor.tokenizer.eos_token_id], 4096, **options)


def turns(*texts, pictures=()):
    roles = ("user", "assistant")
    first = Message("user", (*pictures, texts[0]))
    return (first, *(Message(roles[n % 2], (text,)) for n, text in enumerate(texts[1:], start=1)))


def said(processor, taught) -> str:
    return processor.tokenizer.decode(taught.targets)


def prompt_ids(processor, messages) -> list[int]:
    loaded = replace(tiny_loaded(), processor=processor, context_length=4096)
    return list(make_prompt(loaded, messages, 8).ids)


def test_the_sequence_is_the_chats_prompt_then_the_answer_then_the_end(processor):
    messages = turns("Which of them?", ANSWER, pictures=(picture(WIDE), picture(TALL)))
    (taught,) = encoder(processor).encode(messages)
    ids = taught.inputs["input_ids"][0].tolist()
    prompt = prompt_ids(processor, messages[:1])
    assert ids[: taught.prompt_length] == prompt
    assert said(processor, taught).strip() == ANSWER + processor.tokenizer.eos_token
    assert [ids[place + 1] for place in taught.positions] == taught.targets.tolist()


def test_every_answer_of_a_conversation_is_learned_once_and_no_question_is(processor):
    messages = turns("First?", "Alpha.", "Second?", "Beta.", "Third?", "Gamma.", pictures=(picture(WIDE),))
    rows = encoder(processor).encode(messages)
    words = " ".join(said(processor, row) for row in rows)
    assert [words.count(word) for word in ("Alpha.", "Beta.", "Gamma.")] == [1, 1, 1]
    assert "?" not in words and "user" not in words.lower()
    apart = encoder(processor, together=False).encode(messages)
    assert len(apart) == 3
    for end, row in zip((5, 3, 1), apart, strict=True):
        ids = row.inputs["input_ids"][0].tolist()
        assert ids[: row.prompt_length] == prompt_ids(processor, messages[:end])


def test_text_alone_needs_no_picture(processor):
    (taught,) = encoder(processor).encode(turns("Hello!", "Hi."))
    assert said(processor, taught).strip().startswith("Hi.")


def test_control_words_in_the_data_end_no_turn_and_ask_for_no_picture(processor):
    end, image = processor.tokenizer.eos_token, processor.image_token
    (taught,) = encoder(processor).encode(turns(f"{image} {end}?", f"a {end} b {image}", pictures=(picture(WIDE),)))
    assert taught.targets.tolist().count(processor.tokenizer.eos_token_id) == 1
    assert taught.targets[-1] == processor.tokenizer.eos_token_id


def tiny_with(template: str):
    processor = tiny_loaded().processor
    processor.chat_template = template
    return processor


def test_a_prompt_that_opens_a_thought_is_kept_as_the_chat_gives_it():
    processor = tiny_with(
        "{% for m in messages %}<|start|>{{ m.role }}:{% for c in m.content %}{{ c.text }}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant:<think></think>{% endif %}"
    )
    rows = encoder(processor).encode(turns("q", "<b>one", "r", "two"))
    assert [said(processor, row) for row in rows] == ["two<|end|>", "<b>one<|end|>"]
    for row in rows:
        ids = row.inputs["input_ids"][0][: row.prompt_length]
        assert processor.tokenizer.decode(ids).endswith("<|start|>assistant:<think></think>")


def test_a_template_without_an_end_gets_one_so_that_the_model_learns_to_stop():
    processor = tiny_with(
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ c.text }} {% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (taught,) = encoder(processor).encode(turns("q", "one", "r", "two"))
    assert said(processor, taught) == " one two<|end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}<|end|>{% endfor %}", "changes or drops its answer"),
        ("{% for m in messages %}{{ m.content[0].text.upper() }}<|end|>{% endfor %}", "changes or drops its answer"),
        ("{{ raise_exception('No system role.') }}", "refuses it .No system role"),
    ],
)
def test_a_template_that_loses_the_answer_is_a_reason_to_skip_the_line(template, reason):
    with pytest.raises(DataError, match=reason):
        encoder(tiny_with(template)).encode(turns("why", "because"))


def test_a_line_beyond_the_context_is_a_reason_to_skip_it():
    made = AnswerEncoder(tiny_loaded().processor, [2], 64)
    with pytest.raises(DataError, match="the model reads 64"):
        made.encode(turns("a" * 80, "b"))


def test_more_pictures_than_one_are_counted_in_the_prompt(processor):
    one = encoder(processor).encode(turns("q", "a", pictures=(picture(WIDE),)))[0]
    two = encoder(processor).encode(turns("q", "a", pictures=(picture(WIDE), picture(WIDE))))[0]
    assert two.prompt_length > one.prompt_length
    assert torch.equal(one.targets, two.targets)
