"""Sparse data give what they give when dense, stay sparse, and are refused where zeros would not stay zeros."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from batchnorm import DtypeError, InputError, ShapeError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener
from batchnorm.preprocessing import sparse as module
from oracles.moments import exact_moments

SCALERS = [
    StandardScaler(with_mean=False),
    StandardScaler(with_mean=False, with_std=False),
    MinMaxScaler((0, 1)),
    MinMaxScaler((0, 3), clip=True),
]
FORMATS = [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array]


def dense(seed: int, rows: int = 40, columns: int = 5, dtype: Any = np.float64) -> Any:
    """Not negative, so that every scaler takes it; mostly zeros, some NaN."""
    generator = np.random.default_rng(seed)
    x = np.abs(generator.standard_normal((rows, columns))) * [1, 1e3, 1e-4, 1, 0][:columns] + 0.1
    x[generator.random(x.shape) < 0.6] = 0
    x[:, 3] = 7  # without any zero
    x[generator.random(x.shape) < 0.1] = np.nan
    x[0] = 0
    return x.astype(dtype)


def learned(estimator: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(estimator).items() if name.endswith("_") and value is not None}


def assert_same(a: Any, b: Any) -> None:
    for name, expected in learned(b).items():
        np.testing.assert_allclose(getattr(a, name), expected, rtol=1e-12, atol=1e-300, err_msg=name)


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(FORMATS),
    st.sampled_from([np.float32, np.float64, np.int64]),
    st.sampled_from(["none", "whole", "fractions"]),
)
def test_the_same_as_dense(seed: int, make: Any, dtype: Any, weighted: str) -> None:
    generator = np.random.default_rng(seed)
    x = np.nan_to_num(dense(seed)).astype(dtype) if dtype == np.int64 else dense(seed, dtype=dtype)
    weights = {"none": None, "whole": generator.integers(0, 3, 40), "fractions": generator.random(40)}[weighted]
    for scaler in SCALERS:
        expected = clone(scaler).fit(x, sample_weight=weights)
        fitted = clone(scaler).fit(make(x), sample_weight=weights)
        assert_same(fitted, expected)
        cuts = [0, 9, 10, 31, 40]
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        own = [None if weights is None else weights[part] + 1e-3 for part in parts]
        streamed = clone(scaler)
        for part, w in zip(parts, own, strict=True):
            streamed.partial_fit(make(x[part]), sample_weight=w)
        pieces = [clone(scaler).partial_fit(make(x[p]), sample_weight=w) for p, w in zip(parts, own, strict=True)]
        whole = clone(scaler).fit(x, sample_weight=None if weights is None else weights + 1e-3)
        assert_same(streamed, whole)
        assert_same(reduce(lambda a, b: a.merge(b), reversed(pieces)), whole)


@pytest.mark.parametrize("make", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scaler", SCALERS, ids=str)
def test_transform_keeps_class_dtype_and_places(make: Any, dtype: Any, scaler: Any) -> None:
    x = dense(1, dtype=dtype)
    x[:, 3] = 0  # MinMaxScaler would fill in the zeros of a column that never had one
    matrix = make(x)
    fitted = clone(scaler).fit(matrix)
    for call in (fitted.transform, fitted.inverse_transform):
        y = call(matrix)
        assert type(y) is type(matrix)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.indices, matrix.indices)
        assert not np.shares_memory(y.indices, matrix.indices)
        np.testing.assert_array_equal(y.toarray(), call(x))
        np.testing.assert_array_equal(matrix.toarray(), x)
    back = fitted.inverse_transform(fitted.transform(matrix))
    np.testing.assert_allclose(back.toarray(), x, rtol=2 * np.finfo(dtype).eps)
    assert fitted.set_params(copy=False).transform(matrix) is matrix
    np.testing.assert_array_equal(matrix.toarray(), fitted.set_params(copy=True).transform(x))


def test_other_formats_and_integers() -> None:
    x = np.array([[0, 2, 0], [4, 0, 0]])
    expected = StandardScaler(with_mean=False).fit_transform(x)
    for make in (sparse.coo_matrix, sparse.lil_array, sparse.dok_matrix, sparse.bsr_matrix, sparse.dia_array):
        y = StandardScaler(with_mean=False).fit_transform(make(x))
        assert y.format == "csr"
        np.testing.assert_array_equal(y.toarray(), expected)
    scaler = StandardScaler(with_mean=False).fit(sparse.csr_array(x))
    np.testing.assert_array_equal(scaler.transform(sparse.csc_array(x)).toarray(), scaler.transform(x))


def test_values_in_parts_and_stored_zeros_count_once() -> None:
    parts = sparse.csr_matrix((np.array([1.0, 2.0, 0.0, 5.0]), np.array([0, 0, 1, 1]), np.array([0, 3, 4])), (2, 2))
    before = parts.copy()
    scaler = StandardScaler(with_mean=False).fit(parts)
    np.testing.assert_allclose(scaler.mean_, [1.5, 2.5])
    np.testing.assert_allclose(scaler.transform(parts).toarray(), np.array([[3, 0], [0, 5]]) / scaler.scale_)
    np.testing.assert_array_equal(parts.data, before.data)


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("make", FORMATS[:2])
def test_exact_in_blocks_and_far_from_zero(offset: float, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 64)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((400, 3)) + offset
    x[generator.random(x.shape) < [0, 0.1, 0.9]] = 0
    weights = generator.random(400)
    for w in (None, weights):
        scaler = StandardScaler(with_mean=False).fit(make(x), sample_weight=w)
        for column in range(3):
            count, mean, m2 = exact_moments(x[:, column], np.ones(400) if w is None else w)
            assert abs(scaler.mean_[column] - float(mean)) <= 1e-12 * abs(float(mean))
            assert abs(scaler.var_[column] - float(m2 / count)) <= 1e-12 * float(m2 / count)


def test_weights_that_round_leave_no_phantom_zeros() -> None:
    """A column stored in full has no zeros, whatever the sum of the weights rounds to."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1000, 1)) + 1e8
    weights = generator.random(1000) * 10.0 ** generator.integers(-8, 3, 1000)
    count, _, m2 = exact_moments(x[:, 0], weights)
    scaler = StandardScaler(with_mean=False).fit(sparse.csc_matrix(x), sample_weight=weights)
    assert abs(scaler.var_[0] - float(m2 / count)) <= 1e-12 * float(m2 / count)
    # The zeros weigh next to nothing beside the rest, and still count for what they are.
    x[:3] = 0
    weights[:3] = 1e-12
    count, _, m2 = exact_moments(x[:, 0], weights)
    scaler.fit(sparse.csc_matrix(x), sample_weight=weights)
    assert abs(scaler.var_[0] - float(m2 / count)) <= 1e-11 * float(m2 / count)


