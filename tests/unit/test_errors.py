"""The exception tree is the one drawn at the top of its file."""

import inspect

from mllm_demo import errors


def tree(error: type, depth: int = 0) -> list[tuple[int, str]]:
    return [(depth, error.__name__)] + [line for kind in error.__subclasses__() for line in tree(kind, depth + 1)]


def test_the_drawing_shows_every_error_under_its_parent():
    drawn = []
    for line in errors.__doc__.splitlines():
        bare = line.strip("│├└─ ")
        if bare.split() and bare.split()[0].endswith(("Error", "Timeout")):
            depth = (len(line) - len(line.lstrip("│├└─ ")) - 4) // 4
            drawn.append((depth, bare.split()[0]))
    ours = [(depth, name) for depth, name in tree(errors.DemoError) if hasattr(errors, name)]
    assert drawn == ours


def test_every_error_has_a_docstring_and_carries_its_sentence():
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert kind.__doc__
        assert str(kind("Do this.")) == "Do this."
