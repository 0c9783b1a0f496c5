"""Asks about objects, shapes and text of a scene and knows the answers; also scores replies.

`ask` is the one entry; charts are asked about in `chart_questions.py`. It knows nothing of pictures, tokens or models.
"""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from mllm_demo.training import chart_questions
from mllm_demo.training.art import OBJECT_NAMES
from mllm_demo.training.phrasings import FOLLOW_UPS, OPENINGS, phrasings
from mllm_demo.training.things import ALL, COLOURS, PAGE, SHAPES, Scene, Thing
from mllm_demo.training.wording import CANNOT_TELL, MASS, box_text, describe, plural, quoted, the, verb, with_article

TASKS = (
    "naming", "presence", "counting", "colour", "shape", "relations", "grounding", "pointing", "reading", "chart",
    "table", "unanswerable",
)  # fmt: skip
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {there: here for here, there in OPPOSITE.items()}


@dataclass(frozen=True)
class Question:
    """`answer` is what the model should say; `key` is what scoring looks for; `slack`: for numbers, what counts as
    right."""

    task: str
    prompt: str
    answer: str
    key: str
    slack: float = 0.0


@dataclass(frozen=True)
class _Made:
    """A question without its words: `fills` are put into a phrasing of `phrasing`, which comes after `before`."""

    phrasing: str
    fills: dict[str, str]
    answer: str
    key: str
    before: str = ""


def _things(scene: Scene) -> tuple[Thing, ...]:
    return scene.of_kind("object", "shape")


def _alone(scene: Scene) -> list[Thing]:
    """Things that their description picks out."""
    things = _things(scene)
    said = [describe(thing) for thing in things]
    return [thing for thing, text in zip(things, said, strict=True) if said.count(text) == 1]


def _pick(rng: np.random.Generator, things):
    return things[int(rng.integers(len(things)))]


def _text(scene: Scene) -> str:
    """All that is written, where it is short enough to be read out and more than a chart's labels."""
    return "" if scene.chart is not None or scene.kind == PAGE else " ".join(scene.lines)


def _naming(rng, scene: Scene) -> _Made | None:
    if scene.chart is not None:
        return _Made("naming", {}, *chart_questions.named(scene.chart))
    if not _things(scene) and (read := _reading(rng, scene)):  # asked what it is, a picture of nothing but text is read
        return replace(read, phrasing="naming")
    objects = scene.of_kind("object")
    if len({thing.name for thing in objects}) != 1 or scene.of_kind("shape"):
        return None
    name, several = objects[0].name, len(objects) > 1
    what = plural(name) if several else with_article(name)
    return _Made("naming", {}, f"{'These are' if several or verb(name) == 'are' else 'This is'} {what}.", name)


def _counting(rng, scene: Scene) -> _Made | None:
    names = [thing.name for thing in _things(scene) if thing.name not in MASS]
    if not names:
        return None
    name = str(rng.choice(names)) if rng.random() > 0.07 else str(rng.choice(OBJECT_NAMES[:45]))
    count = names.count(name)
    if count == 1 and rng.random() < 0.6:
        return None  # one of a kind is the commonest case and the least to learn from
    if count == 0:
        said = f"There are no {plural(name)}."
    else:
        said = f"There is 1 {name}." if count == 1 else f"There are {count} {plural(name)}."
    return _Made("counting", {"plural": plural(name)}, said, str(count))


def _colour(rng, scene: Scene) -> _Made | None:
    shapes = [thing.name for thing in scene.of_kind("shape")]
    single = [thing for thing in scene.of_kind("shape") if shapes.count(thing.name) == 1]
    if not single:
        return None
    thing = _pick(rng, single)
    return _Made("colour", {"name": thing.name}, f"The {thing.name} is {thing.colour}.", thing.colour)


def _shape(rng, scene: Scene) -> _Made | None:
    colours = [thing.colour for thing in scene.of_kind("shape")]
    single = [thing for thing in scene.of_kind("shape") if colours.count(thing.colour) == 1]
    if not single:
        return None
    thing = _pick(rng, single)
    return _Made("shape", {"colour": thing.colour}, f"It is {with_article(thing.name)}.", thing.name)