def test_nothing_is_made_dense() -> None:
    rows = columns = 1_000_000  # 8 TB
    matrix = sparse.csr_matrix(([3.0, 4.0], ([0, 5], [7, 7])), shape=(rows, columns))
    y = StandardScaler(with_mean=False).fit_transform(matrix)
    np.testing.assert_allclose(y.data, np.array([3.0, 4.0]) / np.sqrt(25 / rows - (7 / rows) ** 2))
    y = MinMaxScaler((0, 2)).fit_transform(matrix)
    assert y.data.tolist() == [1.5, 2.0]


@pytest.mark.filterwarnings("ignore:Sparse CS[CR] tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
def test_torch(layout: Any, dtype: Any) -> None:
    x = torch.from_numpy(np.nan_to_num(dense(2)[:, :3]) * 10).to(dtype)
    matrix = x.to_sparse(layout=layout)
    scaler = StandardScaler(with_mean=False).fit(matrix)
    expected = StandardScaler(with_mean=False).fit(x)
    assert_same(scaler, expected)
    y = scaler.transform(matrix)
    assert y.layout == layout
    assert torch.equal(y.to_dense(), expected.transform(x))
    assert torch.equal(scaler.inverse_transform(y).to_dense(), expected.inverse_transform(expected.transform(x)))
    with pytest.raises(ShapeError, match="X has 2 features, but StandardScaler is expecting 3"):
        scaler.transform(x[:, :2].to_sparse(layout=layout))


CSR = sparse.csr_matrix(np.array([[0, 1.0], [2.0, 3.0]]))


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        (StandardScaler(), "StandardScaler cannot center it .* pass with_mean=False, which keeps them; or pass dense"),
        (MeanSubtractor(), r"MeanSubtractor would fill in its zeros: use StandardScaler\(with_mean=False\)"),
        (Whitener("zca"), r"Whitener would fill in its zeros: use StandardScaler\(with_mean=False\)"),
        (MinMaxScaler(), r"MinMaxScaler would fill in its zeros: use feature_range=\(0, 1\).*MaxAbsScaler"),
        (MinMaxScaler((0, 1), channel_axis=2), "sparse data are 2-D, rows of features, got channel_axis=2: use None"),
    ],
)
def test_refused_where_zeros_would_be_filled_in(estimator: Any, text: str) -> None:
    before = dict(vars(estimator))
    for call in (estimator.fit, estimator.partial_fit, estimator.fit_transform):
        with pytest.raises(InputError, match=text) as caught:
            call(CSR)
        assert "\n" not in str(caught.value)
        assert vars(estimator) == before
    if not isinstance(estimator, MinMaxScaler):
        fitted = clone(estimator).fit(CSR.toarray())
        for call in (fitted.transform, fitted.inverse_transform):
            with pytest.raises(InputError, match=text):
                call(CSR)


