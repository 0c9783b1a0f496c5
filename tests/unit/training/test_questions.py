"""Every answer follows from the scene, and scoring is exact: the right thing is said and nothing else."""

import numpy as np
import pytest

from mllm_demo.training.questions import HELD_OUT_PHRASINGS, PHRASINGS, TASKS, Question, ask, ask_all, is_right
from mllm_demo.training.scenes import Scene, Thing

BLANK = np.zeros((224, 224, 3), np.uint8)
BOX = (0.0, 0.0, 10.0, 10.0)


def scene(*things: Thing, word: str | None = None) -> Scene:
    return Scene(BLANK, things, word, "test")


DOGS = scene(*[Thing("object", "dog", BOX)] * 3)
SHAPES = scene(Thing("shape", "star", BOX, "red"), Thing("shape", "circle", BOX, "blue"))
WORD = scene(Thing("letter", "O", BOX), word="oak")


@pytest.mark.parametrize(
    ("shown", "task", "answer"),
    [
        (DOGS, "naming", "These are dogs."),
        (scene(Thing("object", "owl", BOX)), "naming", "This is an owl."),
        (WORD, "reading", "The letters O A K spell oak."),
        (DOGS, "caption", "3 dogs."),
        (SHAPES, "caption", "A red star and a blue circle."),
    ],
)
def test_answers_follow_from_the_scene(shown, task, answer):
    assert ask(np.random.default_rng(0), shown, task).answer == answer


def test_presence_says_yes_only_for_what_is_there():
    replies = {ask(np.random.default_rng(seed), SHAPES, "presence") for seed in range(60)}
    for question in replies:
        there = "red star" in question.prompt or "blue circle" in question.prompt
        assert (question.key == "yes") == there
    assert {question.key for question in replies} == {"yes", "no"}


def test_a_question_that_the_scene_does_not_allow_is_not_asked():
    rng = np.random.default_rng(0)
    assert ask(rng, DOGS, "colour") is None and ask(rng, WORD, "counting") is None and ask(rng, DOGS, "reading") is None


def test_held_out_phrasings_are_never_asked_in_training():
    for task in TASKS:
        shown = {"reading": WORD, "colour": SHAPES, "shape": SHAPES}.get(task, DOGS)
        asked = {ask(np.random.default_rng(s), shown, task).prompt.split()[0] for s in range(40)}
        kept = {ask(np.random.default_rng(s), shown, task, held_out=True).prompt for s in range(40)}
        trained = {ask(np.random.default_rng(s), shown, task).prompt for s in range(200)}
        assert asked and not kept & trained
        assert len(PHRASINGS[task]) > HELD_OUT_PHRASINGS


@pytest.mark.parametrize("shown", [DOGS, SHAPES, WORD])
def test_every_answer_scores_as_right_and_the_questions_differ(shown):
    questions = ask_all(np.random.default_rng(1), shown, 6)
    assert len({question.prompt for question in questions}) == len(questions)
    for question in questions:
        assert question.task == "caption" or is_right(question, question.answer)


@pytest.mark.parametrize(
    ("task", "key", "reply", "right"),
    [
        ("naming", "dog", "This is a dog.", True),
        ("naming", "dog", "These are dogs.", True),
        ("naming", "dog", "A dog or a cat.", False),
        ("naming", "dog", "", False),
        ("counting", "3", "There are three.", True),
        ("counting", "3", "There are 3 or 4.", False),
        ("colour", "red", "The star is red.", True),
        ("colour", "red", "red and blue", False),
        ("presence", "yes", "Yes, there is a dog.", True),
        ("presence", "yes", "There is a dog, yes.", False),
        ("reading", "oak", "The letters O A K spell oak.", True),
        ("reading", "oak", "The letters O A K spell oat.", False),
    ],
)
def test_scoring(task, key, reply, right):
    assert is_right(Question(task, "", "", key), reply) is right