def _presence(rng, scene: Scene) -> _Made | None:
    shown = {describe(thing) for thing in _things(scene)}
    if not shown:
        return None
    there = bool(rng.random() < 0.5)
    what = str(rng.choice(sorted(shown)))
    shapes = scene.of_kind("shape")
    while not there and what in shown:
        if shapes and rng.random() < 0.8:  # hard: the colour or the shape is there, the pair is not
            thing = _pick(rng, shapes)
            other = rng.random() < 0.5
            what = f"{rng.choice(list(COLOURS))} {thing.name}" if other else f"{thing.colour} {rng.choice(SHAPES)}"
        else:
            what = str(rng.choice(OBJECT_NAMES))
        what = with_article(what)
    is_or_are = verb(what.split(" ", 1)[1])
    answer = f"Yes, there {is_or_are} {what}." if there else f"No, there {is_or_are} no {what.split(' ', 1)[1]}."
    return _Made("presence", {"a_name": what}, answer, "yes" if there else "no")


def _relations(rng, scene: Scene) -> _Made | None:
    single = _alone(scene)
    if len(single) < 2:
        return None
    first, second = (single[i] for i in rng.permutation(len(single))[:2])
    across, down = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    long, short = max(abs(across), abs(down)), min(abs(across), abs(down))
    if long < 1.4 * short or long < 0.12 * scene.image.shape[0]:
        return None  # neither side is clear
    if abs(across) > abs(down):
        side = "to the left of" if across < 0 else "to the right of"
    else:
        side = "above" if down < 0 else "below"
    answer = f"{the(first).capitalize()} {verb(first.name)} {side} {the(second)}."
    key = next(word for word in ("left", "right", "above", "below") if word in side)
    return _Made("relations", {"the_name": the(first), "the_other": the(second)}, answer, key)


def _grounding(rng, scene: Scene) -> _Made | None:
    single = _alone(scene)
    if not single:
        return None
    thing = _pick(rng, single)
    box = box_text(thing.box, scene.image.shape[0])
    return _Made("grounding", {"the_name": the(thing)}, f"{the(thing).capitalize()} {verb(thing.name)} at {box}.", box)


def _pointing(rng, scene: Scene) -> _Made | None:
    things = _things(scene)
    if not things:
        return None
    thing = _pick(rng, things)
    size = scene.image.shape[0]
    box = box_text(np.asarray(thing.box) + rng.normal(0, 0.015 * size, 4), size)
    if thing.kind == "shape":
        return _Made("pointing", {"box": box}, f"That is {describe(thing)}.", thing.name)
    that_is = "Those are" if verb(thing.name) == "are" else "That is"
    return _Made("pointing", {"box": box}, f"{that_is} {with_article(thing.name)}.", thing.name)


def _reading(rng, scene: Scene) -> _Made | None:
    text = _text(scene)
    return _Made("reading", {}, f"It says {quoted(text)}.", text) if text else None


