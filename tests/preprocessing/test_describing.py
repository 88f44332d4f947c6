"""What is told of saved statistics: numbers as NumPy has them, and what is suspicious in them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from batchnorm.preprocessing import CORAL, MeanSubtractor, MinMaxScaler, StandardScaler, Whitener, describe

RNG = np.random.default_rng(0)
X = RNG.normal(5.0, 2.0, (400, 4)) @ np.diag([1.0, 10.0, 0.1, 3.0])


def kinds(estimator: Any) -> dict[str, tuple[int, ...]]:
    return {finding.kind: finding.features for finding in describe(estimator).findings}


def test_numbers_are_numpys() -> None:
    about = describe(StandardScaler().fit(X))
    np.testing.assert_allclose(about.columns["mean"], X.mean(0))
    np.testing.assert_allclose(about.columns["std"], X.std(0))
    assert (about.samples, about.features, about.names, about.findings, about.title) == (
        400,
        4,
        None,
        (),
        "StandardScaler()",
    )
    ranges = describe(MinMaxScaler((0, 1)).fit(X))
    assert ranges.columns == {"min": tuple(X.min(0)), "max": tuple(X.max(0))}
    assert ranges.title == "MinMaxScaler(feature_range=[0, 1])"
    both = describe(CORAL().fit(X, X[:100] * 2))
    np.testing.assert_allclose(both.columns["target std"], X[:100].std(0) * 2)
    with pytest.raises(NotFittedError):
        describe(StandardScaler())


def test_the_spectrum_is_that_of_the_covariance() -> None:
    values = np.linalg.eigvalsh(np.cov(X.T, bias=True))[::-1]
    spectrum = describe(Whitener().fit(X)).spectrum
    assert spectrum is not None
    np.testing.assert_allclose(spectrum.variance, values)
    np.testing.assert_allclose(spectrum.ratio, values / values.sum())
    assert (spectrum.rank, spectrum.kept, spectrum.without_variance) == (4, 4, 0)
    assert spectrum.condition == pytest.approx(values[0] / values[-1])
    share = values / values.sum()
    assert spectrum.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    cholesky = describe(Whitener("cholesky").fit(X)).spectrum
    assert cholesky is not None
    # C^T whitens: its singular values are the inverse roots of the covariance's eigenvalues.
    assert cholesky.condition == pytest.approx(values[0] / values[-1])
    assert cholesky.variance == ()


def test_constant_empty_and_mostly_missing_features() -> None:
    data = X.copy()
    data[:, 0] = 3.0
    data[:, 1] = np.nan
    data[50:, 2] = np.nan
    with pytest.warns(RuntimeWarning, match="saw only NaN"):
        scaler = StandardScaler().fit(data)
    about = describe(scaler)
    assert kinds(scaler) == {"empty": (1,), "missing": (2,), "constant": (0,)}
    assert (about.constant, about.empty, about.samples) == ((0,), (1,), None)
    assert about.columns["mean"][1] is None
    assert about.columns["missing"] == (0.0, 1.0, 0.875, 0.0)
    assert about.samples_text == "50 to 400, by feature"
    with pytest.warns(RuntimeWarning, match="saw only NaN"):
        assert set(kinds(MinMaxScaler().fit(data))) == {"empty", "constant"}
    json.dumps(about.to_dict(), allow_nan=False)


def test_a_deviation_lost_beside_its_mean() -> None:
    data = X.copy()
    data[:, 3] = 1e9 + RNG.normal(0, 10, 400)
    assert kinds(StandardScaler().fit(data)) == {"offset": (3,)}
    data[:, 3] = 1e6 + RNG.normal(0, 10, 400)
    assert kinds(StandardScaler().fit(data)) == {}


def test_scales_far_apart_matter_where_nothing_brings_them_together() -> None:
    data = X * np.array([1, 1, 1e-8, 1])
    assert kinds(MeanSubtractor().fit(data)) == {"scales": (2, 1)}
    assert kinds(Whitener().fit(data))["scales"] == (2, 1)
    assert kinds(StandardScaler().fit(data)) == {}
    assert kinds(Whitener("pca-cor").fit(data)) == {}


def test_whitening_of_too_few_samples() -> None:
    assert "samples" in kinds(Whitener("zca").fit(X[:30]))
    assert "samples" not in kinds(Whitener("zca").fit(X[:40]))
    assert "samples" not in kinds(Whitener("zca", shrinkage="ledoit-wolf").fit(X[:30]))
    assert "samples" in kinds(StandardScaler().fit(X[:1]))


@pytest.mark.parametrize("method", ["pca", "zca", "pca-cor", "zca-cor"])
def test_features_that_are_combinations_of_others_are_named(method: str) -> None:
    data = np.column_stack([X, X[:, 0] - 2 * X[:, 2], np.full(400, 7.0)])
    found = kinds(Whitener(method).fit(data))
    assert set(found["rank"]) == {0, 2, 4}
    assert found["constant"] == (5,)
    almost = np.column_stack([X, X[:, 0] - 2 * X[:, 2] + RNG.normal(0, 1e-5, 400)])
    assert set(kinds(Whitener(method).fit(almost))) == {"condition"}


def test_fewer_samples_than_features_are_no_dependence_of_features() -> None:
    about = describe(Whitener().fit(RNG.normal(size=(20, 50))))
    (rank,) = [finding for finding in about.findings if finding.kind == "rank"]
    assert rank.severity == "info"
    assert "there are no more samples than features" in rank.text
    assert about.spectrum is not None
    assert about.spectrum.without_variance == 31


def test_features_without_a_value_do_not_make_a_range_of_the_samples() -> None:
    data = X.copy()
    data[:, 1] = np.nan
    with pytest.warns(RuntimeWarning, match="saw only NaN"):
        assert describe(StandardScaler().fit(data)).samples_text == str(len(X))
