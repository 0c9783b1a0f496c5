"""Asks about a scene in many phrasings and knows the answers; also scores a reply.

Every task keeps its last phrasings for evaluation only. It knows nothing of pictures, tokens or models.
"""

import re
from dataclasses import dataclass

import numpy as np

from mllm_demo.training.art import OBJECT_NAMES
from mllm_demo.training.scenes import COLOURS, SHAPES, Scene, Thing

TASKS = ("naming", "counting", "colour", "shape", "presence", "reading")
HELD_OUT_PHRASINGS = 2
NUMBERS = {"no": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
# Names that are not counted with "a" and a plural.
MASS = {"grapes": "some grapes", "glasses": "some glasses", "scissors": "some scissors",
        "bread": "some bread", "cheese": "some cheese"}  # fmt: skip
IRREGULAR = {"fish": "fish", "strawberry": "strawberries", "cherry": "cherries", "butterfly": "butterflies",
             "bus": "buses", "cactus": "cactuses"}  # fmt: skip

PHRASINGS = {
    "naming": (
        "What is in the picture?", "What is this?", "What do you see?", "Name the object.",
        "Which object is shown?", "What does the image show?", "Can you tell me what this is?",
        "What object is in this image?", "Identify the object.", "What's that?", "what is it", "What is shown here?",
        "Tell me what you see in this picture.", "What is pictured here?",
    ),
    "counting": (
        "How many {plural} are there?", "How many {plural} do you see?", "Count the {plural}.",
        "How many {plural} are in the picture?", "What is the number of {plural}?", "how many {plural}",
        "How many {plural} can you see in the image?", "Tell me how many {plural} there are.",
        "How many {plural} does the picture show?", "Please count the {plural} in this image.",
    ),
    "colour": (
        "What colour is the {name}?", "What color is the {name}?", "Which colour does the {name} have?",
        "Tell me the color of the {name}.", "What is the colour of the {name}?", "what color is the {name}",
        "Name the colour of the {name}.", "Which color is the {name}?", "The {name} has what color?",
    ),
    "shape": (
        "What shape is the {colour} thing?", "Which shape is {colour}?", "What is the {colour} shape?",
        "Name the {colour} shape.", "What {colour} shape is there?", "What is the shape of the {colour} figure?",
        "Tell me the shape that is {colour}.", "What shape does the {colour} figure have?",
    ),
    "presence": (
        "Is there {a_name}?", "Is there {a_name} in the picture?", "Do you see {a_name}?", "Can you see {a_name}?",
        "Does the image show {a_name}?", "Is there {a_name} in this image?", "Does the picture contain {a_name}?",
        "Are you able to spot {a_name} here?", "Can {a_name} be seen in the image?",
    ),
    "reading": (
        "What does it say?", "Read the word.", "What is written here?", "What word is this?",
        "What is the text in the picture?", "Read the text.", "Which word do you see?", "what does the text say",
        "What does the image say?", "Please read what is written in the picture.",
    ),
    "caption": (
        "Describe the picture.", "What can you see?", "List everything in the image.", "Describe this image.",
        "What are the things in the picture?", "Tell me about this picture.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """`answer` is what the model should say; `key` is the one thing that scoring looks for."""

    task: str
    prompt: str
    answer: str
    key: str


def with_article(name: str) -> str:
    if name in MASS:
        return MASS[name]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    return name if name in MASS else IRREGULAR.get(name, f"{name}s")


def describe(thing: Thing) -> str:
    return with_article(f"{thing.colour} {thing.name}" if thing.colour else thing.name)


def count_phrase(count: int, name: str) -> str:
    if count == 0:
        return f"There are no {plural(name)}."
    return f"There is 1 {name}." if count == 1 else f"There are {count} {plural(name)}."


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _naming(rng, scene: Scene) -> Question | None:
    objects = scene.of_kind("object")
    if len({thing.name for thing in objects}) != 1 or scene.of_kind("shape"):
        return None
    name, several = objects[0].name, len(objects) > 1
    what = plural(name) if several else with_article(name)
    return Question("naming", "{}", f"{'These are' if several or name in MASS else 'This is'} {what}.", name)


def _counting(rng, scene: Scene) -> Question | None:
    names = [thing.name for thing in scene.of_kind("object") + scene.of_kind("shape") if thing.name not in MASS]
    if not names:
        return None
    name = str(rng.choice(names)) if rng.random() > 0.07 else str(rng.choice(OBJECT_NAMES[:45]))
    count = names.count(name)
    return Question("counting", plural(name), count_phrase(count, name), str(count))


def _colour(rng, scene: Scene) -> Question | None:
    shapes = [thing.name for thing in scene.of_kind("shape")]
    single = [thing for thing in scene.of_kind("shape") if shapes.count(thing.name) == 1]
    if not single:
        return None
    thing = single[rng.integers(len(single))]
    return Question("colour", thing.name, f"The {thing.name} is {thing.colour}.", thing.colour)


def _shape(rng, scene: Scene) -> Question | None:
    colours = [thing.colour for thing in scene.of_kind("shape")]
    single = [thing for thing in scene.of_kind("shape") if colours.count(thing.colour) == 1]
    if not single:
        return None
    thing = single[rng.integers(len(single))]
    return Question("shape", thing.colour, f"It is {with_article(thing.name)}.", thing.name)


def _presence(rng, scene: Scene) -> Question | None:
    things = scene.of_kind("object") + scene.of_kind("shape")
    shown = {describe(thing) for thing in things}
    if not shown:
        return None
    if rng.random() < 0.5:
        what, there = str(rng.choice(sorted(shown))), True
    else:
        shapes = scene.of_kind("shape")
        while True:
            if shapes and rng.random() < 0.8:  # hard: the colour or the shape is there, the pair is not
                thing = shapes[rng.integers(len(shapes))]
                what = (
                    f"{rng.choice(list(COLOURS))} {thing.name}"
                    if rng.random() < 0.5
                    else f"{thing.colour} {rng.choice(SHAPES)}"
                )
            else:
                what = str(rng.choice(OBJECT_NAMES))
            what = with_article(what)
            if what not in shown:
                break
        there = False
    verb = "are" if what.startswith("some") else "is"
    none = f"no {what.split(' ', 1)[1]}"
    answer = f"Yes, there {verb} {what}." if there else f"No, there {verb} {none}."
    return Question("presence", what, answer, "yes" if there else "no")


def _reading(rng, scene: Scene) -> Question | None:
    if scene.word is None:
        return None
    letters = " ".join(scene.word.upper())
    return Question("reading", "{}", f"The letters {letters} spell {scene.word}.", scene.word)


def _caption(rng, scene: Scene) -> Question:
    things = scene.of_kind("object") + scene.of_kind("shape")
    ordered = sorted(things, key=lambda t: (int(t.centre[1] // 64), t.centre[0]))
    counted: dict[str, int] = {}
    for thing in ordered:
        counted[describe(thing)] = counted.get(describe(thing), 0) + 1
    parts = [what if n == 1 else f"{n} {plural(what.split(' ', 1)[1])}" for what, n in counted.items()]
    if scene.word is not None:
        parts.append(f"the word {scene.word}")
    text = _joined(parts)
    return Question("caption", "{}", f"{text[0].upper()}{text[1:]}.", text)


_MAKERS = {
    "naming": _naming, "counting": _counting, "colour": _colour,
    "shape": _shape, "presence": _presence, "reading": _reading, "caption": _caption,
}  # fmt: skip


def ask(rng: np.random.Generator, scene: Scene, task: str, held_out: bool = False) -> Question | None:
    """One question of `task`, or None if this scene does not allow it."""
    made = _MAKERS[task](rng, scene)
    if made is None:
        return None
    known = PHRASINGS[task][-HELD_OUT_PHRASINGS:] if held_out else PHRASINGS[task][:-HELD_OUT_PHRASINGS]
    phrase = str(rng.choice(known))
    prompt = phrase.format(plural=made.prompt, name=made.prompt, colour=made.prompt, a_name=made.prompt)
    return Question(task, prompt, made.answer, made.key)


def ask_all(rng: np.random.Generator, scene: Scene, most: int) -> list[Question]:
    """Up to `most` different questions in random order, as the turns of one conversation."""
    # Colour and shape fit few scenes, and counting is slow to learn: they are asked first, and more than once.
    rare = ["colour", "shape", "presence", "counting", "counting"]
    tasks = [str(task) for task in (*rng.permutation(rare), *rng.permutation(list(_MAKERS)))]
    questions: dict[str, Question] = {}
    for task in tasks:
        question = ask(rng, scene, task)
        if question is not None:
            questions.setdefault(question.prompt, question)
    return list(questions.values())[:most]


def is_right(question: Question, reply: str) -> bool:
    """Exact scoring: the key is said and no other candidate of its kind is."""
    words = re.findall(r"[a-z]+|\d+", reply.lower())
    if question.task == "reading":
        return bool(words) and words[-1] == question.key
    if question.task == "presence":
        return bool(words) and words[0] == question.key
    if question.task == "counting":
        said = {int(w) if w.isdigit() else NUMBERS[w] for w in words if w.isdigit() or w in NUMBERS}
        return said == {int(question.key)}
    kinds = {"naming": {n: n for n in OBJECT_NAMES}, "colour": {c: c for c in COLOURS}, "shape": {s: s for s in SHAPES}}
    candidates = kinds[question.task]
    candidates = {form: name for name in candidates for form in (name, plural(name))}
    return {candidates[w] for w in words if w in candidates} == {question.key}
