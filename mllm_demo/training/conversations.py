"""Turns scenes and questions into token sequences whose answers are the only labels.

Text that an answer quotes from the picture is written character by character, one token each, so that a word nobody
ever trained on can be read: it decodes to the same words. Tokens that should know a place (see `placing`) carry it. It
knows nothing of optimizers; the text between the words is the processor's own chat template, taken apart.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mllm_demo.training import art
from mllm_demo.training.concepts import CellTargets, cell_targets
from mllm_demo.training.placing import COMPARED, NOWHERE, UNKNOWN, Mark, Place, compared, marks, places, spelled
from mllm_demo.training.questions import Question, ask_all
from mllm_demo.training.replies import turn
from mllm_demo.training.scenes import SPLITS, render
from mllm_demo.training.things import CROWD, PAGE, Scene

TALKED = 0.3  # how often talk of something else follows on a picture
IGNORED = -100  # the label that torch's cross entropy skips
QUOTE = '"'
BOX = "["  # where a box begins
TENS_WEIGHT, UNITS_WEIGHT = 4.0, 0.25
FIRST_WEIGHT = 3.0  # of the first character that is spelled: it tells which text is meant, and the others follow
# Of a space that is spelled, of the end of a text with spaces, and of a character that is said again: only there is it
# asked whether a text goes on. The end's weight did not change how many texts are begun anew when they are over.
AGAIN_WEIGHT = 3.0
VERDICT_WEIGHT, COUNT_WEIGHT = 6.0, 3.0
# What these find after their first words tells all that was asked: the verdict; whether there is one, none or how many.
TELLING = (
    (re.compile(r", so(.*?)\.?$"), VERDICT_WEIGHT),
    (re.compile(r"^There( (?:is|are) (?:no|\d+))\b"), COUNT_WEIGHT),
)
# How often each kind of picture is talked about.
MIX = {
    "single": 0.06, "same": 0.16, CROWD: 0.11, "objects": 0.09, "shapes": 0.09, "mixed": 0.02, "text": 0.17,
    "chart": 0.25, PAGE: 0.05,
}  # fmt: skip
# Answers of which one token tells everything weigh more: elsewhere it is outnumbered.
TASK_WEIGHTS = {"counting": 2.0, "total": 2.0, "reading": 1.5, "word": 1.5, "chart": 2.0, "table": 1.5, "told": 1.5}


@dataclass(frozen=True)
class Sample:
    """`input_ids`, `labels`: int64 `[T]`, labels already at the positions that predict them; `weights`: float32 `[T]`
    of the labels; `pixels` or None; `places`: int64 `[T, 7]`, what each token should know (`placing.SIZES`
    and whether by comparing).

    `is_text`: the language model's own text, without labels, at which its speech is to be kept; `cells`: what the
    picture's image tokens should tell, None where nobody asks; `talk`: int64 `[L]`, the last L of the `input_ids`, at
    which the language model's speech is to be kept as if nothing stood before them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor | None
    places: torch.Tensor
    is_text: bool = False
    cells: CellTargets | None = None
    talk: torch.Tensor | None = None


