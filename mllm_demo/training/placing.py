"""Asks the middle of the language model where things are, so that it learns to carry places from patches to words.

Image tokens tell their row and column, and answers about places need them; but a language model that has only answers
to learn from takes very long to carry a column from a patch to the word that it answers with. So a linear head, thrown
away afterwards, reads one of its middle layers: at every word or label that picks something out ("largest", too),
before every edge of a box and before every character that is spelled, it must tell where that thing is and what it is
worth in a chart; at a plural, how many there are. It knows nothing of tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional

from mllm_demo.training.concepts import UNKNOWN
from mllm_demo.training.phrasings import PHRASINGS
from mllm_demo.training.things import ALL, MAX_COUNT, Scene, Thing
from mllm_demo.training.wording import MASS, percent, plural

TENS = 11  # 0 to 10 tens of a percent
SIZES = (TENS,) * 5 + (MAX_COUNT + 1,)  # left, top, right, bottom, value, count
COMPARED = 1  # last in a place that is picked out by comparing all the others; else UNKNOWN
NOWHERE = (UNKNOWN,) * (len(SIZES) + 1)
FIELDS = {"columns": (0, 2), "rows": (1, 3), "values": (4,), "counts": (5,)}
# Asked of what is compared alone, and not there with the rest, of which it is one in fifty and would not be learned.
FIELDS |= {"extremes": (0, 2, 4)}
# Labels that are words of questions, too, are not told from them.
_COMMON = frozenset(re.findall(r"[a-z]+", " ".join(sum(PHRASINGS.values(), ())).lower()))
# How questions call a chart's extremes. Where nothing asked at these words, the language model guessed the part, though
# it told the part of a colour, at whose name it was asked.
EXTREMES = dict.fromkeys(("largest", "highest", "greatest", "biggest", "most", "first by value", "beats", "top"), max)
EXTREMES |= dict.fromkeys(("smallest", "lowest", "least", "last by value", "below all", "bottom"), min)
_BOX = re.compile(r"\[[\d\s,]+\]")
_EDGE = re.compile(r"\d+")

Place = tuple[int, ...]


@dataclass(frozen=True)
class Mark:
    """`place` is to be told at the token that holds character `end - 1` of a text (`before`: that precedes it)."""

    end: int
    place: Place
    before: bool = False


def place_of(scene: Scene, box, value: int = UNKNOWN) -> Place:
    """Tens of percent of the four edges of `box` (pixels), `value` as it is, no count, nothing compared."""
    return (*(percent(edge, scene.image.shape[0]) // 10 for edge in box), value, UNKNOWN, UNKNOWN)


def compared(place: Place) -> Place:
    """`place` as one that is picked out by comparing."""
    return (*place[:-1], COMPARED)


def _count(things: Sequence[Thing]) -> Place:
    return (*NOWHERE[:5], min(len(things), MAX_COUNT), UNKNOWN)


def places(scene: Scene) -> dict[str, Place]:
    """What words that pick something out of the scene should tell: names, coloured names, plurals, chart labels."""
    things = scene.of_kind("object", "shape", "part")
    named: dict[str, list[Thing]] = {}
    for thing in things:
        for words in {thing.name, f"{thing.colour} {thing.name}" if thing.colour else thing.name}:
            named.setdefault(words, []).append(thing)
    found: dict[str, Place] = {}
    if seen := scene.of_kind("object", "shape"):
        found |= dict.fromkeys(ALL, _count(seen))
    for words, those in named.items():
        if words not in MASS and words == those[0].name:
            found[plural(words)] = _count(those)
        if len(those) == 1:
            found[words] = place_of(scene, those[0].box)
    if (chart := scene.chart) is not None:
        parts = zip(chart.regions, chart.values, strict=True)
        parts = [place_of(scene, region, percent(value, chart.top) // 10) for region, value in parts]
        found |= {label: part for label, part in zip(chart.labels, parts, strict=True) if label not in _COMMON}
        asked = {words: most for words, most in EXTREMES.items() if words not in chart.labels}
        extremes = {most: compared(parts[chart.values.index(most(chart.values))]) for most in (min, max)}
        found |= {words: extremes[most] for words, most in asked.items()}
    return found


def marks(text: str, found: dict[str, Place], last: Place | None = None) -> tuple[list[Mark], Place | None]:
    """Marks of a text, and the place that it mentions last, which `last` was before it: boxes are of that place."""
    made: list[Mark] = []
    if found:
        words = re.compile(r"\b(" + "|".join(sorted(map(re.escape, found), key=len, reverse=True)) + r")\b")
        for mention in words.finditer(text.lower()):
            place = found[mention.group(1)]
            made.append(Mark(mention.end(), place))
            last = place if place[0] != UNKNOWN else last
    if last is not None:
        for box in _BOX.finditer(text):
            made += [Mark(box.start() + edge.start() + 1, last, before=True) for edge in _EDGE.finditer(box.group())]
    return made, last


def spelled(scene: Scene, text: str) -> list[Place]:
    """Where the characters of `text` stand in the scene, one for each; nowhere where it is not written. A space stands
    where the next word begins: whether one is to come is told by how far away that is."""
    letters = scene.of_kind("letter")
    start = "".join(letter.name for letter in letters).find(text.replace(" ", "").lower())
    if start < 0:
        return [NOWHERE] * len(text)
    at = accumulate((char != " " for char in text), initial=start)
    return [place_of(scene, letters[index].box) for index, _ in zip(at, text, strict=False)]


class PlaceHead(nn.Module):
    """Hidden states `[marked, width]` and their places int64 `[marked, 7]` → cross entropies by kind of field."""

    def __init__(self, width: int):
        super().__init__()
        self.read = nn.Linear(width, sum(SIZES))

    def forward(self, hidden: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = functional.layer_norm(hidden.float(), hidden.shape[-1:])
        logits = self.read(hidden).split(SIZES, dim=-1)
        losses, picked = {}, wanted[:, -1:] == COMPARED
        for name, fields in FIELDS.items():
            said, target = torch.stack([logits[f] for f in fields], 1), wanted[:, list(fields)]
            target = target.where(picked if name == "extremes" else ~picked, UNKNOWN)
            known = target != UNKNOWN
            # A mean over none would be no number; the sum over none is nothing and still has a gradient.
            each = functional.cross_entropy(said.flatten(0, 1), target.flatten(), ignore_index=UNKNOWN, reduction="sum")
            losses[name] = each / known.sum().clamp(min=1)
        return losses