def _words(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every word that is written once, and its box."""
    letters = scene.of_kind("letter")
    written, rest, found = "".join(letter.name for letter in letters), iter(letters), []
    for word in " ".join(scene.lines).split():
        x0, y0, x1, y1 = zip(*(letter.box for letter in islice(rest, len(word))), strict=True)
        if written.count(word) == 1:
            found.append((word, (min(x0), min(y0), max(x1), max(y1))))
    return found


def _word(rng, scene: Scene) -> _Made | None:
    words = _words(scene)
    if not words:
        return None
    word, box = _pick(rng, words)
    size = scene.image.shape[0]
    fills = {"box": box_text(np.asarray(box) + rng.normal(0, 0.01 * size, 4), size)}
    return _Made("word" if rng.random() < 0.7 else "pointing", fills, f"It says {quoted(word)}.", word)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _caption(rng, scene: Scene) -> _Made | None:
    if scene.kind == PAGE:
        return None
    if scene.chart is not None:
        labels = _listed([quoted(label) for label in scene.chart.labels])
        text = f"{chart_questions.NAMES[scene.chart.kind]} of {labels}"
        return _Made("caption", {}, f"{text.capitalize()}.", text)
    size = scene.image.shape[0]
    ordered = sorted(_things(scene), key=lambda t: (int(t.centre[1] * 3 / size), t.centre[0]))
    counted: dict[str, int] = {}
    for thing in ordered:
        counted[describe(thing)] = counted.get(describe(thing), 0) + 1
    parts = [what if n == 1 else f"{n} {plural(what.split(' ', 1)[1])}" for what, n in counted.items()]
    parts += [f"the text {quoted(_text(scene))}"] if scene.lines else []
    text = _listed(parts)
    return _Made("caption", {}, f"{text[0].upper()}{text[1:]}.", text)


def _total(rng, scene: Scene) -> _Made | None:
    things = _things(scene)
    if len(things) < 2 or scene.lines or any(thing.name in MASS for thing in things):
        return None
    all_shapes = all(thing.kind == "shape" for thing in things)
    what = ALL[1 if all_shapes and rng.random() < 0.5 else 0]
    return _Made("counting", {"plural": what}, f"There are {len(things)} {what}.", str(len(things)))


def _told(rng, scene: Scene) -> _Made | None:
    return _Made(*chart_questions.told(rng))


def _unanswerable(rng, scene: Scene) -> _Made | None:
    absent = sorted(set(OBJECT_NAMES) - {thing.name for thing in scene.things})
    return _Made("unanswerable", {"name": str(rng.choice(absent))}, CANNOT_TELL, CANNOT_TELL)


_MAKERS = {
    "naming": _naming, "presence": _presence, "counting": _counting, "colour": _colour, "shape": _shape,
    "relations": _relations, "grounding": _grounding, "pointing": _pointing, "reading": _reading, "word": _word,
    "caption": _caption, "unanswerable": _unanswerable, "total": _total, "told": _told,
}  # fmt: skip


def ask(
    rng: np.random.Generator, scene: Scene, task: str, held_out: bool = False, kind: str | None = None
) -> Question | None:
    """One question of `task`, or None if this scene does not allow it; `kind` of question about a chart, if any."""
    slack = 0.0
    if task in ("chart", "table"):
        asked = chart_questions.ask(rng, scene, task, kind)
        if asked is None:
            return None
        made, slack = _Made(*asked[:4]), asked[4]
    else:
        made = _MAKERS[task](rng, scene)
        if made is None:
            return None
    phrase = made.before + str(rng.choice(phrasings(made.phrasing, held_out)))
    if not held_out and rng.random() < OPENED:
        phrase = str(rng.choice(OPENINGS)).format(phrase)
    return Question(task, phrase.format(**made.fills), made.answer, made.key, slack)


OPENED = 0.2  # of all questions to learn from
# Asked about every chart beside the rest: the verdict of one comparison in three did not follow from the values told.
COMPARISONS = 2
COMPARED = 0.5  # of other pictures that are followed by as many, of values that the question tells
WORDS = 5  # single words that are asked for at most; a box takes two dozen tokens, and the longest row sets the pace
DESCRIBED = 0.4  # of charts, after all other questions: the labels that it tells would answer those
# How often each task is tried; those that fit few scenes or are slow to learn come first more often.
_WEIGHTS = {
    "naming": 1, "presence": 3, "counting": 3, "colour": 1.5, "shape": 2.5, "relations": 5, "grounding": 5,
    "pointing": 2, "reading": 4, "chart": 8, "table": 8, "caption": 0.3, "unanswerable": 0.4, "total": 1,
}  # fmt: skip


def ask_all(rng: np.random.Generator, scene: Scene, most: int) -> list[Question]:
    """Up to `most` questions with different answers, as the turns of one conversation; some ask about "it". A chart is
    compared `COMPARISONS` times more and often described at the end; text fills the rest with its single words; what
    stands in no picture is compared, too."""
    names, weights = list(_WEIGHTS), np.array(list(_WEIGHTS.values()))
    questions: dict[tuple[str, str], Question] = {}
    told = COMPARISONS if scene.chart is None and rng.random() < COMPARED else 0
    room = max(most - told, 1)
    for task in rng.choice(names, 6 * most, p=weights / weights.sum()):
        question = ask(rng, scene, str(task))
        if question is None or (scene.chart is not None and task == "caption"):
            continue
        for made in (question, _follow_up(rng, scene, question)):
            if made is not None:
                questions.setdefault((made.task, made.answer), made)
        if len(questions) >= room:
            break
    asked = list(questions.values())[:room]
    if scene.chart is None:
        more = [ask(rng, scene, "word") for _ in range(min(room - len(asked), WORDS))]
        more += [ask(rng, scene, "told") for _ in range(told)]
    else:
        task = "table" if scene.chart.kind == "table" else "chart"
        more = [ask(rng, scene, task, kind="comparison") for _ in range(COMPARISONS)]
        more += [ask(rng, scene, "caption")] if rng.random() < DESCRIBED else []
    said = {question.answer for question in asked}
    others = list({q.answer: q for q in more if q is not None and q.answer not in said}.values())
    first = scene.chart is None and rng.random() < 0.5  # what is read first is not read again, but remembered
    return others + asked if first else asked + others


def _follow_up(rng: np.random.Generator, scene: Scene, question: Question) -> Question | None:
    """What may be asked next about the thing that was just named."""
    things = _things(scene)
    if question.task not in ("naming", "shape") or len(things) != 1 or rng.random() < 0.6:
        return None
    task = "colour" if things[0].kind == "shape" and rng.random() < 0.5 else "grounding"
    made = ask(rng, scene, task)
    return replace(made, prompt=str(rng.choice(FOLLOW_UPS[task]))) if made else None
