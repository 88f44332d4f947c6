"""Whitener's randomized solver against the exact ones, over arrays and streams."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from batchnorm import InputError
from batchnorm.preprocessing import Whitener, load
from batchnorm.preprocessing.randomized import subspace_iteration

FORMS = ("pca", "zca", "pca-cor", "zca-cor")


def decaying(rows: int = 300, columns: int = 80, decay: float = 0.8, offset: float = 0.0, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.standard_normal((n, columns)))[0] for n in (rows, columns))
    return (left * decay ** np.arange(columns)) @ right.T * np.sqrt(rows) + offset


def agree(a: Whitener, b: Whitener, x: Any, rtol: float) -> None:
    np.testing.assert_allclose(a.mean_, b.mean_, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(a.explained_variance_, b.explained_variance_, rtol=rtol)
    np.testing.assert_allclose(a.explained_variance_ratio_, b.explained_variance_ratio_, rtol=rtol)
    np.testing.assert_allclose(a.components_, b.components_, atol=rtol**0.5)
    np.testing.assert_allclose(a.transform(x), b.transform(x), atol=10 * rtol**0.5)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("shape", [(300, 80), (40, 200)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_decaying_spectrum_is_found_exactly(method: str, shape: tuple[int, int], offset: float) -> None:
    rows, columns = shape
    x = decaying(rows, columns) if rows > columns else decaying(columns, rows).T
    x = x + offset
    x[:, 3] = 0.1
    fitted = Whitener(method, n_components=6, solver="randomized").fit(x)
    agree(fitted, Whitener(method, n_components=6).fit(x), x, 1e-9)
    np.testing.assert_allclose(fitted.components_ @ fitted.components_.T, np.eye(6), atol=1e-13)
    assert fitted.rank_ == 6
    y = fitted.transform(x)
    if method == "pca":
        np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(6), atol=1e-6)


def test_where_the_spectrum_is_flat_the_variance_is_nearly_found() -> None:
    x = np.random.default_rng(0).standard_normal((2000, 300))
    ours = Whitener(n_components=10, solver="randomized").fit(x).explained_variance_
    exact = Whitener(n_components=10).fit(x).explained_variance_
    theirs = PCA(10, svd_solver="randomized", random_state=0).fit(x).explained_variance_ * 1999 / 2000
    assert (ours <= exact * (1 + 1e-12)).all()
    assert (ours > 0.93 * exact).all()
    # No worse than scikit-learn's, by more than the luck of the start.
    assert ours.sum() > 0.995 * theirs.sum()


def test_seeds() -> None:
    x = np.random.default_rng(0).standard_normal((200, 60)).astype(np.float32)

    def fit(seed: Any) -> Any:
        return Whitener(n_components=3, solver="randomized", random_state=seed).fit(x).components_

    np.testing.assert_array_equal(fit(0), Whitener(n_components=3, solver="randomized").fit(x).components_)
    np.testing.assert_array_equal(fit(7), fit(7))
    np.testing.assert_array_equal(fit(7), fit(np.random.RandomState(7)))
    assert np.abs(fit(0) - fit(7)).max() > 1e-9
    state = torch.random.get_rng_state()
    fit(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_signs_and_a_shuffled_copy_of_the_data() -> None:
    x = decaying(columns=30)
    first = Whitener(n_components=4, solver="randomized").fit(x).components_
    second = Whitener(n_components=4, solver="randomized", random_state=1).fit(x[::-1]).components_
    np.testing.assert_allclose(first, second, atol=1e-9)
    assert (first[np.arange(4), np.abs(first).argmax(1)] > 0).all()


def test_weights_missing_values_and_fixed_shrinkage() -> None:
    x = decaying(rows=200)
    weights = np.random.default_rng(1).integers(0, 3, 200)
    x[5, 7] = x[150, 0] = np.nan
    for options in ({}, {"shrinkage": 0.2, "eps": 1e-3}):
        fitted = Whitener(n_components=4, solver="randomized", **options).fit(x, sample_weight=weights)
        agree(fitted, Whitener(n_components=4, **options).fit(x, sample_weight=weights), x, 1e-9)
        assert fitted.n_samples_seen_ == weights[~np.isnan(x).any(1)].sum()


def test_the_data_are_not_written_to_and_channels_and_dtypes() -> None:
    x = decaying(rows=100, columns=16).reshape(25, 2, 2, 16).transpose(0, 3, 1, 2)
    before = x.copy()
    fitted = Whitener(n_components=3, solver="randomized", channel_axis=1).fit(x)
    np.testing.assert_array_equal(x, before)
    agree(fitted, Whitener(n_components=3, channel_axis=1).fit(x), x, 1e-9)
    images = (np.random.default_rng(0).random((50, 40)) * 255).astype(np.uint8)
    images[:, 3] = 2 * (images[:, 4] // 2)
    narrow = Whitener(n_components=30, solver="randomized").fit(images)
    agree(narrow, Whitener(n_components=30).fit(images), images, 1e-4)


class Batches:
    """A list of batches that counts how often it is read."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts, self.opened = parts, 0

    def __iter__(self) -> Any:
        self.opened += 1
        return iter(self.parts)


