"""The example of domain adaptation runs, and what docs/domain-adaptation.md says of its table holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "domain_adaptation.py"


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str, str], float]:
    spec = importlib.util.spec_from_file_location("domain_adaptation", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {key: float(values.mean()) for key, values in module.main(["--seeds", "1"]).items()}


LEARNERS = ("linear", "5-NN", "network")


def test_a_change_of_measurement_is_undone_by_matching_alone(table):
    for learner in LEARNERS:
        assert table["nuclei", "none", learner] < 0.65
        for way in ("mean, std", "CORAL", "CORAL, paper's", "reversed"):
            assert table["nuclei", way, learner] > 0.88
        assert abs(table["nuclei", "CORAL", learner] - table["nuclei", "mean, std", learner]) < 0.04
    # The loss does not see that the means are elsewhere.
    assert table["nuclei", "Deep CORAL", "network"] < 0.75


def test_nothing_is_gained_where_the_statistics_are_not_the_difference(table):
    for learner in LEARNERS:
        for way in ("mean, std", "CORAL", "reversed"):
            assert table["order of file", way, learner] < table["order of file", "none", learner] + 0.02


def test_correlations_are_the_difference_of_the_lighting(table):
    for learner in ("linear", "network"):
        assert table["lighting", "CORAL", learner] > table["lighting", "none", learner] + 0.15
        assert table["lighting", "CORAL", learner] > table["lighting", "mean, std", learner] + 0.15
        assert table["lighting", "CORAL", learner] > table["lighting", "CORAL, paper's", learner] + 0.05
    assert table["lighting", "CORAL", "5-NN"] < table["lighting", "none", "5-NN"] - 0.1
    assert table["lighting", "mean, std", "linear"] < table["lighting", "none", "linear"]
    for learner in LEARNERS:
        assert table["lighting", "reversed", learner] > 0.9
    assert table["lighting", "Deep CORAL", "network"] > 0.9


def test_other_proportions_of_classes_make_it_do_harm(table):
    for learner in LEARNERS:
        none = table["classes", "none", learner]
        for way in ("CORAL", "reversed"):
            assert table["classes", way, learner] < none - 0.01
            assert abs(table["classes", f"{way}, weighted", learner] - none) < 0.03
    for way in ("CORAL", "reversed"):
        assert table["classes", way, "linear"] < table["classes", "none", "linear"] - 0.05
        both = table["lighting, classes", way, "linear"]
        assert both < table["lighting", way, "linear"] - 0.03
        assert table["lighting, classes", f"{way}, weighted", "linear"] > both + 0.05
    # Deep CORAL's activations are drawn together only as far as the other loss lets them.
    assert table["classes", "Deep CORAL", "network"] > table["classes", "none", "network"] - 0.03


def test_every_way_is_in_the_table(table):
    shifts, ways, learners = (set(each) for each in zip(*table, strict=True))
    assert (len(shifts), len(ways), learners) == (5, 8, set(LEARNERS))
    assert len(table) == 5 * (7 * 3 + 1)
