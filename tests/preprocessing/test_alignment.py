"""CORAL against the paper's formula, along a way without eigenvalues; streams, merges, containers, pipelines, files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from batchnorm import BatchnormError, DtypeError, InputError, ShapeError, StatisticsFileError
from batchnorm.preprocessing import CORAL, StandardScaler, load
from oracles.preprocessing import inverse_root, ledoit_wolf, standardize


def domain(seed: int, rows: int = 60, columns: int = 4, offset: float = 0.0) -> Any:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((columns, columns)) + 2 * np.eye(columns)
    return generator.standard_normal((rows, columns)) @ mixing + offset


def covariance(y: Any) -> Any:
    return np.atleast_2d(np.cov(np.asarray(y, dtype=np.float64).T, bias=True))


def recolouring(source: Any, target: Any) -> Any:
    """``C_t^(1/2) C_s^(-1/2)`` of two covariances of full rank."""
    return np.linalg.inv(inverse_root(target)) @ inverse_root(source)


S, T = domain(0, 60), domain(1, 80, offset=3.0)


# The formula


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_source_gets_the_targets_mean_and_covariance(offset: float) -> None:
    source, target = S + offset, T - offset
    fitted = CORAL().fit(source, target)
    tolerance = 1e-9 if offset == 0 else 1e-7
    np.testing.assert_allclose(fitted.matrix_, recolouring(covariance(S), covariance(T)), atol=tolerance)
    y = fitted.transform(source)
    np.testing.assert_allclose(covariance(y), covariance(T), atol=tolerance)
    np.testing.assert_allclose(y.mean(0), target.mean(0), rtol=1e-13, atol=1e-12)
    expected = (source - source.mean(0)) @ fitted.matrix_.T + target.mean(0)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(fitted.inverse_transform(y), source, rtol=1e-13, atol=1e-9)
    assert (fitted.n_samples_seen_, fitted.n_target_samples_seen_) == (60, 80)
    assert (fitted.source_rank_, fitted.target_rank_) == (4, 4)
    np.testing.assert_allclose(fitted.source_mean_, source.mean(0), rtol=1e-14)
    np.testing.assert_allclose(fitted.target_covariance_, covariance(target), atol=tolerance)


def test_a_domain_aligned_with_itself_stays() -> None:
    fitted = CORAL().fit(S, S)
    np.testing.assert_allclose(fitted.matrix_, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(fitted.transform(S), S, atol=1e-12)


def test_with_regularization_of_one_it_is_the_papers_on_standardized_features() -> None:
    source, target = standardize(S), standardize(T)
    fitted = CORAL(regularization=1.0, match_mean=False).fit(source, target)
    # Algorithm 1, in rows: D_s C_s^(-1/2) C_t^(1/2) with C = cov + I.
    c_s, c_t = covariance(source) + np.eye(4), covariance(target) + np.eye(4)
    expected = source @ inverse_root(c_s) @ np.linalg.inv(inverse_root(c_t))
    np.testing.assert_allclose(fitted.transform(source), expected, atol=1e-10)
    assert np.abs(covariance(expected) - covariance(target)).max() > 0.05  # why it is not the default
    np.testing.assert_allclose(fitted.inverse_transform(expected), source, atol=1e-10)


def test_without_match_mean_the_mean_stays() -> None:
    y = CORAL(match_mean=False).fit(S + 7, T).transform(S + 7)
    np.testing.assert_allclose(y.mean(0), S.mean(0) + 7, atol=1e-12)
    np.testing.assert_allclose(covariance(y), covariance(T), atol=1e-10)


def test_shrinkage() -> None:
    fitted = CORAL(shrinkage=0.3, regularization=0.05).fit(S, T)
    c_s, c_t = (0.7 * c + (0.3 * np.trace(c) / 4 + 0.05) * np.eye(4) for c in (covariance(S), covariance(T)))
    np.testing.assert_allclose(fitted.matrix_, recolouring(c_s, c_t), atol=1e-10)
    few, fewer = domain(2, 12, 6), domain(3, 5, 6)
    fitted = CORAL(shrinkage="ledoit-wolf").fit(few, fewer)
    a, b = ledoit_wolf(few), ledoit_wolf(fewer)
    np.testing.assert_allclose((fitted.source_shrinkage_, fitted.target_shrinkage_), (a, b), rtol=1e-9)
    c_s, c_t = (
        (1 - i) * c + i * np.trace(c) / 6 * np.eye(6) for i, c in ((a, covariance(few)), (b, covariance(fewer)))
    )
    np.testing.assert_allclose(fitted.matrix_, recolouring(c_s, c_t), atol=1e-9)
    assert fitted.target_rank_ == 6


# Directions without variance


def test_nothing_without_variance_is_amplified() -> None:
    x = load_digits().data.astype(np.float32)  # three pixels are constant
    x = np.hstack([x, x[:, 20:21] + x[:, 21:22], np.full((len(x), 1), 0.1, np.float32), 3 * x[:, 28:29]])
    source, target = x[:900], np.random.default_rng(0).standard_normal((500, 67)) * 5
    fitted = CORAL().fit(source, target)
    rank = np.linalg.matrix_rank((source - source.mean(0, dtype=np.float64)).astype(np.float64), tol=1e-6)
    assert (fitted.source_rank_, fitted.target_rank_) == (rank, 67)
    assert rank < 64
    values = np.linalg.eigvalsh(covariance(source))
    smallest = values[values > 1e-9 * values[-1]][0]
    # No gain beyond that of the direction of least variance, and none in a direction without.
    limit = np.sqrt(np.linalg.eigvalsh(covariance(target))[-1] / smallest)
    assert np.linalg.norm(fitted.matrix_, 2) <= limit * (1 + 1e-9)
    new = source[:1].astype(np.float64)
    moved = new.copy()
    moved[:, 65] += 1e3  # never varied
    np.testing.assert_allclose(fitted.transform(moved), fitted.transform(new), atol=1e-8)
    narrow = CORAL().fit(target, source)
    assert narrow.target_rank_ == rank
    np.testing.assert_allclose(covariance(narrow.transform(target)), covariance(source), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_samples_than_features(rows: int) -> None:
    source, target = domain(0, rows, 6), domain(1, 40, 6)
    fitted = CORAL().fit(source, target)
    assert fitted.source_rank_ == rows - 1
    y = fitted.transform(source)
    np.testing.assert_allclose(y.mean(0), target.mean(0), atol=1e-12)
    # As near to the target's covariance as the source's directions allow: C_t^(1/2) P C_t^(1/2).
    _, _, directions = np.linalg.svd(source - source.mean(0))
    kept = directions[: rows - 1].T @ directions[: rows - 1]
    root = np.linalg.inv(inverse_root(covariance(target)))
    np.testing.assert_allclose(covariance(y), root @ kept @ root, atol=1e-10)
    assert CORAL(regularization=0.1).fit(source, target).source_rank_ == 6


def test_constant_domains() -> None:
    same = np.full((5, 3), 0.1)
    np.testing.assert_allclose(CORAL().fit(same, T[:, :3]).transform(same) - T[:, :3].mean(0), 0, atol=1e-14)
    np.testing.assert_allclose(CORAL().fit(T[:, :3], same).transform(T[:, :3]), 0.1, rtol=1e-15)
    np.testing.assert_allclose(CORAL(regularization=1).fit(same, same + 1).transform(same), 1.1)


# Learning


@settings(max_examples=20)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([None, 0.2, "ledoit-wolf"]), st.sampled_from([0.0, 1e5]), st.booleans()
)
def test_any_split_in_any_order_is_one_fit(seed: int, shrinkage: Any, offset: float, merged: bool) -> None:
    generator = np.random.default_rng(seed)
    data = [domain(seed % 1000, 50, offset=offset), domain(seed % 1000 + 1, 70, offset=-offset)]
    weights = [generator.integers(0, 3, len(x)) + 0.25 for x in data]
    for x in data:
        x[generator.random(len(x)) < 0.1, 1] = np.nan
    parts = []
    for which, (x, w) in enumerate(zip(data, weights, strict=True)):
        cuts = [0, *np.unique(generator.integers(1, len(x), 3)), len(x)]
        parts += [(which, x[a:b], w[a:b]) for a, b in pairwise(cuts)]
    generator.shuffle(parts)
    make = lambda: CORAL(shrinkage=shrinkage, regularization=1e-3)  # noqa: E731
    whole = make().fit(data[0], data[1], sample_weight=weights[0], target_weight=weights[1])
    other = make()
    for which, x, w in parts:
        one = make() if merged else other
        if which:
            one.partial_fit(target=x, target_weight=w)
        else:
            one.partial_fit(x, sample_weight=w)
        if merged:
            other.merge(one)
    np.testing.assert_allclose(other.matrix_, whole.matrix_, rtol=1e-7, atol=1e-7 * np.abs(whole.matrix_).max())
    np.testing.assert_allclose(other.transform(data[0]), whole.transform(data[0]), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(
        (other.n_samples_seen_, other.n_target_samples_seen_), (whole.n_samples_seen_, whole.n_target_samples_seen_)
    )


def test_integer_weights_are_repetitions() -> None:
    w, v = np.arange(60) % 3, np.arange(80) % 4
    weighted = CORAL(shrinkage="ledoit-wolf").fit(S, T, w, target_weight=v)
    repeated = CORAL(shrinkage="ledoit-wolf").fit(S.repeat(w, axis=0), T.repeat(v, axis=0))
    np.testing.assert_allclose(weighted.matrix_, repeated.matrix_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(weighted.transform(S), repeated.transform(S), atol=1e-8)


def test_incomplete_samples_are_left_out_and_come_out_as_nan() -> None:
    source, target = S.copy(), T.copy()
    source[3, 1] = target[5, 0] = target[6] = np.nan
    fitted = CORAL().fit(source, target)
    complete = CORAL().fit(np.delete(S, 3, 0), np.delete(T, [5, 6], 0))
    np.testing.assert_allclose(fitted.matrix_, complete.matrix_, atol=1e-12)
    y = fitted.transform(source)
    assert np.isnan(y[3]).all()
    assert np.isnan(y).sum() == 4


def test_streams_and_memory_maps(tmp_path: Path) -> None:
    whole = CORAL().fit(S, T)
    np.save(tmp_path / "target.npy", T)
    mapped = np.load(tmp_path / "target.npy", mmap_mode="r")
    for source, target in [
        (iter([S[:7], S[7:]]), mapped),
        ([S[:7], S[7:]], (part for part in (T[:50], T[50:]))),
        (torch.utils.data.DataLoader(torch.from_numpy(S), batch_size=16), T),
    ]:
        np.testing.assert_allclose(CORAL().fit(source, target).matrix_, whole.matrix_, atol=1e-10)
    parts = list(whole.transform(iter([S[:7], S[7:]])))
    np.testing.assert_allclose(np.vstack(parts), whole.transform(S), rtol=1e-14, atol=1e-13)
    with pytest.raises(ShapeError, match="target: X has 3 features, but CORAL is expecting 4"):
        CORAL().fit(S, iter([T[:, :3]]))


# What goes in comes out


def test_containers_dtypes_and_names() -> None:
    expected = CORAL().fit(S, T).transform(S)
    names = ["a", "b", "c", "d"]
    frames = [pd.DataFrame(x, columns=names, index=[f"r{i}" for i in range(len(x))]) for x in (S, T)]
    fitted = CORAL().fit(*frames)
    y = fitted.transform(frames[0])
    assert y.index.equals(frames[0].index)
    np.testing.assert_allclose(y[names].to_numpy(), expected)
    assert fitted.get_feature_names_out().tolist() == fitted.feature_names_in_.tolist() == names
    many = CORAL().fit(pl.DataFrame(S, schema=names), pl.DataFrame(T, schema=names))
    assert isinstance(many.transform(pl.DataFrame(S, schema=names)), pl.DataFrame)
    with pytest.raises(InputError, match="target: The feature names should match"):
        CORAL().fit(frames[0], frames[1][["b", "a", "c", "d"]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        source, target = torch.from_numpy(S).to(dtype), torch.from_numpy(T).to(dtype)
        got = CORAL().fit(source, target).transform(source)
        assert got.dtype == dtype
        exact = CORAL().fit(source.double(), target.double()).transform(source.double())
        torch.testing.assert_close(got, exact.to(dtype), rtol=0, atol=0)
    framed = CORAL().set_output(transform="pandas").fit(S, T).transform(S)
    assert list(framed.columns) == ["x0", "x1", "x2", "x3"]


def test_channels() -> None:
    generator = np.random.default_rng(0)
    source, target = generator.standard_normal((9, 3, 4, 5)), generator.standard_normal((5, 3, 6, 6)) * 3 + 1
    source[:, 0] += source[:, 1]
    rows = [np.moveaxis(x, 1, -1).reshape(-1, 3) for x in (source, target)]
    fitted = CORAL(channel_axis=1).fit(source, target)
    y = fitted.transform(source)
    flat = CORAL().fit(*rows).transform(rows[0])
    np.testing.assert_allclose(np.moveaxis(y, 1, -1).reshape(-1, 3), flat, atol=1e-12)
    np.testing.assert_allclose(covariance(flat), covariance(rows[1]), atol=1e-11)
    module = fitted.to_module(torch.float64)
    np.testing.assert_allclose(module(torch.from_numpy(source)).numpy(), y, atol=1e-12)


def test_the_module() -> None:
    source, target = (torch.from_numpy(x + 1e4).float() for x in (S, 3 * T))
    fitted = CORAL().fit(source, target)
    exact = fitted.transform(source.double())
    module = fitted.to_module()
    # Steps of float32 at the target's mean, 1e4, are 1e-3; that of the source costs nothing.
    torch.testing.assert_close(module(source).double(), exact, rtol=0, atol=2e-3)
    near = CORAL().fit(source, target - 1e4)
    torch.testing.assert_close(near.to_module()(source).double(), near.transform(source.double()), rtol=0, atol=2e-5)
    back = fitted.to_module(torch.float64, inverse=True)
    torch.testing.assert_close(back(exact), source.double(), rtol=0, atol=1e-7)
    x = torch.from_numpy(S[:5]).requires_grad_()
    assert torch.autograd.gradcheck(CORAL().fit(S, T).to_module(torch.float64), (x,))
    shapes = ({0: torch.export.Dim("n", min=2)},)
    exported = torch.export.export(module, (source[:4],), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(source), module(source))
    other = CORAL().fit(target, source).to_module()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(source), module(source))


def test_folding_into_the_layer_behind() -> None:
    fitted = CORAL().fit(S, T)
    linear = torch.nn.Linear(4, 3).double()
    x = torch.from_numpy(S)
    torch.testing.assert_close(fitted.fold_into(linear)(x), linear(fitted.transform(x)), rtol=1e-11, atol=1e-11)
    images = torch.randn(6, 4, 5, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 2
    fitted = CORAL(channel_axis=1, match_mean=False).fit(images, torch.randn(7, 4, 3, 3, dtype=torch.float64))
    convolution = torch.nn.Conv2d(4, 2, 3).double()
    folded = fitted.fold_into(convolution)
    torch.testing.assert_close(folded(images), convolution(fitted.transform(images)), rtol=1e-10, atol=1e-10)


def test_more_features_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.preprocessing.memory.available_memory", lambda: 700)
    with pytest.raises(InputError, match=r"alignment of 4 features needs .* GB .*: reduce them first, by Whitener"):
        CORAL().fit(S, T)


def test_files(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    source, target = (pd.DataFrame(x, columns=names) for x in (S, T))
    path = tmp_path / "coral"
    for estimator in (CORAL(tol=1e-9), CORAL(shrinkage="ledoit-wolf", regularization=0.1, match_mean=False)):
        fitted = clone(estimator).fit(source[:30], target[:30], target_weight=np.arange(30) + 0.5)
        fitted.save(path)
        again = load(path)
        assert again.get_params() == fitted.get_params()
        pd.testing.assert_frame_equal(again.transform(source), fitted.transform(source), rtol=0, atol=0)
        for name in ("matrix_", "source_rank_", "target_shrinkage_", "n_target_samples_seen_", "target_mean_"):
            np.testing.assert_array_equal(getattr(again, name), getattr(fitted, name))
        again.partial_fit(target=target[30:])
        again.merge(clone(estimator).partial_fit(source[30:]))
        expected = clone(estimator).fit(source, target, target_weight=np.r_[np.arange(30) + 0.5, np.ones(50)])
        np.testing.assert_allclose(again.matrix_, expected.matrix_, atol=1e-9)
        # One domain alone travels too.
        clone(estimator).partial_fit(target=target).save(path)
        half = load(path)
        np.testing.assert_allclose(
            half.partial_fit(source).matrix_, clone(estimator).fit(source, target).matrix_, atol=1e-12
        )


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    import json

    import safetensors.torch

    from batchnorm.preprocessing.saving import _digest

    path = tmp_path / "coral"
    for change, text in [
        ({"source.mean": None}, "does not describe a fitted estimator: Scatter needs the tensors"),
        ({"elsewhere.mean": torch.ones(4)}, "expected the statistics of a source and a target"),
    ]:
        CORAL().fit(S, T).save(path)
        tensors = {**safetensors.torch.load(path.read_bytes()), **change}
        with safetensors.safe_open(path, "pt") as file:
            header = json.dumps(json.loads(file.metadata()["batchnorm.preprocessing"]))
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        metadata = {"batchnorm.preprocessing": header, "sha256": _digest(header, kept)}
        path.write_bytes(safetensors.torch.save(kept, metadata))
        with pytest.raises(StatisticsFileError, match=text):
            load(path)


# scikit-learn


class OntoItself(CORAL):
    """With one argument, as scikit-learn's checks fit it: the target is the source."""

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # type: ignore[override]  # noqa: ARG002
        return super().fit(X, target=X, sample_weight=sample_weight, target_weight=sample_weight)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:  # type: ignore[override]  # noqa: ARG002
        return super().partial_fit(X, target=X, sample_weight=sample_weight, target_weight=sample_weight)