class Encoder:
    """Makes samples with one processor."""

    def __init__(self, processor, image_tokens: int):
        self.processor, tokenizer = processor, processor.tokenizer
        self.tokenizer = tokenizer
        # What the template puts before a question, between it and its answer, and after the answer.
        marks = ("QUESTION", "ANSWER")
        text = processor.apply_chat_template([turn("user", marks[0]), turn("assistant", marks[1])])
        before, rest = text.split(marks[0])
        between, after = rest.split(marks[1])
        self._ids = lru_cache(maxsize=4096)(self._tokenize)
        self.before, self.between = self._ids(before), self._ids(between)
        end = self._ids(after)
        self._digits = {self._ids(digit)[0] for digit in "0123456789"}
        self.end, self.after = end[:1], end[1:]
        self.image = [processor.image_token_id] * image_tokens

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _read(self, text: str, noted: list[Mark]) -> tuple[list[int], list[Place]]:
        """Token ids of a text, and what each of them should know of `noted` marks."""
        if not noted:
            ids = self._ids(text)
            return list(ids), [NOWHERE] * len(ids)
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, known = [start for start, _ in read.offset_mapping], [NOWHERE] * len(read.input_ids)
        for mark in noted:
            index = bisect_right(starts, mark.end - 1) - 1 - mark.before
            if index >= 0:
                known[index] = mark.place
        return read.input_ids, known

    def _answer(
        self, text: str, noted: list[Mark], scene: Scene | None, picked: bool
    ) -> tuple[list[int], list[Place]]:
        """Token ids of an answer, quoted parts one character a token, and what each should know; `picked`: what it
        quotes was asked for by comparing."""
        ids: list[int] = []
        known: list[Place] = []
        start = 0
        for index, piece in enumerate(text.split(QUOTE)):
            # The marks stay with the prose around them, where the tokenizer joins them to its space or full stop.
            prose = (QUOTE if index else "") + piece + (QUOTE if index < text.count(QUOTE) else "")
            if index % 2 == 1:
                ids += [self._ids(char)[0] for char in piece]
                if scene is not None and piece:  # a character is predicted, and its place known, one token earlier
                    first, *rest = spelled(scene, piece)
                    known[-1:] = [compared(first) if picked and first != NOWHERE else first, *rest]
                    known.append(NOWHERE)
                else:
                    known += [NOWHERE] * len(piece)
            else:
                begins = start - (index > 0)
                inside = [replace(m, end=m.end - begins) for m in noted if begins < m.end <= begins + len(prose)]
                read, told = self._read(prose, inside)
                ids, known = ids + read, known + told
            start += len(piece) + 1
        return ids, known

    def _weights(self, answer: str, reply: list[int]) -> list[float]:
        """Between every answer and every token weighing alike: one over the root of an answer's length. Of a box's
        edges, the first digits are all there is to learn, and the units beyond what the picture tells."""
        weights = [len(reply) ** -0.5] * len(reply)
        if answer.count(QUOTE) > 1:
            first = len(self._ids(answer[: answer.index(QUOTE) + 1]))
            weights[first] *= FIRST_WEIGHT
            text = answer.split(QUOTE)[1]
            for index, (before, char) in enumerate(pairwise(text), start=first + 1):
                weights[index] *= AGAIN_WEIGHT if char in (" ", before) else 1.0
            if " " in text:
                weights[first + len(text)] *= AGAIN_WEIGHT
        for pattern, weight in TELLING:
            if told := pattern.search(answer):
                for index in range(*(len(self._ids(answer[:end])) for end in told.span(1))):
                    weights[index] *= weight
        if BOX in answer:
            for index, (before, token) in enumerate(pairwise(reply), start=1):
                if token in self._digits:
                    weights[index] *= UNITS_WEIGHT if before in self._digits else TENS_WEIGHT
        return weights

    def encode_text(self, text: str) -> Sample:
        """Text as it is, markup included."""
        ids = torch.tensor(self._tokenize(text))
        known = torch.tensor([NOWHERE] * len(ids))
        return Sample(ids, torch.full_like(ids, IGNORED), torch.zeros(len(ids)), None, known, is_text=True)

    def and_then(self, sample: Sample, text: str) -> Sample:
        """`sample` and the first question and answer of `text`, markup included, as what is said next."""
        ids = self._tokenize(text)
        start = ids.index(self.end[0]) + len(self.between)
        ids = ids[: 1 + next((i for i, token in enumerate(ids) if i >= start and token == self.end[0]), len(ids))]
        talk = torch.tensor(ids)
        return replace(
            sample, input_ids=torch.cat((sample.input_ids, talk)), talk=talk,
            labels=torch.cat((sample.labels, torch.full_like(talk, IGNORED))),
            weights=torch.cat((sample.weights, torch.zeros(len(ids)))),
            places=torch.cat((sample.places, torch.tensor([NOWHERE] * len(ids)))),
        )  # fmt: skip

    def encode(
        self,
        turns: list[tuple[str, str]],
        pixels: torch.Tensor | None,
        scene: Scene | None = None,
        turn_weights: list[float] | None = None,
    ) -> Sample:
        """`turns`: (question, answer) pairs about one picture, which stands before the first question; what they say of
        `scene`, their tokens should know. `turn_weights`: how much each answer weighs; None: all alike."""
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        known: list[Place] = []
        found = places(scene) if scene is not None else {}
        last = None
        for index, (question, answer) in enumerate(turns):
            picture = self.image if pixels is not None and index == 0 else []
            asked, last = marks(question, found, last)
            said, last = marks(answer, found, last)
            asked = [mark for mark in asked if not mark.before]  # a box that is named tells its place itself
            words, of_words = self._read(question, asked)
            prompt = self.before + picture + words + self.between
            picked = any(mark.place[-1] == COMPARED for mark in asked)
            reply, of_reply = self._answer(answer, said, scene, picked)
            reply = reply + self.end
            ids += prompt + reply + self.after
            labels += [IGNORED] * len(prompt) + reply + [IGNORED] * len(self.after)
            factor = turn_weights[index] if turn_weights else 1.0
            of_answer = [factor * weight for weight in self._weights(answer, reply)]
            weights += [0.0] * len(prompt) + of_answer + [0.0] * len(self.after)
            known += [NOWHERE] * (len(self.before) + len(picture)) + of_words + [NOWHERE] * len(self.between)
            known += of_reply + [NOWHERE] * (len(self.end) + len(self.after))
        return Sample(
            torch.tensor(ids), torch.tensor([*labels[1:], IGNORED]), torch.tensor([*weights[1:], 0]), pixels,
            torch.tensor(known),
        )  # fmt: skip


