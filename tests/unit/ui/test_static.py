"""The view's own files: whole, self-contained, and careful with other people's words."""

import re
from pathlib import Path

import pytest

from mllm_demo.ui import routing_view, theme

STATIC = Path(routing_view.__file__).parent / "static"


def test_every_script_is_part_of_the_view():
    found = {path.stem for path in STATIC.glob("view_*.js")}
    assert found == set(routing_view.SCRIPTS)


@pytest.mark.parametrize("path", sorted(STATIC.glob("*")), ids=lambda path: path.name)
def test_nothing_is_fetched_from_elsewhere(path):
    assert not re.search(r"https?://|@import|url\(['\"]?//", path.read_text("utf-8"))


def test_tokens_are_never_drawn_as_markup():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", routing_view.JS)


def test_templates_hold_nothing_that_gradio_would_evaluate():
    for template in (routing_view.HTML, routing_view.CSS):
        assert not re.search(r"\$\{|\{\{|`|\\", template)


def test_the_theme_asks_for_no_fonts():
    made = theme.make_theme()
    assert all(sheet.startswith("http") is False for sheet in made._stylesheets)