@parametrize_with_checks([OntoItself(), OntoItself(regularization=0.1), OntoItself(shrinkage="ledoit-wolf")])
def test_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


def test_pipelines() -> None:
    x, y = load_digits(return_X_y=True)
    source, labels, target = x[:300], y[:300], 0.5 * x[300:500] + 1
    classifier = LogisticRegression(max_iter=2000, C=0.01)
    with config_context(enable_metadata_routing=True):
        steps = [
            ("scale", StandardScaler()),
            ("align", CORAL(regularization=0.1).set_fit_request(target=True)),
            ("classify", classifier),
        ]
        # The scaler, fitted to the source, sees the target too.
        pipeline = Pipeline(steps, transform_input=["target"]).fit(source, labels, target=target)
    scaler = StandardScaler().fit(source)
    by_hand = CORAL(regularization=0.1).fit(scaler.transform(source), scaler.transform(target))
    np.testing.assert_allclose(pipeline[1].matrix_, by_hand.matrix_, atol=1e-9)
    expected = clone(classifier).fit(by_hand.transform(scaler.transform(source)), labels)
    np.testing.assert_allclose(pipeline[-1].coef_, expected.coef_, atol=1e-6)
    # The classifier takes data of the target as they are; the whole pipeline takes data of the source.
    scaled = scaler.transform(target)
    np.testing.assert_array_equal(pipeline[-1].predict(scaled), expected.predict(scaled))
    np.testing.assert_array_equal(
        pipeline.predict(source), expected.predict(by_hand.transform(scaler.transform(source)))
    )
    alone = make_pipeline(CORAL()).fit(source, labels, coral__target=target)
    np.testing.assert_allclose(alone.transform(source), CORAL().fit_transform(source, target), atol=1e-9)


