"""Reports on the same items are set side by side, and how far one is ahead comes with an interval."""

import json

import pytest

from mllm_demo.errors import DataError
from mllm_demo.training import compare

TASKS = sum(compare.FAMILIES.values(), ())


def report(right: int, items: int = 40) -> dict:
    row = {"right": right / items, "low": 0.1, "high": 0.9, "blind": 0.2, "hits": [1] * right + [0] * (items - right)}
    return {"split": "held-out", "seed": 2, "items": 40, "tasks": {task: row for task in TASKS}}


def test_a_model_that_answers_more_is_ahead_by_that_share():
    ahead, low, high = compare.difference(report(30), report(20))
    assert ahead == pytest.approx(0.25)
    assert 0 < low < ahead < high


def test_a_model_beside_itself_is_not_ahead():
    assert compare.difference(report(20), report(20)) == (0, 0, 0)


def test_families_count_alike_however_many_tasks_they_have():
    low, high = report(0), report(40)
    mixed = report(0) | {"tasks": low["tasks"] | {"reading": high["tasks"]["reading"]}}
    assert compare.difference(mixed, low)[0] == pytest.approx(0.25)


def test_the_table_has_a_row_for_every_task_and_a_column_for_every_model():
    lines = compare.table({"NF4": report(30), "single": report(20)}).splitlines()
    assert lines[0] == "| task | NF4 | 95 % interval | single | grey picture |"
    assert len(lines) == 2 + len(TASKS)
    assert lines[2] == "| naming | 0.75 | 0.10 to 0.90 | 0.50 | 0.20 |"


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"split": "held-out"}))
    with pytest.raises(DataError, match="training.evaluate"):
        compare.read(file)
