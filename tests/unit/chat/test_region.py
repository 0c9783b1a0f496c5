"""A choice for the whole sequence looks at the first turn of the user, found by the template's own tokens."""

from types import SimpleNamespace

import pytest
import torch

from mllm_demo.chat.messages import Message
from mllm_demo.chat.prompt import make_prompt
from mllm_demo.chat.region import first_user_turn, markers, routed_region
from mllm_demo.errors import CheckpointError
from mllm_demo.models import loading
from mllm_demo.settings import ModelChoice
from tests.unit.chat.tiny import tiny_loaded
from tests.unit.models import tiny_awaker
from tests.unit.models.test_families import picture

SMALL = picture((30, 20))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> loading.LoadedModel:
    """An Awaker model as it loads from the original's files."""
    folder = tiny_awaker.save(tmp_path_factory.mktemp("region") / "Awaker")
    choice = ModelChoice(str(folder), None, "none", "cpu")
    return loading.load(choice, tmp_path_factory.mktemp("cache"), lambda step: None)


def region(loaded, *messages: Message) -> str:
    """The text of the region; a picture's tokens are <|image_pad|>."""
    prompt = make_prompt(loaded, messages, 8)
    ids = prompt.inputs["input_ids"]
    mask = first_user_turn(ids, markers(loaded.processor, loaded.model.config, prompt.messages))
    text = loaded.processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=False)
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return text


def user(*content) -> Message:
    return Message("user", content)


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
ANSWER = Message("assistant", ("Yes.",))


def test_text_begins_two_tokens_after_the_turn(loaded):
    # The header "user" is one token in the published tokenizer and four here; two are counted, as in the original.
    assert region(loaded, user("Hello?")) == "ser\nHello?"


def test_a_picture_begins_the_region_and_text_before_it_is_outside(loaded):
    assert region(loaded, user("First ", SMALL, "then what?")) == f"{PICTURE}then what?"
    assert region(loaded, user(SMALL, " or ", SMALL, "?")) == f"{PICTURE} or {PICTURE}?"


def test_later_turns_do_not_count(loaded):
    assert region(loaded, user(SMALL, "Is it?"), ANSWER, user("Really?")) == f"{PICTURE}Is it?"


def test_a_picture_in_a_later_turn_only(loaded):
    """Here the original fails: its region would end before it begins."""
    assert region(loaded, user("Hi"), ANSWER, user(SMALL, "And?")) == "ser\nHi"


def test_a_system_message_takes_the_place_of_the_templates_own(loaded):
    assert region(loaded, Message("system", ("Be brief.",)), user("Hi")) == "ser\nHi"


def test_typed_control_tokens_do_not_end_the_turn(loaded):
    assert region(loaded, user("a <|im_end|> b")) == "ser\na < |im_end|> b"


def test_padded_rows_and_tokens_after_them(loaded):
    prompts = [make_prompt(loaded, (user(*content),), 8).ids for content in ((SMALL, "x"), ("Hello there?",))]
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
    marks = markers(loaded.processor, loaded.model.config, (user("x"),))
    mask = first_user_turn(rows, marks)
    for row, ids, found in zip(rows, prompts, mask, strict=True):
        alone = first_user_turn(torch.tensor([ids]), marks)[0]
        assert torch.equal(row[found.bool()], torch.tensor(ids)[alone.bool()])


def test_a_template_without_a_token_for_each_end_of_a_turn_is_refused(loaded):
    processor = SimpleNamespace(
        tokenizer=loaded.processor.tokenizer, apply_chat_template=lambda messages, **options: "x" * len(messages)
    )
    with pytest.raises(CheckpointError, match="does not mark where a turn begins and ends"):
        markers(processor, loaded.model.config, (user("Hi"),))


def test_other_adapters_are_told_nothing(loaded):
    other = tiny_loaded(routed=True)
    prompt = make_prompt(other, (user("Hi"),), 8)
    with routed_region(other, prompt):
        assert other.model.base_model._state.given == {}
    prompt = make_prompt(loaded, (user("Hi"),), 8)
    with routed_region(loaded, prompt):
        assert set(loaded.model.base_model._state.given) == {"prompt_mask"}
    assert loaded.model.base_model._state.given == {}


@torch.no_grad()
def test_without_its_region_the_adapter_says_what_is_missing_and_switched_off_it_needs_none(loaded):
    inputs = make_prompt(loaded, (user(SMALL, "Hi"),), 8).inputs
    with pytest.raises(RuntimeError, match="pass prompt_mask to routing_context"):
        loaded.model(**inputs)
    with loaded.model.disable_adapter():
        bare = loaded.model(**inputs).logits
        tokens = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.isfinite(bare).all() and tokens.shape[1] == inputs["input_ids"].shape[1] + 3
