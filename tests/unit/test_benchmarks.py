"""Benchmarks run, say what they compared and compare with the first case; figures are not checked."""

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from benchmarks import timing
from mllm_demo.errors import SettingsError

FOLDER = Path(timing.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "timing"))
SMALL = ["--layers", "1", "--repeats", "1", "--prompt-tokens", "3", "--new-tokens", "2", "--device", "cpu"]
# 4-bit blocks hold 64 weights.
NARROW = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(timing, "SHAPE", {**timing.SHAPE, **NARROW})


def test_there_are_benchmarks_of_experts_tap_and_four_bit():
    assert {"moe_lora_overhead", "tap_overhead", "four_bit"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_prints_what_it_compared_and_the_ratios(name, capsys):
    import_module(f"benchmarks.{name}").main(SMALL)
    printed = capsys.readouterr().out
    # One block of experts stands for its own shape; the others are a few layers of a model.
    shape = ("random fused experts", "2 single ones") if name == "experts_four_bit" else ("1 layers", "2 new tokens")
    assert all(words in printed for words in (*shape, "3 prompt tokens"))
    assert "median of 1 interleaved rounds" in printed
    rows = [line for line in printed.splitlines() if re.search(r"  [\d.]+ +[\d.]+( |$)", line)]
    assert len(rows) >= (2 if name == "experts_four_bit" else 3)
    first, *others = rows
    assert re.search(r"  [\d.]+ +1( |$)", first)
    assert all(re.search(r"  [\d.]+ +[\d.]+ \([\d.]+ - [\d.]+\)", row) for row in others)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_flag_is_one_sentence(name):
    with pytest.raises(SettingsError, match="--repeats must be at least 1, not 0"):
        import_module(f"benchmarks.{name}").main(["--repeats", "0"])


def test_cases_take_turns_and_every_round_starts_with_another():
    order = []

    def case(name):
        def run():
            order.append(name)
            return (1.0,)

        return run

    seconds = timing.measure({name: case(name) for name in "abc"}, 3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: rows.shape for name, rows in seconds.items()} == {name: (3, 1) for name in "abc"}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    # Every round of the machine is twice as slow as the one before; the second case always takes half as long again.
    base = np.array([[1.0], [2.0], [4.0]])
    lines = timing.table({"base": base, "other": base * 1.5}, {"decode": 2}, {"note": ["x", "y"]}).splitlines()
    assert lines[1].split() == ["base", "1000.00", "1", "x"]
    assert lines[2].split() == ["other", "1500.00", "1.50", "(1.50", "-", "1.50)", "y"]
