"""Every answer follows from the scene, and scoring is exact: the right thing is said and nothing else."""

import re
from dataclasses import replace

import numpy as np
import pytest

from mllm_demo.training.phrasings import HELD_OUT_PHRASINGS, PHRASINGS, phrasings
from mllm_demo.training.questions import COMPARISONS, TASKS, Question, ask, ask_all
from mllm_demo.training.scoring import box_in, is_right, overlap
from mllm_demo.training.things import PAGE, Chart, Scene, Thing
from mllm_demo.training.wording import CANNOT_TELL

BLANK = np.zeros((200, 200, 3), np.uint8)
BOX = (0.0, 0.0, 10.0, 10.0)


def scene(*things: Thing, lines: tuple[str, ...] = (), chart: Chart | None = None) -> Scene:
    return Scene(BLANK, things, lines, chart, "test")


DOGS = scene(*[Thing("object", "dog", BOX)] * 3)
SHAPES = scene(Thing("shape", "star", (0, 80, 20, 100), "red"), Thing("shape", "circle", (150, 80, 170, 100), "blue"))
WRITTEN = [Thing("letter", char, (20 * i, 100, 20 * i + 20, 140)) for i, char in enumerate("oak42")]
TEXT = scene(*WRITTEN, lines=("oak", "42"))
PAGE_OF_TWO = replace(TEXT, kind=PAGE)
REGION = (0, 0, 1, 1)
BARS = scene(chart=Chart("bar", ("oak", "elm"), (30, 70), ("red", "blue"), 100, (REGION, REGION)))
TABLE = scene(chart=Chart("table", ("oak", "elm"), (30, 70), (None, None), 100, (REGION, REGION)))
ALLOWED = {
    "naming": DOGS, "presence": SHAPES, "counting": DOGS, "colour": SHAPES, "shape": SHAPES, "relations": SHAPES,
    "grounding": SHAPES, "pointing": SHAPES, "reading": TEXT, "chart": BARS, "table": TABLE, "unanswerable": DOGS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "task", "answer"),
    [
        (DOGS, "naming", "These are dogs."),
        (scene(Thing("object", "owl", BOX)), "naming", "This is an owl."),
        (scene(Thing("object", "bread", BOX)), "naming", "This is some bread."),
        (scene(Thing("object", "glasses", BOX)), "naming", "These are some glasses."),
        (TEXT, "reading", 'It says "oak 42".'),
        (TEXT, "naming", 'It says "oak 42".'),
        (BARS, "naming", "This is a bar chart."),
        (BARS, "caption", 'A bar chart of "oak" and "elm".'),
        (DOGS, "caption", "3 dogs."),
        (SHAPES, "caption", "A red star and a blue circle."),
        (scene(Thing("object", "cat", (20, 40, 100, 200))), "grounding", "The cat is at [10, 20, 50, 100]."),
        (DOGS, "unanswerable", CANNOT_TELL),
    ],
)
def test_answers_follow_from_the_scene(shown, task, answer):
    assert ask(np.random.default_rng(0), shown, task).answer == answer


def asked(shown: Scene, task: str, count: int = 80) -> set[Question]:
    return {ask(np.random.default_rng(seed), shown, task) for seed in range(count)} - {None}


def test_a_word_is_asked_for_by_its_box():
    middles = {"oak": 15, "42": 40}  # of 100 percent
    for question in asked(TEXT, "word"):
        left, top, right, bottom = box_in(question.prompt)
        assert abs((left + right) / 2 - middles[question.key]) < 5 and abs((top + bottom) / 2 - 60) < 5
        assert question.answer == f'It says "{question.key}".'
    assert {question.key for question in asked(TEXT, "word")} == set(middles)


def test_a_word_that_stands_there_twice_is_not_asked_for():
    twice = scene(*WRITTEN, *WRITTEN[:3], lines=("oak", "42", "oak"))
    assert {question.key for question in asked(twice, "word")} == {"42"}


def test_a_page_is_too_much_to_be_read_out_but_its_words_are_read():
    assert not asked(PAGE_OF_TWO, "reading") and not asked(PAGE_OF_TWO, "caption")
    questions = ask_all(np.random.default_rng(0), PAGE_OF_TWO, 6)
    assert {question.key for question in questions if question.task == "word"} == {"oak", "42"}


@pytest.mark.parametrize(("shown", "whats"), [(DOGS, {"things"}), (SHAPES, {"things", "shapes"})])
def test_all_things_are_counted_and_shapes_where_there_is_nothing_else(shown, whats):
    count = len(shown.things)
    assert {question.answer for question in asked(shown, "total")} == {f"There are {count} {what}." for what in whats}
    assert not asked(TEXT, "total")


def test_what_follows_from_told_values_is_asked_whatever_is_shown():
    for question in asked(DOGS, "told"):
        told = re.search(r"(\w+) is (\d+) and (\w+) is (\d+)\. ", question.prompt)
        (first, value, second, other), verdict = told.groups(), question.key
        assert verdict == ("yes" if int(value) > int(other) else "no")
        assert question.answer == f"Here {first.lower()} is {value} and {second} is {other}, so {verdict}."
    assert {question.key for question in asked(DOGS, "told")} == {"yes", "no"}


def test_presence_says_yes_only_for_what_is_there():
    replies = asked(SHAPES, "presence")
    for question in replies:
        there = "red star" in question.prompt or "blue circle" in question.prompt
        assert (question.key == "yes") == there
    assert {question.key for question in replies} == {"yes", "no"}


