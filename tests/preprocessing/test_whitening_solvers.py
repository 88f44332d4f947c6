"""Whitener's solvers: they agree, whatever the split; the Gram side in particular streams, merges and is saved."""

from __future__ import annotations

import pickle
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf as peer_ledoit_wolf
from sklearn.datasets import load_digits

from batchnorm import InputError
from batchnorm.preprocessing import Whitener, load, spectrum
from batchnorm.preprocessing.shrinkage import FourthMoments
from oracles.preprocessing import ledoit_wolf

EIGEN = ("pca", "zca", "pca-cor", "zca-cor")
SEEDS = st.integers(0, 2**32 - 1)


def wide(seed: int = 0, rows: int = 12, columns: int = 40, offset: float = 0.0) -> Any:
    """Fewer samples than features, of variances that differ."""
    generator = np.random.default_rng(seed)
    factors = generator.standard_normal((rows, rows)) * np.geomspace(1, 0.1, rows)
    return factors @ generator.standard_normal((rows, columns)) + offset


def same(a: Whitener, b: Whitener, x: Any, rtol: float = 1e-9) -> None:
    """Everything that two fits say of the same data."""
    assert a.n_components_ == b.n_components_
    assert a.rank_ == b.rank_
    assert np.isclose(a.shrinkage_, b.shrinkage_, rtol=1e-9)
    np.testing.assert_allclose(a.mean_, b.mean_, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(a.explained_variance_, b.explained_variance_, rtol=rtol)
    np.testing.assert_allclose(a.explained_variance_ratio_, b.explained_variance_ratio_, rtol=rtol)
    largest = np.abs(b.whitening_).max()
    np.testing.assert_allclose(a.components_, b.components_, atol=rtol)
    np.testing.assert_allclose(a.whitening_, b.whitening_, atol=rtol * largest)
    np.testing.assert_allclose(a.dewhitening_, b.dewhitening_, atol=rtol * np.abs(b.dewhitening_).max())
    np.testing.assert_allclose(a.transform(x), b.transform(x), atol=rtol * np.nanmax(np.abs(b.transform(x))))


@pytest.mark.parametrize("method", EIGEN)
@pytest.mark.parametrize("n_components", [None, 5, 0.9])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_samples_or_covariance_give_the_same(method: str, n_components: Any, offset: float) -> None:
    x = wide(offset=offset)
    x[:, 7] = 0.1 + offset
    gram, eigh, auto = (Whitener(method, n_components=n_components, solver=s).fit(x) for s in ("gram", "eigh", "auto"))
    same(gram, eigh, x, 1e-5 if offset else 1e-9)
    np.testing.assert_array_equal(auto.whitening_, gram.whitening_)
    if n_components is None:
        assert gram.rank_ == 11
        y = gram.transform(x)
        np.testing.assert_allclose(gram.inverse_transform(y), x, atol=1e-12 + 1e-14 * offset)
        np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(y.T, bias=True))[-11:], 1, atol=1e-9)
    np.testing.assert_allclose(gram.components_ @ gram.components_.T, np.eye(gram.n_components_), atol=1e-13)


