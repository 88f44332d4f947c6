"""scikit-learn's own checks of an estimator, none of them expected to fail."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_global_output_transform_pandas,
    check_global_set_output_transform_polars,
    check_inplace_ensure_writeable,
    check_n_features_in,
    check_set_output_transform,
    check_set_output_transform_pandas,
    check_set_output_transform_polars,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
    parametrize_with_checks,
)

from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener

ESTIMATORS = [
    MeanSubtractor(),
    StandardScaler(),
    StandardScaler(with_mean=False),
    MinMaxScaler(),
    MinMaxScaler(feature_range=(0, 1), clip=True),
    *(Whitener(method) for method in ("pca", "zca", "cholesky", "pca-cor", "zca-cor")),
    Whitener("pca", n_components=1),
    Whitener("zca", shrinkage="ledoit-wolf"),
    Whitener("zca-cor", shrinkage=0.1, eps=1e-3),
    Whitener("pca", solver="gram"),
    Whitener("zca", solver="eigh"),
]
# Its partial_fit refuses, in so many words: it needs all data at once.
AT_ONCE = Whitener("pca", n_components=1, solver="randomized")
NEED_BATCHES = ("check_fit_score_takes_y", "check_n_features_in_after_fitting")


@parametrize_with_checks(
    [*ESTIMATORS, AT_ONCE],
    expected_failed_checks=lambda e: (
        dict.fromkeys(NEED_BATCHES, "calls partial_fit") if repr(e) == repr(AT_ONCE) else {}
    ),
)
def test_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


# scikit-learn runs these on its own classes only: they are not part of check_estimator. They fit arrays and transform
# frames, of which scikit-learn warns.
@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names:UserWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(
    "check",
    [
        check_dataframe_column_names_consistency,
        check_global_output_transform_pandas,
        check_global_set_output_transform_polars,
        check_n_features_in,
        check_set_output_transform,
        check_set_output_transform_pandas,
        check_set_output_transform_polars,
        check_transformer_get_feature_names_out,
        check_transformer_get_feature_names_out_pandas,
    ],
    ids=lambda check: check.__name__,
)
def test_transformer_beyond_the_battery(estimator: Any, check: Any) -> None:
    check(type(estimator).__name__, estimator)


@pytest.mark.parametrize(
    "estimator", [MeanSubtractor(copy=False), StandardScaler(copy=False), MinMaxScaler(copy=False)]
)
def test_read_only_data_are_not_written_to(estimator: Any) -> None:
    check_inplace_ensure_writeable(type(estimator).__name__, estimator)
