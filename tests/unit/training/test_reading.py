"""Of a picture only cells of letters are left, where they always stand, and only what is written there is asked for."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mllm_demo.training import reading
from mllm_demo.training.adapted import missed
from mllm_demo.training.conversations import IGNORED, Encoder, Sample
from mllm_demo.training.placing import NOWHERE
from mllm_demo.training.reading import BESIDE, COUNTED, GROUND, MIX, Readings, asked, between, cut, right, together
from mllm_demo.training.scenes import SPLITS, render
from mllm_demo.training.things import PAGE
from tests.unit.training.test_conversations import Processor

IMAGE = 7


def sample(ids: list[int], labels: list[int]) -> Sample:
    places = torch.tensor([NOWHERE] * len(ids))
    return Sample(torch.tensor(ids), torch.tensor(labels), torch.ones(len(ids)), None, places)


def batch_of(labels: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor(labels), "weights": torch.ones(len(labels), len(labels[0]))}


def said(ids: list[int]) -> torch.Tensor:
    return 30.0 * torch.nn.functional.one_hot(torch.tensor(ids), 10).float()


def test_what_is_left_keeps_the_positions_that_it_had():
    whole = sample([1, IMAGE, IMAGE, IMAGE, IMAGE, 2, 3], [IGNORED] * 5 + [3, IGNORED])
    left = cut(whole, torch.tensor([False, True, False, True]), IMAGE, perfect=True)
    assert left.sample.input_ids.tolist() == [1, IMAGE, IMAGE, 2, 3]
    assert left.positions.tolist() == [0, 2, 4, 5, 6]
    assert left.sample.labels.tolist() == [IGNORED] * 3 + [3, IGNORED]
    longer = cut(whole, torch.tensor([True] * 4), IMAGE, perfect=False)
    batch = together([left, longer], pad=0)
    assert batch["position_ids"].shape == batch["input_ids"].shape == (2, 7)
    assert batch["seen"].sum(1).tolist() == [2, 4] and batch["perfect"].tolist() == [True, False]


def test_an_answer_is_right_when_all_its_tokens_are():
    batch = batch_of([[IGNORED, 4, 5, IGNORED, 6], [3, IGNORED, 2, 2, IGNORED]])
    assert right(said([4, 5, 6, 3, 2, 2]), batch) == [True, True, True, True]
    assert right(said([4, 1, 6, 3, 2, 1]), batch) == [False, True, True, False]
    assert missed(said([4, 5, 6, 3, 2, 2]), batch) < 1e-6 < 1 < missed(said([4, 1, 6, 3, 2, 1]), batch)


def test_of_a_page_only_lines_within_the_band_are_asked_for(art):
    page = render(art, SPLITS["train"], 5, 0, kind=PAGE)
    part = between(page, 96, 192)
    letters = part.of_kind("letter")
    assert letters and all(96 <= letter.box[1] and letter.box[3] <= 192 for letter in letters)
    assert "".join(part.lines).replace(" ", "") == "".join(letter.name for letter in letters)
    assert 0 < len(part.lines) < len(page.lines)
    words = {question.key for question in asked(np.random.default_rng(0), part)}
    assert words and words <= set(part.lines)
    assert not asked(np.random.default_rng(0), replace(page, things=(), lines=()))


@pytest.fixture
def readings(art, monkeypatch) -> Readings:
    monkeypatch.setattr(reading.art, "load", lambda folder: art)
    processor = Processor()
    processor.image_processor = lambda image, return_tensors: SimpleNamespace(pixel_values=torch.tensor(image)[None])
    return Readings(Path("nowhere"), "train", 3, 64, Encoder(processor, 144), batch=4)


def test_a_reading_has_an_image_token_for_every_cell_that_is_seen_and_answers_to_learn(readings):
    made = [readings[index] for index in range(24)]
    for left in made:
        tokens = left.sample.input_ids == readings.encoder.processor.image_token_id
        assert 0 < tokens.sum() == left.seen.sum() < 144
        assert (left.sample.labels != IGNORED).sum() > 5
        first = int(tokens.nonzero()[0])
        where = left.positions[tokens] - left.positions[first] + int(left.seen.nonzero()[0])
        assert torch.equal(where, left.seen.nonzero()[:, 0])
        lettered = (left.sample.cells.letters > 0).any(-1)
        assert left.seen[lettered].any() and (lettered | ~left.seen).float().mean() > 0.9  # the rest is by a border
    assert {left.perfect for left in made} == {True, False}


@pytest.mark.parametrize("kind", COUNTED)
def test_where_things_are_counted_their_cells_are_left_and_every_number_is_asked_for_once(readings, kind):
    counted = Readings(Path("nowhere"), "train", 3, 64, readings.encoder, batch=4, mix={kind: 1.0})
    made = [counted[index] for index in range(12)]
    of_things = torch.stack([left.sample.cells.counts >= 0 for left in made])
    seen = torch.stack([left.seen for left in made])
    assert seen[of_things].all() and abs(seen[~of_things].float().mean() - GROUND) < 0.05
    for left in made:
        said = readings.encoder.tokenizer.decode(left.sample.labels[left.sample.labels != IGNORED])
        answers = said.split("<|im_end|>")[:-1]
        assert answers and all(answer.startswith(("There is 1 ", "There are ")) for answer in answers)
        numbers = [answer.split()[2] for answer in answers]
        assert len({*numbers}) == len(numbers) <= 4


def test_beside_stage_three_texts_charts_and_counted_things_share_the_sequences():
    assert sum(BESIDE.values()) == pytest.approx(1) == pytest.approx(sum(MIX.values()))
    assert set(BESIDE) == {*MIX, *COUNTED}


def test_pictures_are_the_same_whenever_a_run_goes_on(readings):
    later = Readings(Path("nowhere"), "train", 3, 60, readings.encoder, batch=4, start=5)
    assert torch.equal(later[0].sample.input_ids, readings[5].sample.input_ids)
    assert torch.equal(later[0].sample.pixels, readings[5].sample.pixels)
