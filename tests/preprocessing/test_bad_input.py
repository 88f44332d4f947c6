"""Bad input: one line that says what came and what to do, and an estimator that is as it was."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from batchnorm import BatchnormError, DtypeError, InputError, ShapeError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener

X = np.random.default_rng(0).standard_normal((20, 3))
ESTIMATORS = [MeanSubtractor(), StandardScaler(), MinMaxScaler(), Whitener("pca"), Whitener("cholesky")]


def with_value(value: float) -> Any:
    x = X.copy()
    x[7, 2] = value
    return x


BAD_FITS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (with_value(np.inf), {}, InputError, "Input X contains infinity: row 7, column 2; remove the row, or write NaN"),
    (torch.tensor(with_value(-np.inf)), {}, InputError, "Input X contains infinity: row 7, column 2"),
    (pd.DataFrame(with_value(np.inf), columns=["a", "b", "c"]), {}, InputError, r"infinity: row 7, column 2 \('c'\)"),
    (X[0], {}, ShapeError, "Expected 2D array, got 1D array instead. Reshape your data"),
    (X[0].tolist(), {}, ShapeError, "Expected 2D array, got 1D array instead. Reshape your data"),
    (torch.ones(2, 3, 4), {}, ShapeError, "Expected 2D array, got 3D array.* pass channel_axis=1"),
    (X[:0], {}, ShapeError, r"Found array with 0 sample\(s\)"),
    (torch.ones(0, 3), {}, ShapeError, r"Found array with 0 sample\(s\)"),
    (torch.ones(3, 0), {}, ShapeError, r"Found array with 0 feature\(s\)"),
    ([[1, 2], [3]], {}, ShapeError, "expected rows of one length, got 2 values in row 0 and 1 in row 1"),
    ([["a", "b"], ["c", "d"]], {}, InputError, r"expected numbers, got text \('a'\) in row 0, column 0"),
    (
        pd.DataFrame({"a": ["x", "y"], "b": [1, 2]}),
        {},
        InputError,
        "expected numbers, got .* in column 'a': encode or drop",
    ),
    (np.array([[1, "x"], [2, 3]], dtype=object), {}, InputError, r"got text \('x'\) in row 0, column 1"),
    (np.array([["1", "2"], ["3", "4"]]), {}, InputError, r"got text \('1'\) in row 0, column 0"),
    (np.full((2, 3), "2020", dtype="datetime64[D]"), {}, DtypeError, "got an array of datetime64"),
    ([[1, 2], [3, [4]]], {}, ShapeError, "got lists of different lengths within the rows"),
    ([], {}, ShapeError, "Expected 2D array, got 1D array"),
    ([[]], {}, ShapeError, r"Found array with 0 feature\(s\)"),
    (3.0, {}, ShapeError, "Expected 2D array, got 0D array"),
    (X * 1j, {}, InputError, "Complex data not supported"),
    (torch.ones(3, 3) * 1j, {}, DtypeError, "expected real numbers, got a tensor of torch.complex64"),
    (X, {"sample_weight": np.ones(3)}, ShapeError, r"sample_weight must have shape \(20,\).*got \(3,\)"),
    (X, {"sample_weight": [1.0] * 19 + [-1.0]}, InputError, "not negative, got -1.0 for row 19"),
    (X, {"sample_weight": np.zeros(20)}, InputError, "at least one non-zero number"),
    (X, {"sample_weight": 0}, InputError, "at least one non-zero number"),
    (X, {"sample_weight": -1.0}, InputError, "not negative, got -1.0 for row 0"),
    (
        X,
        {"sample_weight": np.ones((20, 1))},
        ShapeError,
        r"must have shape \(20,\), one weight a sample, got \(20, 1\)",
    ),
    (X, {"sample_weight": [1.0] * 3 + [np.inf] + [1.0] * 16}, InputError, "must be finite .* got inf for row 3"),
    (X, {"sample_weight": ["a"] * 20}, InputError, "sample_weight must be numbers"),
    (
        X,
        {"sample_weight": torch.full((20,), torch.nan)},
        InputError,
        "must be finite and not negative, got nan for row 0",
    ),
]


@pytest.mark.filterwarnings("ignore:X has feature names")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(("x", "parameters", "error", "text"), BAD_FITS, ids=[case[3] for case in BAD_FITS])
def test_a_failed_fit_says_why_and_changes_nothing(
    estimator: Any, x: Any, parameters: dict[str, Any], error: type[Exception], text: str
) -> None:
    for fitted in (clone(estimator), clone(estimator).fit(X + 5)):
        before, written = dict(vars(fitted)), pickle.dumps(fitted)
        for learn in (fitted.fit, fitted.partial_fit):
            with pytest.raises(error, match=text) as caught:
                learn(x, **parameters)
            assert isinstance(caught.value, BatchnormError)
            assert "\n" not in str(caught.value)
            assert vars(fitted) == before
            assert pickle.dumps(fitted) == written
    np.testing.assert_array_equal(fitted.transform(X), clone(estimator).fit(X + 5).transform(X))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_transform_and_merge(estimator: Any) -> None:
    fitted = clone(estimator).fit(X)
    for call in (fitted.transform, fitted.inverse_transform, fitted.partial_fit):
        for x in (X[:, :2], torch.from_numpy(X[:, :2])):
            with pytest.raises(
                ShapeError, match=f"X has 2 features, but {type(estimator).__name__} is expecting 3 feat"
            ):
                call(x)
        with pytest.raises(InputError, match="Input X contains infinity: row 7, column 2"):
            call(with_value(np.inf))
    with pytest.raises(NotFittedError):
        clone(estimator).transform(X)
    with pytest.raises(NotFittedError):
        fitted.merge(clone(estimator))
    with pytest.raises(ShapeError, match="different width: 2 features into 3"):
        fitted.merge(clone(estimator).fit(X[:, :2]))
    other = next(e for e in ESTIMATORS if type(e) is not type(estimator))
    with pytest.raises(DtypeError, match=f"expected another {type(estimator).__name__} to merge"):
        fitted.merge(clone(other).fit(X))
    named = clone(estimator).fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    with pytest.raises(InputError, match="other names, 'z' instead of 'b'"):
        named.merge(clone(estimator).fit(pd.DataFrame(X, columns=["a", "z", "c"])))
    in_place = X.copy()
    in_place[7, 2] = np.inf
    before = in_place.copy()
    if "copy" in estimator.get_params():
        with pytest.raises(InputError):
            fitted.set_params(copy=False).transform(in_place)
        np.testing.assert_array_equal(in_place, before)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_other_names_are_refused_and_change_nothing(estimator: Any) -> None:
    fitted = clone(estimator).fit(pd.DataFrame(X, columns=["a", "b", "c"]))
    written = pickle.dumps(fitted)
    for names in (["a", "c", "b"], ["a", "b", "z"]):
        other = pd.DataFrame(X, columns=names)
        for call in (fitted.transform, fitted.partial_fit):
            with pytest.raises(InputError, match="feature names should match those that were passed during fit"):
                call(other)
        with pytest.raises(InputError, match="other names"):
            fitted.merge(clone(estimator).fit(other))
    assert pickle.dumps(fitted) == written


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_an_interrupted_fit_changes_nothing(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    fitted = clone(estimator).fit(X)
    written = pickle.dumps(fitted)
    monkeypatch.setattr(type(fitted), "_publish", interrupted)
    for call in (fitted.fit, fitted.partial_fit):
        with pytest.raises(KeyboardInterrupt):
            call(X)
    with pytest.raises(KeyboardInterrupt):
        fitted.merge(pickle.loads(written))
    assert pickle.dumps(fitted) == written


def test_what_a_mask_hides_is_missing() -> None:
    hidden = np.ma.masked_array([[1.0, 2], [3, 5], [9, 9]], mask=[[0, 0], [0, 0], [0, 1]])
    np.testing.assert_allclose(StandardScaler().fit_transform(hidden)[:, 1], [-1, 1, np.nan])
    whole = np.ma.masked_array([[1, 2], [3, 5], [9, 9]], mask=[[0, 0], [0, 0], [0, 1]])
    assert StandardScaler().fit(whole).n_samples_seen_.tolist() == [3, 2]


def test_overflow_of_float64() -> None:
    for estimator in (StandardScaler(), Whitener()):
        with pytest.raises(InputError, match="values too large: their range or their squares overflow float64"):
            estimator.fit(X * 1e200)
    with pytest.raises(InputError, match="values too large"):
        MinMaxScaler().fit([[-1.5e308], [1.5e308]])


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        (Whitener("svd"), "expected method to be one of 'pca', 'zca', 'cholesky', 'pca-cor', 'zca-cor', got 'svd'"),
        (Whitener(n_components=0), r"n_components must be an integer from 1, a share .* got 0"),
        (Whitener(n_components=1.5), r"n_components must be an integer from 1, a share .* got 1.5"),
        (Whitener(n_components="mle"), "n_components must be an integer from 1"),
        (Whitener(n_components=4), "n_components=4 is more than the data's n_features = 3"),
        (Whitener("cholesky", n_components=0.5), "has no shares of variance: n_components must be whole, got 0.5"),
        (Whitener(shrinkage="oas"), "shrinkage must be None, \"ledoit-wolf\" or a number in .* got 'oas'"),
        (Whitener(shrinkage=1.2), "shrinkage must be None"),
        (Whitener(shrinkage=True), "shrinkage must be None"),
        (Whitener(eps=-1e-3), "eps must be a finite number and not negative, got -0.001"),
        (Whitener(tol=float("nan")), "tol must be a finite number and not negative, got nan"),
        (MinMaxScaler((1, 1)), r"Minimum of desired feature range must be smaller than maximum.*got \(1, 1\)"),
        (MinMaxScaler(3), "expected feature_range="),  # type: ignore[arg-type]
        (StandardScaler(channel_axis=0), r"channel_axis must be None or the axis of the channels .* got 0"),
        (StandardScaler(channel_axis=2), "channel_axis=2 is not an axis of 2-D data after the samples"),
        (StandardScaler(channel_axis="1"), "channel_axis must be None"),  # type: ignore[arg-type]
    ],
)
def test_parameters(estimator: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        estimator.fit(X)
    assert not hasattr(estimator, "n_features_in_")


def test_whiteners_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="cannot merge a Whitener of method='zca' into one of method='pca'"):
        Whitener("pca").fit(X).merge(Whitener("zca").fit(X))
    with pytest.raises(InputError, match="ledoit-wolf"):
        Whitener(shrinkage="ledoit-wolf").fit(X).merge(Whitener().fit(X))
    with pytest.raises(AttributeError, match="has no components"):
        _ = Whitener("cholesky").fit(X).components_
    with pytest.raises(InputError, match=r"needs at least one direction with variance, got n_samples = 1"):
        Whitener("pca").fit(X[:1])
    with pytest.raises(InputError, match="every sample has a NaN in some feature"):
        Whitener("zca").fit(X * [1, 1, np.nan])