@pytest.mark.parametrize("method", ["pca", "zca-cor"])
def test_a_source_is_read_again_and_again(method: str) -> None:
    x = decaying(rows=230)
    x[17, 3] = np.nan
    weights = np.linspace(0.5, 1.5, 230)
    batches = Batches(np.array_split(x, 7))
    fitted = Whitener(method, n_components=5, solver="randomized").fit(batches, sample_weight=weights)
    whole = Whitener(method, n_components=5, solver="randomized").fit(x, sample_weight=weights)
    assert 3 <= batches.opened <= 9
    agree(fitted, whole, x, 1e-12)
    with pytest.raises(InputError, match="solver='randomized' reads data several times, and the generator can be read"):
        Whitener(n_components=5, solver="randomized").fit(part for part in batches)


def test_saved_and_pickled(tmp_path: Path) -> None:
    x = decaying()
    fitted = Whitener("zca", n_components=5, solver="randomized").fit(x)
    fitted.save(tmp_path / "f")
    for again in (load(tmp_path / "f"), pickle.loads(pickle.dumps(fitted))):
        np.testing.assert_array_equal(again.transform(x), fitted.transform(x))
        np.testing.assert_array_equal(again.explained_variance_ratio_, fitted.explained_variance_ratio_)
        assert again.n_samples_seen_ == 300
    assert (tmp_path / "f").stat().st_size < 10_000  # nothing of the data


def test_what_it_refuses() -> None:
    x = decaying()
    make = lambda **options: Whitener(**{"n_components": 3, "solver": "randomized", **options})  # noqa: E731
    for options, text in (
        ({"n_components": None}, 'solver="randomized" needs a whole n_components, got None'),
        ({"n_components": 0.9}, 'solver="randomized" needs a whole n_components, got 0.9'),
        ({"method": "cholesky"}, "is not made of eigenvectors"),
        ({"shrinkage": "ledoit-wolf"}, 'solver="randomized" has no Ledoit-Wolf: make shrinkage a number'),
        ({"n_components": 81}, "n_components=81 is more than the data's n_features = 80"),
    ):
        with pytest.raises(InputError, match=text):
            make(**options).fit(x)
    fitted = make().fit(x)
    before = fitted.transform(x)
    with pytest.raises(InputError, match="solver='randomized' cannot learn from batch after batch: fit all data at"):
        fitted.partial_fit(x)
    for one, other in ((fitted, make().fit(x)), (Whitener().fit(x), fitted), (fitted, Whitener().fit(x))):
        with pytest.raises(InputError, match="solver='randomized' cannot be merged"):
            one.merge(other)
    with pytest.raises(InputError, match="what solver='randomized' has learned cannot be added to: fit again"):
        fitted.set_params(solver="auto").partial_fit(x)
    fitted.set_params(solver="randomized")
    with pytest.raises(InputError, match="every sample has a NaN"):
        fitted.fit(x * np.nan)
    bad = x.copy()
    bad[200, 11] = -np.inf
    with pytest.raises(InputError, match="infinity: row 200, column 11"):
        fitted.fit(bad)
    np.testing.assert_array_equal(fitted.transform(x), before)
    with pytest.warns(UserWarning, match="n_components=3, but only 1 directions have variance"):
        fitted.fit(x[:2])
    with pytest.raises(InputError, match="at least one direction with variance"):
        fitted.fit(np.ones((5, 4)))


def test_a_low_rank_stops_early_and_is_exact() -> None:
    calls = []
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 4, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.25], dtype=torch.float64)) @ basis.T

    def times(q: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return matrix @ q

    start = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    found = subspace_iteration(times, start, 5, 20)
    np.testing.assert_allclose(found.variance[:4], [9, 4, 1, 0.25], rtol=1e-13)
    np.testing.assert_allclose((found.components[:4] @ basis).square().sum(1), 1, rtol=1e-13)
    assert len(calls) <= 4
