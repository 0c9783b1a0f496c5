"""What tokens should know of places is what the picture shows, at the words that pick it out."""

import re

import numpy as np
import pytest
import torch

from mllm_demo.training.phrasings import PHRASINGS
from mllm_demo.training.placing import (
    COMPARED,
    EXTREMES,
    FIELDS,
    NOWHERE,
    SIZES,
    UNKNOWN,
    Mark,
    PlaceHead,
    marks,
    place_of,
    places,
    spelled,
)
from mllm_demo.training.scenes import TRAIN, render
from mllm_demo.training.things import Chart, Scene, Thing

IMAGE = np.zeros((200, 200, 3), np.uint8)
DOG = Thing("object", "dog", (20, 40, 90, 120))
RED, BLUE = Thing("shape", "star", (0, 0, 40, 40), "red"), Thing("shape", "star", (100, 100, 200, 200), "blue")
SCENE = Scene(IMAGE, (DOG, RED, BLUE))


def test_a_place_is_the_tens_of_an_answer_in_percent():
    assert place_of(SCENE, DOG.box) == (1, 2, 4, 6, UNKNOWN, UNKNOWN, UNKNOWN)
    assert place_of(SCENE, (0, 0, 199.9, 200), value=3) == (0, 0, 10, 10, 3, UNKNOWN, UNKNOWN)


def test_words_tell_a_place_only_if_they_pick_one_thing_out_and_plurals_tell_how_many():
    found = places(SCENE)
    assert found["dog"] == place_of(SCENE, DOG.box)
    assert found["red star"] == place_of(SCENE, RED.box)
    assert "star" not in found  # there are two
    assert found["stars"] == (*NOWHERE[:5], 2, UNKNOWN) and found["dogs"][5] == 1
    assert found["things"][5] == found["shapes"][5] == 3


def test_labels_tell_their_region_and_value_unless_questions_use_the_word_and_so_do_extremes():
    regions = ((0, 0, 100, 200), (100, 0, 200, 200))
    chart = Chart("bar", ("oak", "value"), (7, 3), (None, None), 10, regions)
    found = places(Scene(IMAGE, (), chart=chart))
    first, second = (0, 0, 5, 10, 7, UNKNOWN), (5, 0, 10, 10, 3, UNKNOWN)
    assert found.pop("oak") == (*first, UNKNOWN)
    first, second = (*first, COMPARED), (*second, COMPARED)
    assert found == {words: first if most is max else second for words, most in EXTREMES.items()}
    made, _ = marks("Which bar has the lowest value?", found)
    assert made == [Mark(24, second)]


@pytest.mark.parametrize("kind, most", [("largest", max), ("smallest", min)])
def test_the_middle_is_asked_at_every_way_of_calling_an_extreme(kind, most):
    calls = [words for words, which in EXTREMES.items() if which is most]
    for question in PHRASINGS[kind]:
        assert re.search(rf"\b({'|'.join(calls)})\b", question.lower()), question


def test_marks_end_with_the_mention_and_precede_every_edge_of_a_box_of_the_last_one():
    text = "The dog is at [10, 20, 45, 60]."
    made, last = marks(text, places(SCENE))
    assert made[0] == Mark(text.index("dog") + 3, places(SCENE)["dog"])
    assert [text[mark.end - 1 : mark.end + 1] for mark in made[1:]] == ["10", "20", "45", "60"]
    assert all(mark.before and mark.place == places(SCENE)["dog"] for mark in made[1:]) and last == made[0].place
    again, _ = marks("[1, 2, 3, 4]", {}, last)
    assert [mark.place for mark in again] == [last] * 4
    assert marks("[1, 2, 3, 4]", places(SCENE))[0] == []  # of nothing that was mentioned


def test_longer_names_win_and_parts_of_words_are_no_mentions():
    made, _ = marks("Is the red star near dogma or hot dogs?", places(SCENE))
    assert [mark.place for mark in made] == [places(SCENE)["red star"], places(SCENE)["dogs"]]


def test_spelled_text_stands_where_its_letters_are(art):
    for index in range(10):
        scene = render(art, TRAIN, 2, index, kind="text")
        text = " ".join(scene.lines)
        told = spelled(scene, text)
        letters = iter(scene.of_kind("letter"))
        for index, (char, place) in enumerate(zip(text, told, strict=True)):
            assert place == (told[index + 1] if char == " " else place_of(scene, next(letters).box))
        assert spelled(scene, "not there at all") == [NOWHERE] * 16


@pytest.mark.parametrize("name", FIELDS)
def test_a_head_that_knows_loses_nothing_and_one_that_does_not_loses_as_much_as_a_guess(name):
    wanted = torch.full((5, len(NOWHERE)), UNKNOWN)
    wanted[:, list(FIELDS[name])] = 1
    wanted[:, -1] = COMPARED if name == "extremes" else UNKNOWN
    head = PlaceHead(8)
    torch.nn.init.zeros_(head.read.weight), torch.nn.init.zeros_(head.read.bias)
    guess = head(torch.randn(5, 8), wanted)
    assert guess[name].item() == pytest.approx(np.log(SIZES[FIELDS[name][0]]), rel=1e-5)
    assert all(loss == 0 for other, loss in guess.items() if other != name)
    with torch.no_grad():
        for start in np.cumsum((0, *SIZES[:-1])):
            head.read.bias[start + 1] = 50.0
    assert head(torch.randn(5, 8), wanted)[name] < 1e-6


def test_no_mark_is_no_loss_and_no_error():
    losses = PlaceHead(8)(torch.zeros(0, 8), torch.zeros(0, len(NOWHERE), dtype=torch.long))
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
