"""Names, articles, plurals, boxes and quotes as answers write them, and the answer to what no picture tells.

It knows nothing of questions.
"""

from mllm_demo.training.art import OBJECT_NAMES
from mllm_demo.training.things import SHAPES, Thing

CANNOT_TELL = "I can't tell from this image."
# Names that are not counted with "a" and a plural.
PAIRED = ("grapes", "glasses", "scissors")
MASS = {name: f"some {name}" for name in (*PAIRED, "bread", "cheese", "corn", "coffee", "fire")}
IRREGULAR = {
    "fish": "fish", "sheep": "sheep", "strawberry": "strawberries", "cherry": "cherries", "butterfly": "butterflies",
    "bus": "buses", "cactus": "cactuses", "octopus": "octopuses", "mouse": "mice", "wolf": "wolves",
    "snowman": "snowmen", "church": "churches", "fox": "foxes", "dress": "dresses", "trophy": "trophies",
    "tomato": "tomatoes", "ice cream": "ice creams",
}  # fmt: skip


def with_article(name: str) -> str:
    return MASS.get(name) or f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def verb(name: str) -> str:
    return "are" if name in PAIRED else "is"


def plural(name: str) -> str:
    colour, _, last = name.rpartition(" ")
    if name in MASS:
        return name
    if name in IRREGULAR:
        return IRREGULAR[name]
    return f"{colour} {IRREGULAR.get(last, f'{last}s')}".strip()


def describe(thing: Thing) -> str:
    return with_article(f"{thing.colour} {thing.name}" if thing.colour else thing.name)


def the(thing: Thing) -> str:
    return f"the {thing.colour} {thing.name}" if thing.colour else f"the {thing.name}"


def quoted(text: str) -> str:
    """Text read from the picture; between these marks the tokens are single characters (see `conversations`)."""
    return f'"{text}"'


def percent(value: float, whole: float) -> int:
    return min(max(round(100 * float(value) / whole), 0), 100)


def box_text(box, size: float) -> str:
    """`[x1, y1, x2, y2]` in percent of the picture."""
    return "[{}, {}, {}, {}]".format(*(percent(edge, size) for edge in box))


# Every form in which a reply may say a name → the name.
NAME_FORMS = {form: name for name in (*OBJECT_NAMES, *SHAPES) for form in (name, plural(name))}
