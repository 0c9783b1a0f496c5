"""Instructions are judged by what the reply holds, and none of them is among what training reads."""

import re

from mllm_demo.training.language import INSTRUCTIONS, followed
from mllm_demo.training.small_talk import BESIDES, PROMPTS


def test_replies_are_right_by_what_they_hold():
    said = [""] * len(INSTRUCTIONS)
    said[0], said[1] = "It is Rome, of course.", "The capital of Japan is Kyoto."
    assert followed(said) == [True] + [False] * (len(INSTRUCTIONS) - 1)


def test_no_instruction_gives_its_answer_away_or_is_trained_on():
    assert not {prompt for prompt, _ in INSTRUCTIONS} & set(PROMPTS + BESIDES)
    given_away = [prompt for prompt, wanted in INSTRUCTIONS if re.search(wanted, prompt.lower())]
    assert given_away == ["Is the sun a star or a planet?", "Is a whale a fish or a mammal?"]  # choices between two
