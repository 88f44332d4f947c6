"""Whitener against Kessy, Lewin and Strimmer's forms, NumPy's SVD, and scikit-learn's PCA and Ledoit-Wolf."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf as peer_ledoit_wolf
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from batchnorm.preprocessing import Whitener
from batchnorm.preprocessing.decomposition import cholesky_whitening, default_tolerance
from batchnorm.preprocessing.spectrum import fix_signs
from oracles.preprocessing import ledoit_wolf, whitening_matrix

METHODS = ("pca", "zca", "cholesky", "pca-cor", "zca-cor")
SEEDS = st.integers(0, 2**32 - 1)


def data(seed: int = 0, rows: int = 60, columns: int = 4, offset: float = 0.0) -> Any:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((columns, columns)) + 2 * np.eye(columns)
    return generator.standard_normal((rows, columns)) @ mixing + offset


def covariance(y: Any) -> Any:
    return np.atleast_2d(np.cov(np.asarray(y, dtype=np.float64).T, bias=True))


def up_to_signs(a: Any, b: Any) -> Any:
    return a * np.sign((a * b).sum(1, keepdims=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_matrix_is_the_textbooks_and_whitens(method: str, offset: float) -> None:
    x = data(offset=offset)
    fitted = Whitener(method).fit(x)
    expected = whitening_matrix(data(), method)
    got = up_to_signs(fitted.whitening_, expected) if method.startswith("pca") else fitted.whitening_
    np.testing.assert_allclose(got, expected, rtol=1e-6 if offset else 1e-9, atol=1e-6 if offset else 1e-9)
    y = fitted.transform(x)
    np.testing.assert_allclose(covariance(y), np.eye(4), atol=1e-11)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-11)
    np.testing.assert_allclose(fitted.inverse_transform(y), x, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(fitted.dewhitening_ @ fitted.whitening_, np.eye(4), atol=1e-11)


def test_what_sets_each_form_apart() -> None:
    x = data()
    zca, cor, chol = (Whitener(m).fit(x).whitening_ for m in ("zca", "zca-cor", "cholesky"))
    np.testing.assert_allclose(zca, zca.T, atol=1e-12)
    np.testing.assert_allclose(cor * x.std(0), (cor * x.std(0)).T, atol=1e-12)
    np.testing.assert_array_equal(np.tril(chol, -1), 0)
    assert (np.diag(chol) > 0).all()
    units = np.array([1e-3, 1.0, 50.0, 1e4])
    for method in ("pca-cor", "zca-cor"):
        np.testing.assert_allclose(
            Whitener(method).fit_transform(x * units), Whitener(method).fit_transform(x), rtol=1e-8, atol=1e-10
        )


def test_pca_is_scikit_learns_but_for_the_bias_of_the_variance() -> None:
    x = load_digits().data
    ours, theirs = Whitener("pca", n_components=20).fit(x), PCA(20, whiten=True, svd_solver="full").fit(x)
    n = len(x)
    np.testing.assert_allclose(ours.explained_variance_ * n / (n - 1), theirs.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=1e-10)
    np.testing.assert_allclose(up_to_signs(ours.components_, theirs.components_), theirs.components_, atol=1e-8)
    expected = theirs.transform(x) * np.sqrt(n / (n - 1))
    np.testing.assert_allclose(up_to_signs(ours.transform(x).T, expected.T), expected.T, atol=1e-7)
    for share in (0.5, 0.9, 0.99):
        assert Whitener("pca", n_components=share).fit(x).n_components_ == PCA(share).fit(x).n_components_


@pytest.mark.parametrize("method", METHODS)
def test_no_direction_without_variance_is_amplified(method: str) -> None:
    x = load_digits().data.astype(np.float32)  # three pixels are constant
    x = np.hstack([x, x[:, 20:21] + x[:, 21:22], np.full((len(x), 1), 0.1, np.float32), 3 * x[:, 28:29]])
    fitted = Whitener(method).fit(x)
    rank = np.linalg.matrix_rank(x - x.mean(0, dtype=np.float64))
    assert fitted.rank_ == rank == 61
    eigenvalues = np.linalg.eigvalsh(covariance(fitted.transform(x.astype(np.float64))))
    np.testing.assert_allclose(eigenvalues[-rank:], 1, atol=1e-6)
    np.testing.assert_allclose(eigenvalues[:-rank], 0, atol=1e-6)
    assert fitted.transform(x).shape == (len(x), rank if method.startswith("pca") else 67)
    assert np.abs(fitted.whitening_).max() < 1e3
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(x)), x, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [2, 5])
def test_fewer_samples_than_features(method: str, rows: int) -> None:
    x = np.random.default_rng(0).standard_normal((rows, 12))
    fitted = Whitener(method).fit(x)
    assert fitted.rank_ == rows - 1
    y = fitted.transform(x)
    np.testing.assert_allclose(fitted.inverse_transform(y), x, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(covariance(y))
    np.testing.assert_allclose(np.sort(eigenvalues)[1 - rows :], 1, atol=1e-10)
    assert np.isclose(eigenvalues.sum(), rows - 1)


@pytest.mark.parametrize("method", METHODS)
def test_two_fits_agree_on_signs_even_where_entries_tie(method: str) -> None:
    x = data(columns=2)
    np.testing.assert_allclose(
        Whitener(method).fit(x).whitening_, Whitener(method).fit(x[::-1]).whitening_, rtol=1e-9, atol=1e-12
    )
    if method.startswith("pca"):
        leading = Whitener(method).fit(data(1, columns=6)).components_
        assert (leading[np.arange(6), np.abs(leading).argmax(1)] > 0).all()


def test_rounding_decides_no_sign() -> None:
    for tie in ([1 + 1e-12, -1.0], [1.0, -1 - 1e-12], [-1 - 1e-12, 1.0], [-1.0, 1 + 1e-12]):
        assert (fix_signs(torch.tensor([tie], dtype=torch.float64).T)[0] > 0).all()
    assert (fix_signs(torch.tensor([[0.1], [-1.0]])) == torch.tensor([[-0.1], [1.0]])).all()


def test_a_pivot_of_rounding_errors_is_no_variance() -> None:
    almost = torch.tensor([[1 + 1e-15, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]], dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(almost.flip(0, 1))[1]) == 0
    solution = cholesky_whitening(almost, intensity=0, eps=0, tolerance=default_tolerance(3), outputs=None)
    assert solution.rank == 2
    assert not solution.whitening[0].any()
    assert not solution.whitening[:, 0].any()
    rest = solution.whitening[1:, 1:]
    np.testing.assert_allclose(rest @ almost[1:, 1:] @ rest.T, np.eye(2), atol=1e-14)


@settings(max_examples=15)
@given(SEEDS, st.sampled_from(METHODS), st.sampled_from([None, 0.2, "ledoit-wolf"]), st.sampled_from([0.0, 1e5]))
def test_any_split_by_partial_fit_or_merge_is_one_fit(seed: int, method: str, shrinkage: Any, offset: float) -> None:
    generator = np.random.default_rng(seed)
    x = data(seed, offset=offset)
    x[generator.random(len(x)) < 0.1, 1] = np.nan
    weights = generator.integers(0, 3, len(x)) + 0.25
    cuts = [0, *np.unique(generator.integers(1, len(x), 4)), len(x)]
    parts = [(x[a:b], weights[a:b]) for a, b in pairwise(cuts)]
    make = lambda: Whitener(method, shrinkage=shrinkage)  # noqa: E731
    whole, streamed = make().fit(x, sample_weight=weights), make()
    for p, w in parts:
        streamed.partial_fit(p, sample_weight=w)
    pieces = [make().partial_fit(p, sample_weight=w) for p, w in parts]
    merged = reduce(lambda a, b: a.merge(b), pieces)
    for other in (streamed, merged):
        assert np.isclose(other.shrinkage_, whole.shrinkage_, rtol=1e-9)
        a, b = whole.whitening_, other.whitening_
        # Two almost equal eigenvalues leave their eigenvectors open: compare W^T W, which is the inverse covariance.
        np.testing.assert_allclose(b.T @ b, a.T @ a, rtol=1e-8, atol=1e-8 * np.abs(a.T @ a).max())
        assert np.isclose(other.n_samples_seen_, whole.n_samples_seen_)


@pytest.mark.parametrize("method", METHODS)
def test_integer_weights_are_repetitions(method: str) -> None:
    x, weights = data(), np.random.default_rng(1).integers(0, 4, 60)
    for shrinkage in (None, "ledoit-wolf"):
        weighted = Whitener(method, shrinkage=shrinkage).fit(x, sample_weight=weights)
        repeated = Whitener(method, shrinkage=shrinkage).fit(x.repeat(weights, axis=0))
        np.testing.assert_allclose(weighted.whitening_, repeated.whitening_, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rows", [5, 30, 300])
def test_ledoit_wolf_is_the_papers_and_scikit_learns(rows: int) -> None:
    x = data(rows, rows=rows, columns=8, offset=100.0) ** 3 / 1e4
    fitted = Whitener("zca", shrinkage="ledoit-wolf").fit(x)
    assert np.isclose(fitted.shrinkage_, ledoit_wolf(x), rtol=1e-9)
    shrunk, intensity = peer_ledoit_wolf(x)
    assert np.isclose(fitted.shrinkage_, intensity, rtol=1e-9)
    np.testing.assert_allclose(fitted.whitening_ @ shrunk @ fitted.whitening_.T, np.eye(8), atol=1e-8)
    standardized = (x - x.mean(0)) / x.std(0)
    assert np.isclose(
        Whitener("pca-cor", shrinkage="ledoit-wolf").fit(x).shrinkage_, ledoit_wolf(standardized), rtol=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_shrinkage_and_eps_by_hand(method: str) -> None:
    x = data()
    fitted = Whitener(method, shrinkage=0.3, eps=0.05).fit(x)
    matrix, scale = covariance(x), np.ones(4)
    if method.endswith("-cor"):
        scale = x.std(0)
        matrix = matrix / np.outer(scale, scale)
    regular = 0.7 * matrix + 0.3 * np.trace(matrix) / 4 * np.eye(4) + 0.05 * np.eye(4)
    w = fitted.whitening_ * scale
    np.testing.assert_allclose(w @ regular @ w.T, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(x)), x, atol=1e-10)
    assert fitted.shrinkage_ == 0.3


def test_n_components() -> None:
    x = data(columns=6, rows=100)
    full = Whitener("pca").fit(x)
    for k in (1, 3):
        np.testing.assert_allclose(
            Whitener("pca", n_components=k).fit_transform(x), full.transform(x)[:, :k], atol=1e-12
        )
        projected = Whitener("zca", n_components=k).fit(x)
        np.testing.assert_allclose(projected.whitening_, full.components_[:k].T @ full.whitening_[:k], atol=1e-12)
        last = Whitener("cholesky", n_components=k).fit(x)
        np.testing.assert_allclose(last.transform(x), Whitener("cholesky").fit_transform(x[:, -k:]), atol=1e-10)
        # Inverted, the rest is the best linear prediction from those kept.
        predicted = np.linalg.lstsq(np.c_[x[:, -k:], np.ones(100)], x, rcond=None)[0]
        np.testing.assert_allclose(
            last.inverse_transform(last.transform(x)), np.c_[x[:, -k:], np.ones(100)] @ predicted, atol=1e-10
        )
    assert Whitener("pca", n_components=1.0).fit(x).n_components_ == 6
    with pytest.warns(UserWarning, match="n_components=3, but only 2 directions have variance: kept those"):
        assert Whitener("pca", n_components=3).fit(x[:3]).n_components_ == 2


def test_names_of_outputs() -> None:
    x = data(columns=3)
    assert Whitener("pca", n_components=2).fit(x).get_feature_names_out().tolist() == ["whitener0", "whitener1"]
    assert Whitener("zca").fit(x).get_feature_names_out(["a", "b", "c"]).tolist() == ["a", "b", "c"]
    assert Whitener("cholesky", n_components=2).fit(x).get_feature_names_out().tolist() == ["x1", "x2"]


@pytest.mark.parametrize("method", METHODS)
def test_channels(method: str) -> None:
    x = np.random.default_rng(0).standard_normal((9, 3, 4, 5)) * np.array([1, 5, 0.2]).reshape(3, 1, 1)
    x[:, 0] += x[:, 1]
    x[2, 1, 0, 0] = np.nan
    rows = np.moveaxis(x, 1, -1).reshape(-1, 3)
    fitted = Whitener(method, channel_axis=1).fit(x)
    y = np.moveaxis(fitted.transform(x), 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(y, Whitener(method).fit(rows).transform(rows), rtol=1e-9, atol=1e-11)
    assert np.isnan(y).any(1).sum() == 1
    np.testing.assert_allclose(covariance(y[~np.isnan(y).any(1)]), np.eye(3), atol=1e-11)
    back = fitted.inverse_transform(fitted.transform(x))
    np.testing.assert_allclose(back[:2], x[:2], atol=1e-11)
    module = fitted.to_module(torch.float64)
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), fitted.transform(x), atol=1e-12)
    assert Whitener("pca", n_components=2, channel_axis=1).fit_transform(x).shape == (9, 2, 4, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [3, 700])
def test_float32_is_rounded_once(method: str, rows: int) -> None:
    x = data(rows=700, columns=40, offset=100.0).astype(np.float32)
    fitted = Whitener(method).fit(x)
    single, double = fitted.transform(x[:rows]), fitted.transform(x[:rows].astype(np.float64))
    assert single.dtype == np.float32
    np.testing.assert_array_equal(single, double.astype(np.float32))
    by_hand = (x[:rows].astype(np.float64) - fitted.mean_) @ fitted.whitening_.T
    np.testing.assert_allclose(double, by_hand, atol=1e-9)
    back = fitted.inverse_transform(single)
    np.testing.assert_allclose(back, x[:rows], rtol=1e-6)


def test_constant_and_single() -> None:
    same = np.full((5, 3), 0.1)
    assert not Whitener("zca").fit_transform(same).any()
    assert not Whitener("cholesky").fit_transform([[1.0, 2.0]]).any()
    streamed = Whitener("pca").partial_fit(same[:1])
    x = data(columns=3)
    for row in x:
        streamed.partial_fit(row[None])
    expected = Whitener("pca").fit(np.vstack([same[:1], x]))
    np.testing.assert_allclose(streamed.transform(x), expected.transform(x), rtol=1e-9, atol=1e-11)