def test_relations_are_seen_from_the_second_thing():
    for question in asked(SHAPES, "relations"):
        first = question.answer.split(" is ")[0]
        assert question.key == ("left" if first == "The red star" else "right")


def test_charts_are_asked_about_what_they_show():
    answers = {question.answer for question in asked(BARS, "chart", 300)}
    expected = {'It is "elm".', 'It is "oak".', "The value is 30.", "It is red."}
    compared = {"Here elm is 70 and oak is 30, so yes.", "Here oak is 30 and elm is 70, so no."}
    assert expected | compared | {"This is a bar chart.", "There are 2 bars."} <= answers
    assert not any("None" in question.prompt + question.answer for question in asked(TABLE, "table", 300))


@pytest.mark.parametrize("task", TASKS)
def test_a_question_that_the_scene_does_not_allow_is_not_asked(task):
    empty = scene()
    assert task == "unanswerable" or ask(np.random.default_rng(0), empty, task) is None
    assert asked(ALLOWED[task], task)


def test_an_opening_before_a_question_changes_nothing_of_its_answer_and_is_only_learned_from():
    opened = {q for q in asked(DOGS, "naming") if q.prompt not in PHRASINGS["naming"]}
    assert opened and {question.answer for question in opened} == {"These are dogs."}
    held_out = {ask(np.random.default_rng(seed), DOGS, "naming", held_out=True).prompt for seed in range(80)}
    assert held_out == set(phrasings("naming", True))


@pytest.mark.parametrize("task", PHRASINGS)
def test_held_out_phrasings_are_never_asked_in_training(task):
    trained, kept = phrasings(task, False), phrasings(task, True)
    assert len(kept) == HELD_OUT_PHRASINGS and len(trained) >= 4 and not set(trained) & set(kept)


@pytest.mark.parametrize("shown", ALLOWED.values(), ids=ALLOWED)
def test_every_answer_scores_as_right_and_no_question_asks_for_the_same_answer_twice(shown):
    for seed in range(20):
        questions = ask_all(np.random.default_rng(seed), shown, 6)
        assert questions and len({(q.task, q.answer) for q in questions}) == len(questions)
        assert len(questions) <= 6 + (COMPARISONS + 1 if shown.chart else 0)
        for question in questions:
            assert question.task == "caption" or is_right(question, question.answer), question


@pytest.mark.parametrize("shown", [BARS, TABLE], ids=["chart", "table"])
def test_every_conversation_about_a_chart_compares(shown):
    for seed in range(20):
        assert any(", so " in question.answer for question in ask_all(np.random.default_rng(seed), shown, 1))


def test_what_describes_a_chart_comes_last_as_its_labels_would_answer_the_rest():
    talks = [[q.task for q in ask_all(np.random.default_rng(seed), BARS, 8)] for seed in range(40)]
    assert {talk.index("caption") - len(talk) for talk in talks if "caption" in talk} == {-1}


@pytest.mark.parametrize(
    ("question", "reply", "right"),
    [
        (Question("naming", "", "", "dog"), "This is a dog.", True),
        (Question("naming", "", "", "dog"), "These are dogs.", True),
        (Question("naming", "", "", "dog"), "A dog or a cat.", False),
        (Question("naming", "", "", "dog"), "", False),
        (Question("naming", "", "", "ice cream"), "It is an ice cream.", True),
        (Question("counting", "", "", "3"), "There are three.", True),
        (Question("counting", "", "", "3"), "There are 3 or 4.", False),
        (Question("colour", "", "", "red"), "The star is red.", True),
        (Question("colour", "", "", "red"), "red and blue", False),
        (Question("presence", "", "", "yes"), "Yes, there is a dog.", True),
        (Question("presence", "", "", "yes"), "There is a dog, yes.", False),
        (Question("chart", "", "", "no"), "Here oak is 30 and elm is 70, so no.", True),
        (Question("chart", "", "", "no"), "No, oak is smaller.", True),
        (Question("chart", "", "", "no"), "Here oak is 30 and elm is 70, so yes.", False),
        (Question("chart", "", "", "no"), "No, or yes.", False),
        (Question("relations", "", "", "left"), "The cat is to the left of the dog.", True),
        (Question("relations", "", "", "left"), "left or right", False),
        (Question("grounding", "", "", "[10, 10, 50, 50]"), "It is at [12, 10, 50, 48].", True),
        (Question("grounding", "", "", "[10, 10, 50, 50]"), "It is at [40, 40, 90, 90].", False),
        (Question("grounding", "", "", "[10, 10, 50, 50]"), "On the left.", False),
        (Question("reading", "", 'It says "oak".', "oak"), 'It says "Oak".', True),
        (Question("reading", "", 'It says "oak".', "oak"), 'It says "oaks".', False),
        (Question("chart", "", "The value is 30.", "30", 5.0), "The value is 34.", True),
        (Question("chart", "", "The value is 30.", "30", 5.0), "The value is 36.", False),
        (Question("table", "", "The value is 30.", "30"), "The value is 31.", False),
        (Question("unanswerable", "", "", CANNOT_TELL), "I can't tell from this image.", True),
        (Question("unanswerable", "", "", CANNOT_TELL), "It is red.", False),
    ],
)
def test_scoring(question, reply, right):
    assert is_right(question, reply) is right


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 10, 20, 20)) == 0
