"""MeanSubtractor, StandardScaler and MinMaxScaler against the textbook, scikit-learn and exact arithmetic."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sklearn.preprocessing as peers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler
from oracles.moments import exact_moments
from oracles.preprocessing import min_max, standardize

SEEDS = st.integers(0, 2**32 - 1)
SCALERS = [MeanSubtractor(), StandardScaler(), StandardScaler(with_mean=False), MinMaxScaler(), MinMaxScaler((0, 1))]


def data(seed: int, rows: int = 40, columns: int = 3, offset: float = 0.0, missing: float = 0.0) -> Any:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, columns)) * [1, 10, 0.01, 3][:columns] + offset
    x[generator.random(x.shape) < missing] = np.nan
    return x


def learned(estimator: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(estimator).items() if name.endswith("_")}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_textbook(dtype: Any) -> None:
    x = data(0).astype(dtype)
    tolerance = {"atol": 4 * np.finfo(dtype).eps, "rtol": 4 * np.finfo(dtype).eps}
    for got, expected in (
        (MeanSubtractor().fit_transform(x), x - x.astype(float).mean(0)),
        (StandardScaler().fit_transform(x), standardize(x)),
        (MinMaxScaler().fit_transform(x), min_max(x, -1, 1)),
        (MinMaxScaler((2, 5)).fit_transform(x), min_max(x, 2, 5)),
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, expected, **tolerance)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([0.0, 0.4]), st.booleans())
def test_scikit_learn_agrees_on_attributes_and_results(seed: int, missing: float, weighted: bool) -> None:
    x = data(seed, missing=missing)
    x[0] = 1.5  # no column is missing throughout
    weights = np.random.default_rng(seed).random(len(x)) if weighted else None
    for parameters in ({}, {"with_mean": False}, {"with_std": False}, {"with_mean": False, "with_std": False}):
        ours = StandardScaler(**parameters).fit(x, sample_weight=weights)
        theirs = peers.StandardScaler(**parameters).fit(x, sample_weight=weights)
        for name, expected in learned(theirs).items():
            got = getattr(ours, name)
            if parameters == {"with_mean": False, "with_std": False} and name == "n_samples_seen_" and weighted:
                continue  # scikit-learn forgets the weights here
            assert (got is None) == (expected is None), name
            if expected is not None:
                np.testing.assert_allclose(got, expected, rtol=1e-10, err_msg=name)
        np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=1e-9, atol=1e-12)
    for bounds in ((0, 1), (-1, 1), (-3, 0.5)):
        for clip in (False, True):
            ours, theirs = MinMaxScaler(bounds, clip=clip).fit(x), peers.MinMaxScaler(bounds, clip=clip).fit(x)
            for name, expected in learned(theirs).items():
                np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-12, err_msg=name)
            wider = x * 1.5
            np.testing.assert_allclose(ours.transform(wider), theirs.transform(wider), rtol=1e-9, atol=1e-12)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([0.0, 1e4, 1e8]), st.sampled_from([np.float32, np.float64]))
def test_any_split_by_partial_fit_or_merge_is_one_fit(seed: int, offset: float, dtype: Any) -> None:
    generator = np.random.default_rng(seed)
    x = data(seed, offset=offset, missing=0.2).astype(dtype)
    x[0] = x[1] = offset
    weights = generator.integers(0, 3, len(x)) + 0.5
    cuts = [0, *np.unique(generator.integers(2, len(x), 4)), len(x)]
    parts = [(x[a:b], weights[a:b]) for a, b in pairwise(cuts)]
    for scaler in SCALERS:
        whole = clone(scaler).fit(x, sample_weight=weights)
        # partial_fit, unlike fit, is silent about a part with a feature without a value
        streamed, pieces = clone(scaler), [clone(scaler).partial_fit(p, sample_weight=w) for p, w in parts]
        for p, w in parts:
            streamed.partial_fit(p, sample_weight=w)
        generator.shuffle(pieces)  # type: ignore[arg-type]
        merged = reduce(lambda a, b: a.merge(b), pieces, clone(scaler))
        for name, expected in learned(whole).items():
            if expected is not None:
                # A mean may cancel to next to nothing: beside deviations of 0.01 and more, 1e-15 is exact.
                for learner in (streamed, merged):
                    np.testing.assert_allclose(getattr(learner, name), expected, rtol=2e-12, atol=1e-15, err_msg=name)
    scaler = StandardScaler().fit(x, sample_weight=weights)
    for feature in range(3):
        seen = ~np.isnan(x[:, feature])
        count, mean, m2 = exact_moments(x[seen, feature], weights[seen])
        assert abs(scaler.mean_[feature] - float(mean)) <= 1e-12 * abs(float(mean)) + 1e-14
        assert abs(scaler.var_[feature] - float(m2 / count)) <= 1e-12 * float(m2 / count)


def test_merge_leaves_its_argument_as_it_was() -> None:
    for scaler in SCALERS:
        a, b = clone(scaler).fit(data(0)), clone(scaler).fit(data(1))
        before = {name: np.copy(value) for name, value in learned(b).items()}
        assert a.merge(b) is a
        a.partial_fit(data(2))
        for name, value in before.items():
            np.testing.assert_array_equal(getattr(b, name), value)


def test_fit_forgets_and_partial_fit_does_not() -> None:
    for scaler in SCALERS:
        again = clone(scaler).fit(data(0, columns=2)).fit(data(1))
        fresh = clone(scaler).fit(data(1))
        for name, value in learned(fresh).items():
            np.testing.assert_array_equal(getattr(again, name), value)
        assert again.partial_fit(data(2)).n_samples_seen_ == 80


def test_a_constant_feature_is_centred_and_not_amplified() -> None:
    noise = np.finfo(float).eps
    for value in (0.1, 1e8 / 3, 1e-150, -7.0, 0.0):
        x = np.full((1000, 2), value)
        x[::2, 1] += noise * value  # the last bit flickers
        scaler = StandardScaler().fit(x)
        assert scaler.scale_.tolist() == [1, 1]
        assert np.abs(scaler.transform(x)).max() <= noise * abs(value)
        scaler = MinMaxScaler().fit(x)
        assert scaler.scale_.tolist() == [2, 2]
        np.testing.assert_allclose(scaler.transform(x), -1, atol=4 * noise * max(1, abs(value)))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-3])
def test_small_or_far_is_not_constant(scale: float) -> None:
    x = scale * np.array([[-1.0], [1.0]] * 50)
    np.testing.assert_allclose(StandardScaler().fit(x).scale_, scale, rtol=1e-12)
    np.testing.assert_allclose(MinMaxScaler().fit_transform(x), np.sign(x), rtol=1e-12)
    # The bound does not grow with the data: so much data would hide this deviation from n eps |mean|.
    far = np.array([[1e8 - 2.0**-10], [1e8 + 2.0**-10]] * 100_000)
    np.testing.assert_allclose(StandardScaler().fit(far).scale_, 2.0**-10, rtol=1e-12)


@pytest.mark.parametrize("scaler", SCALERS, ids=str)
@pytest.mark.parametrize("shape", [(20, 3, 5), (7, 3, 4, 2)])
def test_channels_are_features_whose_positions_are_samples(scaler: Any, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape) + 5
    x[0, 1, 0] = np.nan
    rows = np.moveaxis(x, 1, -1).reshape(-1, 3)
    by_channel, flat = clone(scaler).set_params(channel_axis=1).fit(x), clone(scaler).fit(rows)
    for name, expected in learned(flat).items():
        if expected is not None:
            np.testing.assert_allclose(getattr(by_channel, name), expected, rtol=1e-13, err_msg=name)
    y = by_channel.transform(x)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1).reshape(-1, 3), flat.transform(rows), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(by_channel.inverse_transform(y), x, rtol=1e-12)
    last = clone(scaler).set_params(channel_axis=-1).fit(np.moveaxis(x, 1, -1))
    np.testing.assert_allclose(last.transform(np.moveaxis(x, 1, -1)), np.moveaxis(y, 1, -1), rtol=1e-12, atol=1e-14)
    weights = np.arange(shape[0]) % 3
    weighted = clone(by_channel).fit(x, sample_weight=weights)
    repeated = clone(by_channel).fit(x.repeat(weights, axis=0))
    np.testing.assert_allclose(weighted.transform(x), repeated.transform(x), rtol=1e-11, atol=1e-13)
    assert weighted.n_features_in_ == 3


@pytest.mark.parametrize("scaler", SCALERS, ids=str)
def test_inverse(scaler: Any) -> None:
    x = data(4, offset=1e3, missing=0.1)
    fitted = clone(scaler).fit(x)
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(x)), x, rtol=1e-12)


def test_far_from_zero_the_result_of_float32_data_is_that_of_float64() -> None:
    x = (np.random.default_rng(0).standard_normal((500, 2)) * 1000 + 1e8).astype(np.float32)
    expected = standardize(x)
    np.testing.assert_allclose(StandardScaler().fit_transform(x), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        StandardScaler().fit_transform(torch.from_numpy(x)).numpy(), expected, rtol=1e-6, atol=1e-7
    )


def test_copy_false_works_in_place_and_copy_true_does_not() -> None:
    for scaler in (MeanSubtractor(), StandardScaler(), MinMaxScaler()):
        for make in (np.array, torch.tensor):
            x = make(data(0))
            before = x + 0
            fitted = clone(scaler).fit(x)
            y = fitted.transform(x)
            assert bool((x == before).all())
            in_place = fitted.set_params(copy=False).transform(x)
            assert in_place is x
            assert bool((x == y).all())
            fitted.inverse_transform(x)
            np.testing.assert_allclose(np.asarray(x), np.asarray(before), rtol=1e-12, atol=1e-14)
    x = data(0)
    scaler = StandardScaler(copy=False).fit(x)
    assert not np.shares_memory(scaler.transform(x, copy=True), x)


def test_one_row() -> None:
    for scaler in SCALERS:
        fitted = clone(scaler).fit([[1.0, 2.0]])
        assert np.isfinite(fitted.transform([[3.0, -1.0]])).all()
    assert StandardScaler().fit([[1.0, 2.0]]).transform([[3.0, 2.0]]).tolist() == [[2, 0]]


def test_a_feature_without_values_has_nan_statistics_and_a_warning_until_values_come() -> None:
    x = np.array([[np.nan, 1.0], [np.nan, 3.0]])
    for scaler in SCALERS:
        with pytest.warns(RuntimeWarning, match="saw only NaN in feature 0: its statistics are NaN"):
            fitted = clone(scaler).fit(x)
        assert np.isnan(fitted.transform([[1.0, 2.0]])).tolist() == [[True, False]]
        whole = clone(scaler).fit([[4.0, 1.0], [6.0, 3.0]])
        fitted.partial_fit([[4.0, np.nan], [6.0, np.nan]])
        np.testing.assert_allclose(fitted.transform([[5.0, 2.0]]), whole.transform([[5.0, 2.0]]))