# Errors


def with_value(x: Any, value: float) -> Any:
    x = x.copy()
    x[7, 2] = value
    return x


BAD_FITS: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (S, None, {}, InputError, r"CORAL needs two domains, got no target: fit\(source, target\)"),
    (S, np.arange(60), {}, InputError, "expected the target's data.*got one value a sample, which looks like labels"),
    (S, [0, 1] * 30, {}, InputError, "which looks like labels: CORAL needs none, pass the data as target="),
    (S, pd.Series(range(60)), {}, InputError, "which looks like labels"),
    (S, torch.arange(60), {}, InputError, "which looks like labels"),
    (S, T[:, :3], {}, ShapeError, "target: X has 3 features, but CORAL is expecting 4 features"),
    (S, torch.from_numpy(T[:, :3]), {}, ShapeError, "target: X has 3 features, but CORAL is expecting 4 features"),
    (with_value(S, np.inf), T, {}, InputError, "^Input X contains infinity: row 7, column 2"),
    (S, with_value(T, -np.inf), {}, InputError, "target: Input X contains infinity: row 7, column 2"),
    (S, T * 1e200, {}, InputError, "target: Input X holds values too large"),
    (S, [], {}, ShapeError, "target: "),
    (S, T[:0], {}, ShapeError, r"target: Found array with 0 sample\(s\)"),
    (S, [["a"] * 4], {}, InputError, "target: expected numbers, got text"),
    (S, torch.from_numpy(T) * 1j, {}, DtypeError, "target: expected real numbers, got a tensor of torch.complex128"),
    (S, T, {"sample_weight": np.ones(80)}, ShapeError, r"^sample_weight must have shape \(60,\)"),
    (S, T, {"target_weight": np.ones(60)}, ShapeError, r"target: sample_weight must have shape \(80,\)"),
    (S, T, {"target_weight": np.zeros(80)}, InputError, "target: sample weights must contain at least one non-zero"),
    (S, np.full_like(T, np.nan), {}, InputError, "every sample of the target has a NaN in some feature"),
]


