"""1-Wasserstein distance from quantiles, against SciPy, closed forms and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from batchnorm import InputError
from batchnorm.probes import chance, distances, wasserstein

LEVELS = (0.5, *(float(level) for level in range(5, 100, 5)), 99.5)
FINE = tuple(np.linspace(0.01, 99.99, 2001))


def quantiles(samples, levels=LEVELS):
    """units x levels of ``samples``, (values, units)."""
    return np.percentile(samples, levels, axis=0).T.tolist()


@pytest.mark.parametrize("levels", [(50.0,), (15.0, 50.0, 85.0), LEVELS])
def test_a_shift_by_d_is_d_whatever_the_levels(levels):
    x = np.random.default_rng(0).normal(size=(300, 4))
    d = np.array([0.25, -3.0, 0.0, 1e6])
    np.testing.assert_allclose(wasserstein(quantiles(x, levels), quantiles(x + d, levels), levels), abs(d), rtol=1e-9)


def test_a_gaussian_that_widens():
    # W1(N(0, 1), N(0, s)) = |s - 1| E|z| = |s - 1| sqrt(2 / pi)
    z = stats.norm.ppf(np.array(FINE) / 100.0)
    exact = abs(2.5 - 1.0) * math.sqrt(2.0 / math.pi)
    assert wasserstein([z], [2.5 * z], FINE)[0] == pytest.approx(exact, rel=1e-4)
    z = stats.norm.ppf(np.array(LEVELS) / 100.0)
    assert wasserstein([z], [2.5 * z], LEVELS)[0] == pytest.approx(exact, rel=0.02)  # what the tails beyond 0.5% cost


def test_a_difference_that_changes_its_sign_within_an_interval():
    # Uniform on [0, 1] and the point 0.3: the integral of |q - 0.3|, although no level is at 0.3.
    assert wasserstein([[0.0, 1.0]], [[0.3, 0.3]], (0.0, 100.0))[0] == pytest.approx((0.3**2 + 0.7**2) / 2, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_scipys_distance_of_the_same_samples(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0.0, 1.0, 2000), rng.gamma(2.0, 1.5, 2000) - 1.0
    ours = wasserstein(quantiles(x[:, None], FINE), quantiles(y[:, None], FINE), FINE)[0]
    assert ours == pytest.approx(stats.wasserstein_distance(x, y), rel=0.01)
    coarse = wasserstein(quantiles(x[:, None]), quantiles(y[:, None]), LEVELS)[0]
    assert coarse == pytest.approx(stats.wasserstein_distance(x, y), rel=0.1)


numbers = st.floats(-1e3, 1e3, allow_nan=False)


@settings(max_examples=60)
@given(st.lists(numbers, min_size=2, max_size=20), st.lists(numbers, min_size=2, max_size=20), numbers, numbers)
def test_what_does_not_change_it_and_what_scales_it(first, second, offset, scale):
    x, y = (np.array(values)[:, None] for values in (first, second))

    def distance(a, b, std=None):
        return wasserstein(quantiles(a), quantiles(b), LEVELS, None if std is None else [std])[0]

    plain = distance(x, y)
    assert distance(y, x) == plain
    assert distance(x, x) == 0.0
    near = {"rel": 1e-6, "abs": 1e-6}
    assert distance(x + offset, y + offset) == pytest.approx(plain, **near)
    assert distance(x * scale, y * scale) == pytest.approx(plain * abs(scale), **near)
    if abs(scale) > 1e-3:
        # In units of the std before, the scale of the input does not matter.
        assert distance(x * scale, y * scale, abs(scale) * 2.0) == pytest.approx(distance(x, y, 2.0), **near)


def test_what_chance_alone_gives():
    # Uniform: integral of sqrt(x (1 - x)) is pi / 8.
    uniform = [[level / 100.0 for level in FINE]]
    assert chance(uniform, FINE, 50)[0] == pytest.approx(2 / math.sqrt(50 * math.pi) * math.pi / 8, rel=1e-4)
    # And what SciPy's distances between samples are, on average.
    rng = np.random.default_rng(0)
    for draw in (rng.normal, rng.exponential):
        found = np.mean([stats.wasserstein_distance(draw(size=40), draw(size=40)) for _ in range(2000)])
        exact = np.percentile(draw(size=200_000), LEVELS)
        assert chance([exact], LEVELS, 40)[0] == pytest.approx(found, rel=0.05)


def test_units_without_spread():
    before, after = [[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [2.0, 2.0]]
    assert wasserstein(before, after, (25.0, 75.0), [0.0, 0.0]).tolist() == [0.0, math.inf]
    assert distances(before, after, [0.0, 0.0]).tolist() == [0.0, math.inf]


def test_refusals():
    with pytest.raises(InputError, match="two looks at the same units, got 1 and 2"):
        wasserstein([[1.0]], [[1.0], [2.0]], (50.0,))
    with pytest.raises(InputError, match="expected two looks at the same units, got 2 deviations and 1"):
        wasserstein([[1.0]], [[1.0]], (50.0,), [1.0, 2.0])
    with pytest.raises(InputError, match="expected a level for each of 1 quantiles, got 2"):
        wasserstein([[1.0]], [[1.0]], (50.0, 60.0))
    for levels in ((60.0, 50.0), (50.0, 50.0), (-1.0, 50.0), (50.0, 101.0)):
        with pytest.raises(InputError, match="expected levels that rise from 0 to 100 per cent"):
            wasserstein([[1.0, 2.0]], [[1.0, 2.0]], levels)
