"""Rendered pictures are repeatable, annotated truthfully, and the held-out set shares nothing that it must not."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from mllm_demo.training import scenes
from mllm_demo.training.art import HELD_OUT_STYLE, OBJECT_NAMES
from mllm_demo.training.concepts import CONCEPTS, UNKNOWN, VALUE_BINS, cell_targets, concept_of
from mllm_demo.training.lettering import CHARACTERS
from mllm_demo.training.restyle import restyled
from mllm_demo.training.things import COLOURS, Chart, Scene, Thing
from mllm_demo.training.words import TEST_WORDS, TRAIN_WORDS, invented

SIZE = scenes.SIZE


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


def test_there_are_thousands_of_words_to_learn_from_all_of_letters_that_a_token_can_show():
    assert len(TRAIN_WORDS) > 5000 and len(set(TRAIN_WORDS)) == len(TRAIN_WORDS)
    assert all(3 <= len(word) <= 8 and set(word) <= set(CHARACTERS) for word in (*TRAIN_WORDS, *TEST_WORDS))


def test_no_drawing_is_shown_in_training_and_in_evaluation(art, monkeypatch):
    """Every object is withheld in one style: training never draws it in that one, evaluation only in that one."""
    monkeypatch.setattr(scenes, "RESTYLED", 0)  # which would change the colour that tells the style
    drawn = {}
    for split in (scenes.TRAIN, scenes.HELD_OUT):
        for style in split.styles:
            monkeypatch.setitem(art.sprites, style, art.sprites[style].copy())
            art.sprites[style][..., 0] = split.styles.index(style)  # red tells the style
        rng = np.random.default_rng(0)
        drawn[split.name] = {
            (name, int(scenes._sprite(rng, art, split, name)[0, 0, 0])) for name in OBJECT_NAMES for _ in range(30)
        }
    withheld = {(name, scenes.TRAIN.styles.index(style)) for name, style in HELD_OUT_STYLE.items()}
    assert drawn["held-out"] == withheld and not drawn["train"] & withheld


def test_only_drawings_to_learn_from_are_redrawn_by_another_hand(art, monkeypatch):
    monkeypatch.setattr(scenes, "RESTYLED", 1)
    blank = np.zeros((4, 4, 4), np.uint8)
    monkeypatch.setattr(scenes, "restyled", lambda rng, sprite: blank)
    rng = np.random.default_rng(0)
    assert scenes._sprite(rng, art, scenes.TRAIN, "dog") is blank
    for split in (scenes.HELD_OUT, scenes.UNSEEN_STYLE):
        assert np.array_equal(scenes._sprite(rng, art, split, "dog"), art.sprites["noto"][OBJECT_NAMES.index("dog")])


def test_a_redrawn_thing_keeps_its_form_whatever_the_hand(art):
    sprite = art.sprites["noto"][0]
    rng, drawn = np.random.default_rng(0), set()
    for _ in range(30):
        made = restyled(rng, sprite)
        there, before = made[..., 3] > 127, sprite[..., 3] > 127
        assert made.shape == sprite.shape and (there & before).sum() / (there | before).sum() > 0.9
        drawn.add(made.tobytes())
    assert len(drawn) > 15


def test_only_texts_to_learn_from_are_written_small(art, monkeypatch):
    monkeypatch.setattr(scenes, "SMALL", 1)

    def tallest(split: scenes.Split) -> float:
        drawn = [scenes.render(art, split, 0, i, kind="text").of_kind("letter") for i in range(12)]
        return max(letter.box[3] - letter.box[1] for letters in drawn for letter in letters) / SIZE

    assert tallest(scenes.TRAIN) <= scenes.SMALL_HEIGHTS[1] < tallest(scenes.HELD_OUT)


def test_a_page_is_small_words_all_over_and_no_kind_that_is_drawn_unasked(art):
    assert scenes.PAGE not in scenes.KINDS
    for index in range(4):
        letters = scenes.render(art, scenes.TRAIN, 4, index, kind=scenes.PAGE).of_kind("letter")
        heights, rows = zip(*((thing.box[3] - thing.box[1], thing.centre[1] / SIZE) for thing in letters), strict=True)
        assert len(letters) > 100 and max(heights) / SIZE <= scenes.PAGE_HEIGHTS[1]
        assert np.histogram(rows, 5, (0, 1))[0].min() > 5


def test_a_crowd_shows_several_of_one_kind_beside_another_and_only_where_it_is_asked_for(art):
    assert scenes.CROWD not in scenes.KINDS
    pictures = [scenes.render(art, scenes.TRAIN, 4, index, kind=scenes.CROWD).things for index in range(40)]
    names = [Counter(thing.name for thing in things) for things in pictures]
    assert all(max(counted.values()) > 1 and len(counted) <= 2 for counted in names)
    assert sum(len(counted) == 2 for counted in names) > 20
    assert {things[0].kind for things in pictures} == {"object", "shape"}


def test_a_kind_of_scene_that_there_is_not_is_said_to_be_none(art):
    with pytest.raises(ValueError, match="'crowds'.*crowd, page"):
        scenes.render(art, scenes.TRAIN, 4, 0, kind="crowds")


def test_invented_words_are_never_words_of_the_evaluation():
    rng = np.random.default_rng(0)
    made = {invented(rng) for _ in range(2000)}
    assert len(made) > 1500 and not made & set(TEST_WORDS)
    assert all(3 <= len(word) <= 8 for word in made)


@pytest.mark.parametrize("kind", (*scenes.KINDS, scenes.CROWD, scenes.PAGE))
def test_every_thing_lies_in_the_picture_and_is_really_drawn_there(art, kind):
    for index in range(6):
        scene = scenes.render(art, scenes.TRAIN, 1, index, kind=kind)
        assert scene.things and scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert -SIZE * 0.06 <= x0 < x1 <= SIZE * 1.06 and -SIZE * 0.06 <= y0 < y1 <= SIZE * 1.06
            inside = scene.image[max(int(y0), 0) : int(y1) + 1, max(int(x0), 0) : int(x1) + 1]
            assert inside.astype(int).std() > 1  # not bare background


def test_a_shape_has_the_colour_its_label_says(art):
    for index in range(30):
        scene = scenes.render(art, scenes.TRAIN, 2, index, kind="shapes")
        for thing in scene.of_kind("shape"):
            x, y = (int(v) for v in thing.centre)
            drawn = scene.image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
            named = {name: np.abs(np.array(rgb) - drawn).sum() for name, rgb in COLOURS.items()}
            # Brightness damage moves the tone, never as far as a different colour's.
            assert thing.colour in sorted(named, key=named.get)[:2]


def test_the_bars_of_a_chart_are_as_high_as_their_values(art):
    for index in range(20):
        scene = scenes.render(art, scenes.TRAIN, 3, index, kind="chart", chart="bar")
        heights = [part.box[3] - part.box[1] for part in scene.of_kind("part")]
        assert len(heights) == len(scene.chart.values) == len(scene.chart.labels)
        assert np.array_equal(np.argsort(heights), np.argsort(scene.chart.values))
        shares = np.array(heights) / np.array(scene.chart.values)
        assert shares.std() / shares.mean() < 0.1  # one scale for all, to a pixel or two
        assert set(scene.chart.labels) <= set(scene.lines)


def test_axes_end_anywhere_in_training_and_where_they_always_did_in_the_held_out_set(art):
    ends = {
        split.name: [scenes.render(art, split, 5, i, kind="chart", chart="bar").chart for i in range(30)]
        for split in (scenes.TRAIN, scenes.HELD_OUT)
    }
    assert {chart.top for chart in ends["held-out"]} == {10, 100}
    assert len({chart.top for chart in ends["train"]}) > 6
    assert all(0 < max(chart.values) <= chart.top for chart in ends["train"])


def test_a_chart_is_the_same_in_every_process():
    """Sets of strings are ordered by a seed of the process; a picture must not be."""
    program = (
        "import numpy as np, hashlib; from PIL import Image, ImageFont\n"
        "from mllm_demo.training.charts import draw_chart\n"
        "font, words = ImageFont.load_default(20).font_bytes, ('pear', 'oak', 'rail', 'moon', 'cup', 'sun', 'tree')\n"
        "for seed in range(6):\n"
        "    canvas = Image.new('RGB', (192, 192), 'white')\n"
        "    draw_chart(np.random.default_rng(seed), canvas, font, (0, 0, 0), words, 'bar', seed % 2 == 0)\n"
        "    print(hashlib.sha256(canvas.tobytes()).hexdigest())\n"
    )
    drawn = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(drawn) == 1 and drawn.pop().count(b"\n") == 6


@pytest.mark.parametrize("chart", ["line", "pie", "table"])
def test_other_charts_hold_their_labels_values_and_parts(art, chart):
    for index in range(10):
        scene = scenes.render(art, scenes.TRAIN, 4, index, kind="chart", chart=chart)
        assert scene.chart.kind == chart and len(scene.chart.regions) == len(scene.chart.values)
        assert all(any(line.startswith(label) for line in scene.lines) for label in scene.chart.labels)
        assert chart != "pie" or sum(scene.chart.values) == 100
        assert chart != "table" or {str(value) for value in scene.chart.values} <= set(scene.lines)


def test_cell_targets_hold_each_thing_once_at_its_centre():
    things = (Thing("object", "dog", (0, 0, 60, 60)), Thing("shape", "star", (64, 64, 96, 96), "red"))
    target = cell_targets(Scene(np.zeros((96, 96, 3), np.uint8), things), 3)
    assert [int(v) for v in target.centred[[0, 8]]] == [concept_of(thing) for thing in things]
    assert (target.centred > 0).sum() == 2
    assert target.covered.reshape(3, 3)[:2, :2].tolist() == [[concept_of(things[0])] * 2] * 2
    assert target.boxes[8].tolist() == pytest.approx([2 / 3, 2 / 3, 1, 1]) and np.isnan(target.boxes[1]).all()
    assert len(set(CONCEPTS)) == len(CONCEPTS)


def test_cell_targets_read_letters_from_left_to_right_and_know_the_value_of_their_bar():
    letters = tuple(Thing("letter", c, (x, 70, x + 8, 80)) for c, x in (("b", 12), ("a", 2), ("z", 70)))
    chart = Chart("bar", ("ab", "z"), (50, 100), ("red", None), 100, ((0, 0, 32, 96), (64, 0, 96, 96)))
    target = cell_targets(Scene(np.zeros((96, 96, 3), np.uint8), letters, ("ab", "z"), chart), 3)
    read = ["".join(CHARACTERS[i - 1] for i in row if i) for row in target.letters]
    assert read == [""] * 6 + ["ab", "", "z"]
    # One letter looks like itself; two together have no word of their own.
    assert target.centred[6] == UNKNOWN and target.centred[8] == concept_of(letters[2])
    assert target.values.reshape(3, 3).tolist() == [[(VALUE_BINS - 1) // 2, UNKNOWN, VALUE_BINS - 1]] * 3
    assert target.colours.reshape(3, 3).tolist() == [[0, UNKNOWN, UNKNOWN]] * 3