@pytest.mark.parametrize(("source", "target", "parameters", "error", "text"), BAD_FITS, ids=[c[4] for c in BAD_FITS])
def test_a_failed_fit_says_why_and_changes_nothing(
    source: Any, target: Any, parameters: dict[str, Any], error: type[Exception], text: str
) -> None:
    for estimator in (CORAL(), CORAL().fit(T, S)):
        before = dict(vars(estimator))
        with pytest.raises(error, match=text) as caught:
            estimator.fit(source, target, **parameters)
        assert isinstance(caught.value, BatchnormError)
        assert "\n" not in str(caught.value)
        assert vars(estimator) == before


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"regularization": -1}, "regularization must be a finite number and not negative, got -1"),
        ({"regularization": "1"}, "regularization must be a finite number"),
        ({"tol": np.inf}, "tol must be a finite number and not negative, got inf"),
        ({"shrinkage": 1.5}, r'shrinkage must be None, "ledoit-wolf" or a number in \[0, 1\], got 1.5'),
        ({"shrinkage": "oas"}, "shrinkage must be None"),
        ({"channel_axis": 0}, "channel_axis must be None or the axis of the channels"),
    ],
)
def test_parameters_that_make_no_sense(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        CORAL(**parameters).fit(S, T)


def test_half_of_it() -> None:
    with pytest.raises(NotFittedError):
        CORAL().transform(S)
    with pytest.raises(
        InputError, match=r"a batch of the source, partial_fit\(X\), or of the target, partial_fit\(target"
    ):
        CORAL().partial_fit()
    with pytest.raises(InputError, match=r"has seen no target: partial_fit\(target=...\)"):
        CORAL().partial_fit(S).transform(S)
    half = CORAL().partial_fit(target=T)
    assert (half.n_samples_seen_, half.n_target_samples_seen_) == (0, 80)
    np.testing.assert_allclose(half.target_mean_, T.mean(0))
    with pytest.raises(InputError, match=r"has seen no source: partial_fit\(X\)"):
        half.to_module()
    with pytest.raises(ShapeError, match="X has 3 features, but CORAL is expecting 4"):
        half.partial_fit(S[:, :3])


def test_merging_what_does_not_fit() -> None:
    fitted = CORAL().fit(S, T)
    before = fitted.matrix_
    for other, error, text in [
        (CORAL().fit(S[:, :3], T[:, :3]), ShapeError, "cannot merge CORALs of different width: 3 features into 4"),
        (StandardScaler().fit(S), DtypeError, "expected another CORAL to merge, got StandardScaler"),
        (CORAL(shrinkage="ledoit-wolf").fit(S, T), InputError, "needs statistics of its own from the first batch on"),
    ]:
        with pytest.raises(error, match=text):
            fitted.merge(other)
    with pytest.raises(InputError, match="needs statistics of its own from the first batch on"):
        fitted.set_params(shrinkage="ledoit-wolf").partial_fit(target=T)
    np.testing.assert_array_equal(fitted.matrix_, before)
