"""The measures against values worked out by hand."""

from __future__ import annotations

import pytest

from batchnorm.study.document import Spread
from batchnorm.study.measures import best, ratios, spread, steps_to
from batchnorm.study.wording import band, listed, ranged, share, short

CURVE = [(0, 0.1), (2, 0.91), (4, 0.5), (6, 0.9), (8, 0.92), (10, 0.95)]


def test_two_evaluations_in_a_row_are_needed():
    assert steps_to(CURVE, 0.9) == 6  # not 2: the next one falls back
    assert steps_to(CURVE, 0.9, consecutive=1) == 2
    assert steps_to(CURVE, 0.92) == 8
    assert steps_to(CURVE, 0.95) is None  # one alone, at the end
    assert steps_to([], 0.5) is None
    assert steps_to([(0, 1.0)], 0.5) is None


def test_best_is_what_two_in_a_row_reach():
    assert best(CURVE) == 0.92
    assert best(CURVE, consecutive=1) == 0.95
    assert best([(0, 1.0)]) is None
    assert steps_to(CURVE, best(CURVE)) == 8


def test_spread():
    assert spread([3, 1, 2]) == Spread(2.0, 1.0, 3.0, (3, 1, 2))
    assert spread([1, 2, 3, 10]).median == 2.5
    assert spread([]) == Spread(None, None, None, ())


def test_never_is_more_than_any_number():
    assert spread([5, None, 7]) == Spread(7.0, 5.0, None, (5, None, 7))
    assert spread([5, None]) == Spread(None, 5.0, None, (5, None))
    assert spread([None, None, 7]) == Spread(None, 7.0, None, (None, None, 7))
    assert spread([None]) == Spread(None, None, None, (None,))


def test_ratios_are_taken_seed_by_seed():
    found = ratios([600, 900, 800], [30, 30, 20])
    assert found == Spread(30.0, 20.0, 40.0, (20.0, 30.0, 40.0))
    assert ratios([600, None], [30, 30]).values == (20.0, None)
    assert ratios([600], [None]).values == (None,)
    with pytest.raises(ValueError, match="zip"):
        ratios([1], [1, 2])


def test_numbers_as_words():
    assert [short(value) for value in (654.0, 19.57, 0.3, 2.0, 0.0000002, 0, None)] == [
        "654", "19.6", "0.3", "2", "2.0e-07", "0", "never",
    ]  # fmt: skip
    assert ranged(spread([16.9, 19.6, 27.0])) == "19.6 [16.9, 27]"
    assert ranged(spread([16, 20, None])) == "20 [16, open]"
    assert ranged(spread([2, 2, 2])) == "2"
    assert ranged(spread([None])) == "never"
    assert share(0.9779) == "97.8%"
    assert [listed(items) for items in ([], [1], [1.0, 0.3], ["a", "b", "c"])] == [
        "none",
        "1",
        "1 and 0.3",
        "a, b and c",
    ]


def test_a_band_spans_the_steps_that_all_seeds_have():
    series = band("BN", [[(0, 0.1), (2, 0.5), (4, 0.9)], [(0, 0.2), (2, 0.8)], [(0, 0.3), (2, 0.6)]], "batch")
    assert (series.x, series.y, series.low, series.high) == ((0, 2), (0.2, 0.6), (0.1, 0.5), (0.3, 0.8))