def test_a_minimum_that_is_not_zero_is_refused_by_transform() -> None:
    scaler = MinMaxScaler((0, 1)).fit(CSR)
    with pytest.raises(InputError, match=r"0 becomes -0.5 in feature 1, which would fill in all zeros: pass X.toarray"):
        scaler.transform(CSR)
    np.testing.assert_allclose(scaler.transform(CSR.toarray()), [[0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (sparse.csc_matrix([[0, 0], [0, np.inf]]), InputError, "Input X contains infinity: row 1, column 1"),
        (sparse.csr_matrix(CSR * 1j), InputError, "Complex data not supported"),
        (sparse.csr_matrix((0, 2)), ShapeError, r"Found array with 0 sample\(s\)"),
        (sparse.coo_array(np.array([1.0, 0])), ShapeError, "Expected 2D input"),
        (sparse.csr_matrix(np.eye(3)), ShapeError, "X has 3 features, but StandardScaler is expecting 2"),
        (sparse.csr_matrix(CSR * 1e200), InputError, "values too large"),
        (torch.eye(2).to_sparse(), DtypeError, "tensor of torch.sparse_coo: expected CSR or CSC, X.to_sparse_csr"),
    ],
)
def test_bad_sparse_data_change_nothing(x: Any, error: Any, text: str) -> None:
    scaler = StandardScaler(with_mean=False).fit(CSR)
    before = dict(vars(scaler))
    with pytest.raises(error, match=text):
        scaler.partial_fit(x)
    assert vars(scaler) == before


def test_frames_of_sparse_data_do_not_exist() -> None:
    scaler = StandardScaler(with_mean=False).set_output(transform="pandas").fit(CSR)
    with pytest.raises(InputError, match="has no frames of sparse data"):
        scaler.transform(CSR)


def test_in_a_pipeline() -> None:
    x = dense(3, rows=60)
    x = sparse.csr_matrix(np.nan_to_num(x))
    y = np.arange(60) % 2
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression()).fit(x, y)
    assert model.predict(x).shape == (60,)


def test_streams_of_sparse_batches() -> None:
    x = dense(4)
    whole = StandardScaler(with_mean=False).fit(x)
    matrix = sparse.csr_matrix(x)
    parts = [matrix[:7], matrix[7:8], matrix[8:]]
    for stream in (parts, iter(parts)):
        scaler = StandardScaler(with_mean=False).fit(stream)
        assert_same(scaler, whole)
    out = list(scaler.transform(iter(parts)))
    assert all(y.format == "csr" for y in out)
    np.testing.assert_array_equal(sparse.vstack(out).toarray(), scaler.transform(x))
    bad = [matrix[:7], sparse.csr_matrix(np.where(np.eye(5) > 0, np.inf, 0))]
    with pytest.raises(InputError, match="infinity: row 7, column 0"):
        scaler.fit(iter(bad))
    assert_same(scaler, whole)