class Conversations(Dataset):
    """Picture number `start + i` of a split with up to `most` questions, some followed by talk of something else; some
    samples are text alone."""

    def __init__(
        self,
        art_folder: Path,
        split: str,
        seed: int,
        count: int,
        encoder: Encoder,
        *,
        most: int = 8,
        start: int = 0,
        texts: tuple[str, ...] = (),
        talk: tuple[str, ...] = (),
        text_share: float = 0.125,
        mix: Mapping[str, float] = MIX,
    ):
        self.art_folder, self.split, self.seed, self.count = art_folder, SPLITS[split], seed, count
        self.encoder, self.most, self.start = encoder, most, start
        self.texts, self.talk, self.text_share, self.mix = texts, talk, text_share, mix

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        index += self.start
        rng = np.random.default_rng((self.seed, 77, index))
        if self.texts and rng.random() < self.text_share:
            return self.encoder.encode_text(self.texts[rng.integers(len(self.texts))])
        questions: list[Question] = []
        while not questions:  # few pictures allow no question that is tried; another one then
            kind = str(rng.choice(list(self.mix), p=list(self.mix.values())))
            scene = render(art.load(self.art_folder), self.split, self.seed, index, kind=kind)
            questions = ask_all(rng, scene, self.most)
        pixels = self.encoder.processor.image_processor(scene.image, return_tensors="pt").pixel_values[0]
        turns = [(question.prompt, question.answer) for question in questions]
        turn_weights = [TASK_WEIGHTS.get(question.task, 1.0) for question in questions]
        cells = cell_targets(scene, math.isqrt(len(self.encoder.image))).map(torch.from_numpy)
        sample = replace(self.encoder.encode(turns, pixels, scene, turn_weights), cells=cells)
        if self.talk and rng.random() < TALKED:
            sample = self.encoder.and_then(sample, self.talk[rng.integers(len(self.talk))])
        return sample


def collate(samples: list[Sample], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded batch; `pixel_values [pictures, 3, H, W]` in reading order and what their cells should tell, under
    the names of `CellTargets`, absent when there is none; `is_text` bool `[B]`; of samples that end with talk, absent
    when none does, `talkers` int64 `[K]`, their rows, `talk` `[K, L]` and `talk_mask`."""

    def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = [sample.input_ids for sample in samples]
    batch = {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        "labels": padded([sample.labels for sample in samples], IGNORED),
        "weights": padded([sample.weights for sample in samples], 0.0),
        "places": padded([sample.places for sample in samples], UNKNOWN),
        "is_text": torch.tensor([sample.is_text for sample in samples]),
    }
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    cells = [sample.cells for sample in samples if sample.cells is not None]
    batch |= {"pixel_values": torch.stack(pixels)} if pixels else {}
    if talk := {row: sample.talk for row, sample in enumerate(samples) if sample.talk is not None}:
        masks = padded([torch.ones_like(ids) for ids in talk.values()], 0)
        batch |= {"talkers": torch.tensor([*talk]), "talk": padded([*talk.values()], pad), "talk_mask": masks}
    return batch | (CellTargets(*map(torch.stack, zip(*cells, strict=True)))._asdict() if cells else {})
