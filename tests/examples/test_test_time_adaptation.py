"""The example of adaptation at test time runs, and what docs/test-time-adaptation.md says of its tables holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "test_time_adaptation.py"


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], float]:
    spec = importlib.util.spec_from_file_location("test_time_adaptation", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(["--seeds", "1"])


def test_statistics_of_the_target_undo_a_shift(table):
    for shift in ("brightness +.5", "blur", "contrast x.3"):
        none = table[shift, "not adapted"]
        assert none < 0.75
        assert none < table[shift, "without batch norm"]
        for way in ("beforehand", "batches so far", "each batch of 60", "each batch of 16"):
            assert table[shift, way] > none + 0.1
    for shift in ("brightness +.5", "contrast x.3"):  # by algebra
        for way in ("beforehand", "each batch of 60", "tent"):
            assert abs(table[shift, way] - table["none", way]) < 0.01


def test_tent_adds_little(table):
    for shift in ("none", "brightness +.5", "blur", "contrast x.3"):
        assert abs(table[shift, "tent"] - table[shift, "each batch of 60"]) < 0.03


def test_sorted_batches_destroy_it_and_are_noticed(table):
    for shift in ("none", "brightness +.5", "blur", "contrast x.3"):
        assert table[shift, "sorted: each of 60"] < 0.5
        assert table[shift, "sorted: tent"] < 0.5
        assert table[shift, "sorted: beforehand"] > table[shift, "beforehand"] - 0.02
        assert table[shift, "share, sorted"] > 0.15
        assert table[shift, "share, shuffled"] < 0.05
    accuracies = [table[f"{percent}%", "accuracy, 60"] for percent in (0, 40, 60, 80, 100)]
    assert accuracies == sorted(accuracies, reverse=True)
