"""Rendered pictures are repeatable, annotated truthfully, and the held-out set shares nothing that it must not."""

import numpy as np
import pytest

from mllm_demo.training import scenes
from mllm_demo.training.concepts import CONCEPTS, cell_targets, concept_of
from mllm_demo.training.words import TEST_WORDS, TRAIN_WORDS


def test_the_same_index_is_the_same_picture_and_another_is_not(art):
    first, again, other = (scenes.render(art, scenes.TRAIN, 0, i) for i in (3, 3, 4))
    assert np.array_equal(first.image, again.image) and first.things == again.things
    assert not np.array_equal(first.image, other.image)


def test_splits_draw_from_different_streams_styles_fonts_and_words(art):
    assert not np.array_equal(
        scenes.render(art, scenes.TRAIN, 0, 3).image, scenes.render(art, scenes.HELD_OUT, 0, 3).image
    )
    assert not set(TRAIN_WORDS) & set(TEST_WORDS)
    assert not set(scenes.TRAIN.fonts) & set(scenes.HELD_OUT.fonts)
    assert not set(scenes.TRAIN.styles) & set(scenes.UNSEEN_STYLE.styles)
    assert "openmoji" not in scenes.TRAIN.styles


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_every_thing_lies_in_the_picture_and_is_really_drawn_there(art, kind):
    for index in range(6):
        scene = scenes.render(art, scenes.TRAIN, 1, index, kind=kind)
        assert scene.things and scene.image.shape == (224, 224, 3) and scene.image.dtype == np.uint8
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert -1 <= x0 < x1 <= 225 and -1 <= y0 < y1 <= 225
            inside = scene.image[int(y0) : int(y1), max(int(x0), 0) : int(x1)]
            assert inside.astype(int).std() > 1  # not bare background


def test_a_shape_has_the_colour_its_label_says(art):
    for index in range(30):
        scene = scenes.render(art, scenes.TRAIN, 2, index, kind="shapes")
        for thing in scene.of_kind("shape"):
            x, y = (int(v) for v in thing.centre)
            drawn = scene.image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
            named = {name: np.abs(np.array(rgb) - drawn).sum() for name, rgb in scenes.COLOURS.items()}
            # Brightness damage moves the tone, never as far as a different colour's.
            assert thing.colour in sorted(named, key=named.get)[:2]


def test_cell_targets_hold_each_thing_once_at_its_centre(art):
    scene = scenes.render(art, scenes.TRAIN, 0, 0, kind="objects")
    centred, covered = cell_targets(scene, 7, 7)
    assert sorted(centred[centred > 0]) == sorted(concept_of(thing) for thing in scene.things)
    thing = scene.things[-1]
    cell = int(thing.centre[1] // 32) * 7 + int(thing.centre[0] // 32)
    assert centred[cell] == concept_of(thing)
    assert (covered > 0).sum() >= (centred > 0).sum() or len(scene.things) > 1
    assert len(set(CONCEPTS)) == len(CONCEPTS)