@pytest.mark.parametrize("method", EIGEN)
@pytest.mark.parametrize("shrinkage", [0.2, "ledoit-wolf"])
@pytest.mark.parametrize("n_components", [None, 4, 0.8])
def test_shrinkage_by_samples(method: str, shrinkage: Any, n_components: Any) -> None:
    x = wide(3) + 0.1 * np.random.default_rng(1).standard_normal((12, 40))
    auto, eigh = (
        Whitener(method, n_components=n_components, shrinkage=shrinkage, eps=0.01, solver=s).fit(x)
        for s in ("auto", "eigh")
    )
    k = auto.n_components_
    assert auto.rank_ == eigh.rank_ == 40
    np.testing.assert_allclose(auto.shrinkage_, eigh.shrinkage_, rtol=1e-10)
    # Without a number asked for, eigh's components include those that shrinkage alone gave variance.
    np.testing.assert_allclose(auto.explained_variance_, eigh.explained_variance_[:k], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(auto.dewhitening_ @ auto.whitening_, eigh.dewhitening_ @ eigh.whitening_, atol=1e-10)
    if method.startswith("zca") or n_components is not None:
        np.testing.assert_allclose(auto.whitening_, eigh.whitening_, atol=1e-9)
        np.testing.assert_allclose(auto.transform(x), eigh.transform(x), atol=1e-9)
        np.testing.assert_allclose(auto.inverse_transform(eigh.transform(x)), eigh.inverse_transform(eigh.transform(x)))
    if shrinkage == "ledoit-wolf":
        standard = (x - x.mean(0)) / x.std(0) if method.endswith("cor") else x
        assert np.isclose(auto.shrinkage_, ledoit_wolf(standard), rtol=1e-10)
        assert np.isclose(auto.shrinkage_, peer_ledoit_wolf(standard)[1], rtol=1e-9)


@settings(max_examples=25)
@given(
    SEEDS,
    st.sampled_from(EIGEN),
    st.sampled_from([None, 0.1, "ledoit-wolf"]),
    st.sampled_from(["auto", "eigh", "gram"]),
    st.integers(6, 40),
    st.sampled_from([0.0, 1e5]),
)
def test_any_split_and_order_of_merging_is_one_fit(
    seed: int, method: str, shrinkage: Any, solver: str, rows: int, offset: float
) -> None:
    generator = np.random.default_rng(seed)
    x = wide(seed, rows, 20, offset) + generator.standard_normal((rows, 20))
    x[generator.random(rows) < 0.1, 3] = np.nan
    weights = generator.integers(0, 3, rows) * 1.0
    # Four rows that count, so that there are directions to whiten, with whatever weights and NaN are drawn.
    weights[:4] = np.maximum(weights[:4], 1)
    x[:4] = np.nan_to_num(x[:4], nan=offset)
    cuts = [0, *np.unique(generator.integers(1, rows, 5)), rows]
    parts = [(x[a:b], np.maximum(weights[a:b], 1e-300 * (weights[a:b].sum() == 0))) for a, b in pairwise(cuts)]
    k = 2 if shrinkage and method.startswith("pca") else None
    weights = np.concatenate([w for _, w in parts])

    def make() -> Whitener:
        # On either side there is the same noise floor: directions below it are not compared.
        return Whitener(method, shrinkage=shrinkage, solver=solver, n_components=k, tol=1e-9)

    whole = Whitener(method, shrinkage=shrinkage, solver="eigh", n_components=k, tol=1e-9)
    whole.fit(x, sample_weight=weights)
    streamed = make()
    for p, w in parts:
        streamed.partial_fit(p, sample_weight=w)
    pieces = [make().partial_fit(p, sample_weight=w) for p, w in parts]
    left, right = reduce(lambda a, b: a.merge(b), pieces), make()
    for p, w in reversed(parts):
        right.merge(make().partial_fit(p, sample_weight=w))
    for other in (streamed, left, right):
        assert other.rank_ == whole.rank_
        assert np.isclose(other.shrinkage_, whole.shrinkage_, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(other.mean_, whole.mean_, rtol=1e-12, atol=1e-12)
        a, b = whole.whitening_, other.whitening_
        # Two almost equal eigenvalues leave their eigenvectors open: W^T W is the inverse covariance.
        if k is None:
            np.testing.assert_allclose(b.T @ b, a.T @ a, rtol=1e-7, atol=1e-7 * np.abs(a.T @ a).max())
        assert np.isclose(other.n_samples_seen_, whole.n_samples_seen_)


def test_samples_become_products_when_they_are_as_many_as_features() -> None:
    x = wide(rows=30, columns=10)
    fitted = Whitener()
    for start in range(0, 30, 4):
        fitted.partial_fit(x[start : start + 4])
        seen = min(start + 4, 30)
        assert (fitted._stats.products is None) == (seen < 10)
        np.testing.assert_allclose(fitted.mean_, x[:seen].mean(0), atol=1e-13)
    same(fitted, Whitener(solver="eigh").fit(x), x)
    by_samples = Whitener(solver="gram").fit(x[:20]).partial_fit(x[20:])
    assert by_samples._stats.products is None
    same(by_samples, fitted, x)
    mixed = Whitener().fit(x[:5]).merge(Whitener().fit(x[5:]))
    same(mixed, fitted, x)
    same(Whitener().fit(x[5:]).merge(Whitener().fit(x[:5])), fitted, x)
    both = Whitener(solver="gram").fit(x[:5]).merge(Whitener(solver="eigh").fit(x[5:]))
    with pytest.raises(InputError, match=r"solver='gram' needs the samples themselves, which were not kept: fit again"):
        _ = both.whitening_


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int32, np.bool_])
def test_samples_are_kept_without_loss_and_are_copies(dtype: Any) -> None:
    x = (wide() * 20 + 100).astype(dtype)
    fitted = Whitener().partial_fit(x)
    kept = fitted._stats.rows[0].values
    assert kept.dtype == (torch.float64 if dtype in (np.float64, np.int32) else torch.float32)
    before = x.astype(np.float64)
    np.testing.assert_array_equal(kept.numpy(), before)
    x[:] = 0
    np.testing.assert_allclose(fitted.mean_, before.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(kept.numpy(), before)


def test_channels_are_kept_as_samples() -> None:
    x = np.random.default_rng(0).standard_normal((2, 9, 2, 2))
    x[0, 3, 0, 1] = np.nan
    fitted = Whitener(channel_axis=1, solver="auto").fit(x)
    assert fitted.rank_ == 6
    rows = np.moveaxis(x, 1, -1).reshape(-1, 9)
    same(fitted, Whitener(channel_axis=1, solver="eigh").fit(x), x)
    np.testing.assert_allclose(fitted.whitening_, Whitener().fit(rows).whitening_, atol=1e-12)


@pytest.mark.parametrize(("method", "shrinkage"), [("pca", None), ("zca-cor", 0.3), ("zca", "ledoit-wolf")])
def test_saved_samples_go_on(method: str, shrinkage: Any, tmp_path: Path) -> None:
    x = wide(rows=60, columns=30).astype(np.float32)
    weights = np.linspace(0.5, 2, 60)
    fitted = Whitener(method, shrinkage=shrinkage).fit(x[:9], sample_weight=weights[:9])
    fitted.save(tmp_path / "few")
    for again in (load(tmp_path / "few"), pickle.loads(pickle.dumps(fitted))):
        np.testing.assert_array_equal(again.transform(x), fitted.transform(x))
        np.testing.assert_array_equal(again.whitening_, fitted.whitening_)
        again.partial_fit(x[9:], sample_weight=weights[9:])
        expected = Whitener(method, shrinkage=shrinkage).fit(x, sample_weight=weights)
        np.testing.assert_allclose(again.transform(x), expected.transform(x), atol=1e-5)
    fitted.partial_fit(x[9:], sample_weight=weights[9:]).partial_fit(x[:3])
    assert fitted._stats.products is not None
    assert fitted._stats.num_rows == 12
    fitted.save(tmp_path / "queue")
    with safetensors.safe_open(tmp_path / "queue", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("rows")]  # noqa: SIM118 -- not iterable
    queue = load(tmp_path / "queue")
    np.testing.assert_array_equal(queue.transform(x), fitted.transform(x))
    np.testing.assert_allclose(queue.partial_fit(x).whitening_, fitted.partial_fit(x).whitening_, rtol=1e-8, atol=1e-10)


def test_files_of_before_there_were_solvers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.preprocessing import saving

    x = np.random.default_rng(0).standard_normal((50, 6)) @ np.triu(np.ones((6, 6)))
    for method, shrinkage in (("pca", None), ("zca-cor", "ledoit-wolf"), ("cholesky", 0.1)):
        fitted = Whitener(method, shrinkage=shrinkage).fit(x)
        solution = fitted._solve()
        names = ("whitening", "dewhitening", "components", "variance", "ratio")
        old = {f"solution.{name}": getattr(solution, name).clone() for name in names}
        old["solution.numbers"] = torch.tensor([float(solution.rank), solution.intensity], dtype=torch.float64)
        parameters = fitted.get_params()
        old_parameters = {name: parameters[name] for name in parameters if name not in ("solver", "random_state")}
        writer = Whitener(method, shrinkage=shrinkage).fit(x)
        monkeypatch.setattr(writer, "get_params", lambda p=old_parameters, **_: p)
        monkeypatch.setattr(writer, "_extra_state", lambda state=old: state)
        saving.save(writer, tmp_path / method)
        again = load(tmp_path / method)
        assert again.get_params() == parameters
        np.testing.assert_allclose(again.transform(x), fitted.transform(x), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(again.inverse_transform(again.transform(x)), x, atol=1e-10)
        again.partial_fit(x + 1)
        np.testing.assert_allclose(again.whitening_, fitted.partial_fit(x + 1).whitening_, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n_components", [None, 3, 0.9])
def test_the_solver_for_wide_data_is_the_other_one(n_components: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = load_digits().data[:, 1:50]
    small = [Whitener(m, n_components=n_components).fit(x) for m in EIGEN]
    monkeypatch.setattr(spectrum, "_SMALL", 0)
    for each in small:
        large = Whitener(each.method, n_components=n_components).fit(x)
        assert large.n_components_ == each.n_components_
        np.testing.assert_allclose(large.explained_variance_, each.explained_variance_, rtol=1e-11)
        np.testing.assert_allclose(large.explained_variance_ratio_, each.explained_variance_ratio_, rtol=1e-11)
        np.testing.assert_allclose(large.components_, each.components_, atol=1e-9)
        np.testing.assert_allclose(large.components_ @ large.components_.T, np.eye(large.n_components_), atol=1e-12)
        np.testing.assert_allclose(large.transform(x), each.transform(x), atol=1e-8)


def test_fourth_moments_of_pairs_and_of_norms_are_the_same_sums() -> None:
    generator = np.random.default_rng(0)
    x = torch.from_numpy(wide(rows=90, columns=6, offset=1e3))
    weights = torch.from_numpy(generator.random(90))

    def of(part: slice, pairs: bool) -> FourthMoments:
        return FourthMoments.from_batch(x[part], channel_axis=1, weights=weights[part], skip_nan=True, pairs=pairs)

    parts = (slice(0, 20), slice(20, 21), slice(21, 90))
    deviation = x - (weights / weights.sum()) @ x
    norms = deviation.square().sum(1)
    for kinds in ((True,) * 3, (False,) * 3, (True, False, True)):
        merged = reduce(lambda a, b: a.merge(b), (of(p, k) for p, k in zip(parts, kinds, strict=True)))
        assert merged.pairs == all(kinds)
        np.testing.assert_allclose(merged.summed().fourth, (weights * norms.square()).sum(), rtol=1e-10)
        third = (weights * norms) @ deviation
        np.testing.assert_allclose(merged.summed().third, third, rtol=1e-8, atol=1e-8 * float(third.abs().max()))
    tables = reduce(lambda a, b: a.merge(b), (of(p, True) for p in parts))
    squares = deviation.square()
    np.testing.assert_allclose(tables.fourth, (squares * weights[:, None]).T @ squares, rtol=1e-9)
    third = (squares * weights[:, None]).T @ deviation
    np.testing.assert_allclose(tables.third, third, rtol=1e-8, atol=1e-9 * float(third.abs().max()))
    # Learned for a covariance, they say nothing of a correlation.
    fitted = Whitener("pca", shrinkage="ledoit-wolf").fit(x).set_params(method="pca-cor").partial_fit(x[:3])
    with pytest.raises(InputError, match="Ledoit-Wolf of a correlation needs statistics of its own from the first"):
        _ = fitted.whitening_


def test_total_variance_where_few_directions_are_known() -> None:
    x = wide(rows=15, columns=60)
    total = x.var(0).sum()
    for solver, k in (("gram", 3), ("eigh", 3), ("auto", 14)):
        fitted = Whitener(n_components=k, solver=solver).fit(x)
        np.testing.assert_allclose(fitted.explained_variance_ratio_ * total, fitted.explained_variance_, rtol=1e-12)
    assert np.isclose(Whitener(n_components=14).fit(x).explained_variance_ratio_.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("shrinkage", [None, 0.5])
def test_many_features_and_few_samples_never_make_a_square(shrinkage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.preprocessing import factors, memory

    # A square of 20,000 features is 3.2 GB; the machine is said to have 200 MB.
    monkeypatch.setattr(memory, "available_memory", lambda: 200_000_000)
    monkeypatch.setattr(factors, "available_memory", lambda: 200_000_000)
    x = np.random.default_rng(0).standard_normal((20, 20_000)).astype(np.float32)
    fitted = Whitener("zca", shrinkage=shrinkage).fit(x)
    y = fitted.transform(x)
    assert y.shape == x.shape
    np.testing.assert_allclose(fitted.inverse_transform(y), x, atol=1e-4)
    gram = y.astype(np.float64) @ y.T.astype(np.float64) / 20
    if shrinkage is None:
        np.testing.assert_allclose(np.linalg.eigvalsh(gram)[1:], 1, rtol=1e-5)
    else:
        mean = x.mean(0, dtype=np.float64)
        values = np.linalg.eigvalsh((x - mean) @ (x - mean).T / 20)
        used = 0.5 * values + 0.5 * values.sum() / 20_000
        np.testing.assert_allclose(np.linalg.eigvalsh(gram)[1:], (values / used)[1:], rtol=1e-5)
    message = r"a matrix of 20000 x 20000 needs 3.2 GB of memory, and 0.2 GB are available: transform applies its"
    with pytest.raises(InputError, match=message):
        _ = fitted.whitening_
    with pytest.raises(InputError, match=message):
        fitted.to_module()
    text = (
        r"whitening by a 20000 x 20000 covariance needs 9.6 GB of memory, and 0.2 GB are available: pass "
        r'n_components=k with solver="randomized", or fewer features'
    )
    for wish in (Whitener(solver="eigh"), Whitener("cholesky"), Whitener("pca", shrinkage=0.1)):
        with pytest.raises(InputError, match=text) as caught:
            wish.fit(x)
        assert "\n" not in str(caught.value)
        assert not hasattr(wish, "n_features_in_")
    with pytest.raises(InputError, match=r"keeping samples, here of shape \(1000, 20000\), needs 0.24 GB of memory"):
        Whitener(solver="gram").fit(np.zeros((1000, 20_000), np.float32))


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        (Whitener(solver="svd"), "expected solver to be one of 'auto', 'eigh', 'gram', 'randomized', got 'svd'"),
        (Whitener("cholesky", solver="gram"), "method=\"cholesky\" is not made of eigenvectors: use .* got 'gram'"),
        (
            Whitener("pca", solver="gram", shrinkage=0.1),
            "solver='gram' needs n_components where shrinkage",
        ),
        (
            Whitener("zca", solver="gram", shrinkage=0.1, n_components=12),
            r"solver='gram' needs n_components below the number of samples, 12: ask for fewer, or use solver='eigh'",
        ),
        (Whitener(n_components=41), "n_components=41 is more than the data's n_features = 40: ask for fewer"),
    ],
)
def test_what_a_solver_cannot_do(estimator: Whitener, text: str) -> None:
    with pytest.raises(InputError, match=text):
        estimator.fit(wide())
    assert not hasattr(estimator, "_stats")


def test_more_components_than_samples_and_the_estimator_after_a_failure() -> None:
    x = wide()
    with pytest.warns(UserWarning, match="n_components=20, but only 11 directions have variance: kept those"):
        fitted = Whitener(n_components=20).fit(x)
    before = fitted.transform(x)
    bad = x.copy()
    bad[3, 5] = np.inf
    for learn in (fitted.fit, fitted.partial_fit):
        with pytest.raises(InputError, match="Input X contains infinity: row 3, column 5"):
            learn(bad)
        np.testing.assert_array_equal(fitted.transform(x), before)
    with pytest.raises(InputError, match="every sample has a NaN in some feature"):
        fitted.fit(np.full_like(x, np.nan))
    with pytest.raises(InputError, match="needs at least one direction with variance, got n_samples = 1 with none"):
        fitted.fit(x[:1])
    with pytest.raises(InputError, match="values too large"):
        fitted.fit(x * 1e200)
    np.testing.assert_array_equal(fitted.transform(x), before)
    nothing = Whitener("zca").partial_fit(np.full_like(x, np.nan)).partial_fit(x)
    same(nothing, Whitener("zca").fit(x), x)


@pytest.mark.parametrize("method", ["pca", "zca-cor"])
@pytest.mark.parametrize("solver", ["auto", "eigh"])
def test_a_stream_is_added_up_in_place_and_known_statistics_stay_as_they_are(method: str, solver: str) -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(1e4, 1.0, (400, 12)) @ rng.normal(size=(12, 12))
    x[::17, 3] = np.nan
    weights = rng.uniform(0, 2, 400)
    sizes = np.cumsum([1, 2, 20, 90, 3, 1, 1, 100, 12])  # some large enough to be added, some that wait
    whole = Whitener(method, solver=solver).fit(x, sample_weight=weights)
    stream = Whitener(method, solver=solver).fit(iter(np.split(x, sizes)), sample_weight=weights)
    np.testing.assert_allclose(stream.whitening_, whole.whitening_, rtol=1e-7, atol=1e-9)

    first = Whitener(method, solver=solver).fit(x[:100])
    before = {name: tensor.clone() for name, tensor in first._stats.to_dict().items()}
    stats = first._stats
    first.partial_fit(iter(np.split(x[100:], [5, 150])))
    for name, tensor in stats.to_dict().items():
        assert torch.equal(tensor, before[name])
    np.testing.assert_allclose(
        first.whitening_, Whitener(method, solver=solver).fit(x).whitening_, rtol=1e-7, atol=1e-9
    )


def test_infinities_in_a_stream_are_found_whether_their_part_is_added_or_waits() -> None:
    x = np.random.default_rng(6).normal(size=(300, 8))
    whitener = Whitener().fit(x)
    stats = whitener._stats
    for row, cuts in ((250, [100, 200]), (201, [100, 200, 202])):
        bad = x.copy()
        bad[row, 2] = np.inf
        with pytest.raises(InputError, match=f"row {row}, column 2"):
            whitener.fit(iter(np.split(bad, cuts)))
        assert whitener._stats is stats
