"""What holds for any data, any split, any weights and any order, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener
from oracles.moments import exact_moments

SEEDS = st.integers(0, 2**32 - 1)
OFFSETS = st.sampled_from([0.0, 1.0, -1e4, 1e8])
DTYPES = st.sampled_from([np.float32, np.float64])
SCALERS = [MeanSubtractor(), StandardScaler(), StandardScaler(with_mean=False), MinMaxScaler(), MinMaxScaler((0, 1))]


class Case:
    """Data with holes, weights of a kind, and a way to cut and merge them."""

    def __init__(self, seed: int, offset: float, dtype: Any, kind: str, holes: float) -> None:
        generator = self.generator = np.random.default_rng(seed)
        rows = int(generator.integers(4, 60))
        # In float32 a deviation of 1 beside 1e8 is below the spacing of the numbers.
        scale = 10.0 ** generator.integers(-3, 4, 3) if dtype == np.float64 else np.array([1.0, 100, 1000])
        self.x = (generator.standard_normal((rows, 3)) * scale + offset).astype(dtype)
        self.x[generator.random(self.x.shape) < holes] = np.nan
        self.x[:2] = offset  # no feature without a value
        self.weights = {
            "none": None,
            "whole": generator.integers(0, 4, rows).astype(float),
            "fractions": generator.random(rows),
            "wide": 10.0 ** generator.integers(-6, 6, rows),
        }[kind]
        if self.weights is not None:
            self.weights[:2] = [1, 2]

    def parts(self) -> list[tuple[Any, Any]]:
        rows = len(self.x)
        cuts = np.unique([0, rows, *self.generator.integers(0, rows, 5)])
        return [(self.x[a:b], None if self.weights is None else self.weights[a:b]) for a, b in pairwise(cuts.tolist())]

    def exact(self, feature: int) -> tuple[Fraction, Fraction, Fraction]:
        seen = ~np.isnan(self.x[:, feature])
        weights = np.ones(len(self.x)) if self.weights is None else self.weights
        return exact_moments(self.x[seen, feature], weights[seen])


CASES = st.builds(
    Case, SEEDS, OFFSETS, DTYPES, st.sampled_from(["none", "whole", "fractions", "wide"]), st.sampled_from([0.0, 0.3])
)


def merged_in_a_tree(pieces: list[Any], generator: np.random.Generator) -> Any:
    """Any two of them at a time, in any order, until one is left."""
    while len(pieces) > 1:
        a, b = generator.choice(len(pieces), 2, replace=False)
        pieces[a].merge(pieces[b])
        del pieces[b]
    return pieces[0]


def learned(scaler: Any, case: Case) -> list[Any]:
    """By one fit, by a stream of batches, by a tree of merges. A batch without any weight is refused, and left out."""
    parts = [(x, w) for x, w in case.parts() if w is None or w.any()]
    streamed = clone(scaler)
    for x, w in parts:
        streamed.partial_fit(x, sample_weight=w)
    pieces = [clone(scaler).partial_fit(x, sample_weight=w) for x, w in parts]
    return [clone(scaler).fit(case.x, sample_weight=case.weights), streamed, merged_in_a_tree(pieces, case.generator)]


@settings(max_examples=60)
@given(CASES)
def test_mean_and_variance_are_exact_whatever_the_split(case: Case) -> None:
    for scaler in learned(StandardScaler(), case):
        for feature in range(3):
            count, mean, m2 = case.exact(feature)
            assert abs(Fraction(scaler.mean_[feature]) - mean) <= Fraction(1, 10**12) * abs(mean) + Fraction(
                1, 10**13
            ) * Fraction(float(scaler.scale_[feature]))
            variance = m2 / count
            assert abs(Fraction(scaler.var_[feature]) - variance) <= Fraction(1, 10**12) * variance
            seen = np.broadcast_to(scaler.n_samples_seen_, 3)[feature]
            assert abs(seen - float(count)) <= 1e-12 * float(count)


@settings(max_examples=40)
@given(CASES)
def test_every_way_of_learning_teaches_the_same(case: Case) -> None:
    for scaler in SCALERS:
        whole, *others = learned(scaler, case)
        expected = whole.transform(case.x)
        for other in others:
            np.testing.assert_allclose(
                other.transform(case.x), expected, rtol=max(1e-12, 4 * np.finfo(case.x.dtype).eps), atol=1e-11
            )


@settings(max_examples=40)
@given(CASES)
def test_a_whole_weight_is_so_many_repetitions(case: Case) -> None:
    weights = case.generator.integers(0, 4, len(case.x))
    weights[:2] = 1
    repeated = case.x.repeat(weights, axis=0)
    for scaler in SCALERS:
        a, b = clone(scaler).fit(case.x, sample_weight=weights), clone(scaler).fit(repeated)
        np.testing.assert_array_equal(a.n_samples_seen_, b.n_samples_seen_)
        np.testing.assert_allclose(
            a.transform(case.x), b.transform(case.x), rtol=max(1e-12, 4 * np.finfo(case.x.dtype).eps), atol=1e-11
        )
    absent = clone(StandardScaler()).fit(case.x[weights > 0], sample_weight=weights[weights > 0])
    present = clone(StandardScaler()).fit(case.x, sample_weight=weights)
    np.testing.assert_allclose(present.var_, absent.var_, rtol=1e-12)


@settings(max_examples=30)
@given(CASES, st.floats(1e-3, 1e3))
def test_a_common_factor_of_the_weights_changes_nothing(case: Case, factor: float) -> None:
    weights = np.ones(len(case.x)) if case.weights is None else case.weights
    a = StandardScaler().fit(case.x, sample_weight=weights)
    b = StandardScaler().fit(case.x, sample_weight=weights * factor)
    np.testing.assert_allclose(b.var_, a.var_, rtol=1e-11)
    np.testing.assert_allclose(b.mean_, a.mean_, rtol=1e-12, atol=1e-12 * a.scale_.max())


@settings(max_examples=60)
@given(SEEDS, st.sampled_from([0.0, 1.0, 1e4, -1e8]), DTYPES)
def test_the_inverse_restores_within_one_rounding(seed: int, offset: float, dtype: Any) -> None:
    """``|x' - x|`` is at most half a step of x plus what the result's own rounding is worth in units of x."""
    generator = np.random.default_rng(seed)
    scale = np.array([1.0, 100, 1000])
    x = (generator.standard_normal((50, 3)) * scale + offset).astype(dtype)
    step = np.spacing(np.abs(x)).astype(np.float64)
    eps = float(np.finfo(dtype).eps)
    for scaler in SCALERS:
        fitted = clone(scaler).fit(x)
        for data in (x, torch.from_numpy(x)):
            back = np.asarray(fitted.inverse_transform(fitted.transform(data)))
            assert back.dtype == dtype
            if isinstance(scaler, MinMaxScaler):
                a, b = scaler.feature_range
                reach = fitted.data_range_ * max(abs(a), abs(b)) / (b - a)
            else:
                reach = np.abs(x - (fitted.mean_ if getattr(scaler, "with_mean", True) else 0.0))
            # In float64 there is no wider arithmetic to hide the other operations' roundings in.
            bound = step / 2 + eps / 2 * reach * 1.001 if dtype == np.float32 else step + 3 * eps * reach
            assert (np.abs(back.astype(np.float64) - x) <= bound).all(), scaler
    if abs(offset) > 1e6:  # far from zero that is: to the last bit, or the one beside it
        back = StandardScaler().fit(x).inverse_transform(StandardScaler().fit_transform(x))
        assert (np.abs(back.astype(np.float64) - x) <= step).all()


@settings(max_examples=60)
@given(
    st.floats(-1e300, 1e300, allow_nan=False, allow_subnormal=False),
    st.integers(1, 5000),
    DTYPES,
    st.sampled_from(["none", "fractions"]),
)
def test_a_constant_is_a_constant_whatever_it_is(value: float, rows: int, dtype: Any, kind: str) -> None:
    assume(abs(value) < 1e38 or dtype == np.float64)
    assume(abs(value) < 1e150)  # beyond, squares overflow, and fit says so
    x = np.full((rows, 1), value, dtype=dtype)
    weights = np.random.default_rng(rows).random(rows) + 0.1 if kind == "fractions" else None
    for scaler in SCALERS:
        fitted = clone(scaler).fit(x, sample_weight=weights)
        y = fitted.transform(x)
        expected = {"MinMaxScaler": getattr(scaler, "feature_range", (0,))[0]}.get(type(scaler).__name__, 0.0)
        if getattr(scaler, "with_mean", True):
            assert (y == expected).all()
        if not isinstance(scaler, MinMaxScaler):
            assert getattr(fitted, "scale_", np.ones(1)) == 1
        assert (fitted.inverse_transform(y) == x).all()


@settings(max_examples=60)
@given(SEEDS, st.sampled_from([1e-6, 0.1, 1 / 3, 7.7, 1e8, -1e15]), st.integers(2, 3000))
def test_noise_of_the_last_bit_is_not_amplified(seed: int, value: float, rows: int) -> None:
    """Rounding noise beside a constant: StandardScaler leaves it as small as it is."""
    generator = np.random.default_rng(seed)
    x = value + np.spacing(value) * generator.integers(-1, 2, (rows, 1))
    fitted = StandardScaler().fit(x)
    assert fitted.scale_[0] == 1
    assert np.abs(fitted.transform(x)).max() <= 4 * abs(np.spacing(value))
    np.testing.assert_array_equal(fitted.inverse_transform(fitted.transform(x)), x)
    two = MinMaxScaler().fit(np.r_[x[:1], x[:1] + np.spacing(value)])
    assert np.abs(two.transform(x) + 1).max() <= 8 * abs(np.spacing(value))


@settings(max_examples=60)
@given(SEEDS, st.sampled_from([0.1, 1.0, 1e4, 1e8]), st.integers(4, 200))
def test_a_deviation_above_the_error_bound_is_one(seed: int, value: float, rows: int) -> None:
    """A hundred times the bound ``n eps |mean|``, still tiny: standardized, and right."""
    generator = np.random.default_rng(seed)
    deviation = 100 * rows * np.finfo(float).eps * value
    x = value + deviation * np.where(np.arange(rows) % 2, 1.0, -1.0)[:, None]
    x = generator.permutation(x)
    fitted = StandardScaler().fit(x)
    _, mean, m2 = exact_moments(x[:, 0], np.ones(rows))
    assert abs(fitted.var_[0] - float(m2 / rows)) <= 1e-12 * float(m2 / rows)
    assert fitted.scale_[0] == pytest.approx(float(m2 / rows) ** 0.5, rel=1e-12)
    exact = [float((Fraction(v) - mean) / Fraction(float(fitted.scale_[0]))) for v in x[:, 0]]
    np.testing.assert_allclose(fitted.transform(x)[:, 0], exact, rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(CASES)
def test_holes_stay_where_they_are(case: Case) -> None:
    for scaler in SCALERS:
        y = clone(scaler).fit(case.x, sample_weight=case.weights).transform(case.x)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(case.x))
    rows = np.isnan(case.x).any(axis=1)
    assume((~rows).sum() > 4)
    y = Whitener("zca").fit(case.x).transform(case.x)
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(rows[:, None], y.shape))
