"""The estimators inside scikit-learn: routing of weights, pipelines, searches, unions, parallel work, copies."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.compose import ColumnTransformer, make_column_selector, make_column_transformer
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.pipeline import FeatureUnion, make_pipeline, make_union
from sklearn.preprocessing import OneHotEncoder

from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener

ESTIMATORS = [
    MeanSubtractor(),
    StandardScaler(),
    MinMaxScaler((0, 1), clip=True),
    Whitener("pca", n_components=2),
    Whitener("zca-cor"),
    Whitener("cholesky"),
]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.2], [0, 0, 2.0]]) + 3
Y = (X[:, 0] > 3).astype(int)
WEIGHTS = RNG.random(60)
FRAME = pd.DataFrame(X, columns=["a", "b", "c"])


def learned(estimator: Any) -> Any:
    return estimator.transform(X)


@pytest.fixture
def routing() -> Iterator[None]:
    with config_context(enable_metadata_routing=True):
        yield


@pytest.mark.usefixtures("routing")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
class TestRouting:
    def test_weights_that_were_asked_for_arrive(self, estimator: Any) -> None:
        asking = clone(estimator).set_fit_request(sample_weight=True)
        model = make_pipeline(asking, LogisticRegression().set_fit_request(sample_weight=True))
        model.fit(X, Y, sample_weight=WEIGHTS)
        np.testing.assert_array_equal(learned(model[0]), learned(clone(estimator).fit(X, sample_weight=WEIGHTS)))

    def test_weights_that_were_not_asked_for_do_not(self, estimator: Any) -> None:
        silent = clone(estimator).set_fit_request(sample_weight=False)
        model = make_pipeline(silent, LogisticRegression().set_fit_request(sample_weight=True))
        model.fit(X, Y, sample_weight=WEIGHTS)
        np.testing.assert_array_equal(learned(model[0]), learned(clone(estimator).fit(X)))
        undecided = make_pipeline(clone(estimator), LogisticRegression().set_fit_request(sample_weight=True))
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            undecided.fit(X, Y, sample_weight=WEIGHTS)

    def test_another_name(self, estimator: Any) -> None:
        asking = clone(estimator).set_fit_request(sample_weight="importance")
        columns = ColumnTransformer([("all", asking, ["a", "b", "c"])]).fit(FRAME, importance=WEIGHTS)
        expected = clone(estimator).fit(FRAME, sample_weight=WEIGHTS).transform(FRAME)
        np.testing.assert_array_equal(columns.transform(FRAME), expected)

    def test_partial_fit_has_a_request_too(self, estimator: Any) -> None:
        asking = clone(estimator).set_partial_fit_request(sample_weight=True)
        assert asking.get_metadata_routing().partial_fit.requests == {"sample_weight": True}
        assert clone(asking).get_metadata_routing().partial_fit.requests == {"sample_weight": True}

    def test_searches_and_cross_validation(self, estimator: Any) -> None:
        asking = clone(estimator).set_fit_request(sample_weight=True)
        model = make_pipeline(asking, LogisticRegression().set_fit_request(sample_weight=False))
        model[-1].set_score_request(sample_weight=True)
        search = GridSearchCV(model, {"logisticregression__C": [0.1, 1]}, cv=3).fit(X, Y, sample_weight=WEIGHTS)
        fitted = search.best_estimator_[0]
        np.testing.assert_array_equal(learned(fitted), learned(clone(estimator).fit(X, sample_weight=WEIGHTS)))
        scores = cross_validate(model, X, Y, params={"sample_weight": WEIGHTS}, error_score="raise")
        assert len(scores["test_score"]) == 5


@pytest.mark.usefixtures("routing")
def test_the_copy_of_transform_can_be_asked_for() -> None:
    asking = StandardScaler().set_transform_request(copy=True)
    assert asking.get_metadata_routing().transform.requests == {"copy": True}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
class TestInsideScikitLearn:
    def test_a_column_transformer_with_text_beside_numbers(self, estimator: Any) -> None:
        frame = FRAME.assign(city=np.where(Y, "x", "y"))
        numbers = make_column_selector(dtype_include=float)
        transformer = make_column_transformer(
            (clone(estimator), numbers), (OneHotEncoder(sparse_output=False), ["city"])
        )
        y = transformer.set_output(transform="pandas").fit_transform(frame)
        own = clone(estimator).fit(FRAME)
        np.testing.assert_array_equal(y.iloc[:, :-2], own.transform(FRAME))
        prefix = type(estimator).__name__.lower()
        assert list(y.columns[:-2]) == [f"{prefix}__{name}" for name in own.get_feature_names_out()]

    def test_a_union(self, estimator: Any) -> None:
        union: FeatureUnion = make_union(clone(estimator), StandardScaler()).fit(X)
        own = clone(estimator).fit(X)
        np.testing.assert_array_equal(union.transform(X), np.c_[own.transform(X), StandardScaler().fit_transform(X)])
        assert len(union.get_feature_names_out()) == union.transform(X).shape[1]

    def test_cross_validation_learns_from_the_training_part_alone(self, estimator: Any) -> None:
        seen: list[int] = []

        class Watched(type(estimator)):  # type: ignore[misc]
            def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
                seen.append(len(X))
                return super().fit(X, y, sample_weight)

        watched = Watched(**estimator.get_params())
        scores = cross_val_score(make_pipeline(watched, LogisticRegression()), X, Y, cv=3, error_score="raise")
        assert seen == [40, 40, 40]
        assert scores.mean() > 0.7

    def test_clones_pickles_and_workers(self, estimator: Any) -> None:
        fitted = clone(estimator).fit(FRAME)
        blank = clone(fitted)
        assert vars(blank) == vars(clone(estimator))
        for copy in (
            pickle.loads(pickle.dumps(fitted)),
            joblib.Parallel(2, "threading")([joblib.delayed(clone)(fitted)])[0].fit(FRAME),
        ):
            np.testing.assert_array_equal(copy.transform(FRAME), fitted.transform(FRAME))
            np.testing.assert_array_equal(copy.partial_fit(FRAME).transform(FRAME).shape, fitted.transform(FRAME).shape)
        parts = joblib.Parallel(2, "threading")(joblib.delayed(clone(estimator).fit)(part) for part in np.split(X, 3))
        merged = parts[0].merge(parts[1]).merge(parts[2])
        np.testing.assert_allclose(merged.transform(X), clone(estimator).fit(X).transform(X), rtol=1e-9, atol=1e-10)

    def test_parameters_can_be_set_and_shown(self, estimator: Any) -> None:
        assert clone(estimator).set_params(channel_axis=1).get_params()["channel_axis"] == 1
        with pytest.raises(ValueError, match="Invalid parameter"):
            clone(estimator).set_params(nonsense=1)
        assert type(estimator).__name__ in clone(estimator).fit(X)._repr_html_()
        assert "fitted" in make_pipeline(clone(estimator)).fit(X)._repr_html_()

    def test_a_search_over_its_parameters(self, estimator: Any) -> None:
        name = type(estimator).__name__.lower()
        choices = {
            "meansubtractor": {"copy": [True, False]},
            "standardscaler": {"with_mean": [True, False], "with_std": [True, False]},
            "minmaxscaler": {"feature_range": [(0, 1), (-1, 1)]},
            "whitener": {"method": ["pca", "zca", "cholesky"], "shrinkage": [None, "ledoit-wolf", 0.1]},
        }[name]
        grid = {f"{name}__{parameter}": values for parameter, values in choices.items()}
        model = make_pipeline(
            clone(estimator).set_params(**{"n_components": None} if name == "whitener" else {}), LogisticRegression()
        )
        search = GridSearchCV(model, grid, cv=3, error_score="raise").fit(FRAME, Y)
        assert search.best_score_ > 0.8
