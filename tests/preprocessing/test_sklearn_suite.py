"""scikit-learn's own tests of its scalers and of PCA, run with our classes in place of theirs.

Whatever their files hold is run, unless ``LEFT_OUT`` names it and says why; a newer scikit-learn with more tests runs
those too. Its array-API tests need ``SCIPY_ARRAY_API=1`` before SciPy is imported and run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

from batchnorm.preprocessing import MeanSubtractor, StandardScaler, Whitener
from preprocessing import sklearn_peers as ours

_OTHER = "of another class, of which this package has none"
_FUNCTION = "of a private function of scikit-learn"
_NOISE = "of probabilistic PCA: its noise variance, covariance and likelihood, which a Whitener does not have"
_SOLVERS = "of the choice between solvers: a Whitener has one exact answer"
_MLE = 'of n_components="mle", which a Whitener does not have'
_ATTRIBUTES = "expects learned attributes of the data's kind and dtype: ours are NumPy and float64 whatever the data"
_RANK = "counts directions without variance as components: a Whitener drops them"
_SPARSE = "of sparse data, which whitening would fill in: they are refused"
_TEXT = "expects scikit-learn's text: ours names the row and the column, or says another thing"

LEFT_OUT: dict[str, dict[str, str]] = {
    "sklearn.preprocessing.tests.test_data": {
        **dict.fromkeys(("test_robust_*", "test_maxabs_*", "test_quantile_*", "test_power_*"), _OTHER),
        **dict.fromkeys(("test_normaliz*", "test_binarizer*", "test_*kernel*", "test_add_dummy_*"), _OTHER),
        **dict.fromkeys(("test_*yeo*johnson*", "test_invserse_box_cox", "test_optimization_power*"), _OTHER),
        **dict.fromkeys(("test_cv_pipeline_precomputed", "test_transformer_inverse_transform_*"), _OTHER),
        "test_handle_zeros_in_scale": _FUNCTION,
        "test_scale_input_finiteness_validation": _TEXT,
        "test_standard_scaler_callback_support": "of scikit-learn's callbacks, which its base class does not have",
        "test_standard_scaler_numerical_stability": "expects scale to warn of its own rounding: ours needs no warning",
        "test_preprocessing_integer_array_api_on_float32_only_device": "needs Apple's GPU",
        "test_preprocessing_array_api_compliance": _ATTRIBUTES,
        "test_standard_scaler_array_api_compliance": _ATTRIBUTES,
    },
    "sklearn.decomposition.tests.test_pca": {
        **dict.fromkeys(("test_infer_dim_[123]", "test_assess_dimension_*", "test_small_eigenvalues_mle"), _FUNCTION),
        **dict.fromkeys(("test_pca", "test_pca_score*", "test_pca_*noise_variance*"), _NOISE),
        **dict.fromkeys(("test_n_components_mle*", "test_*mle_*", "test_pca_dim"), _MLE),
        **dict.fromkeys(("test_pca_svd_solver_auto", "test_array_api_error_and_warnings_*"), _SOLVERS),
        **dict.fromkeys(("test_pca_dtype_preservation", "test_pca_array_api_compliance"), _ATTRIBUTES),
        **dict.fromkeys(("test_pca_sparse*", "test_sparse_pca_*"), _SPARSE),
        "test_n_components_none": _RANK,
        "test_pca_validation": _TEXT,
        "test_pca_n_components_mostly_explained_variance_ratio": "wants more than the share asked for: ours no less",
    },
    "sklearn.decomposition.tests.test_incremental_pca": {
        **dict.fromkeys(("test_incremental_pca", "test_explained_variances"), _NOISE),
        "test_incremental_pca_sparse": _SPARSE,
        "test_n_components_none": _RANK,
        "test_incremental_pca_validation": _TEXT,
        "test_incremental_pca_set_params": "n_components is fixed by its first batch: ours may change at any time",
        "test_incremental_pca_partial_fit_float_division": "writes to a learned attribute, which is only read in ours",
    },
}
# Said on purpose, and scikit-learn's own, in tests of several classes.
_WARNINGS = (
    "ignore:StandardScaler saw only NaN",
    "ignore:n_components=.*directions have variance",
    "ignore:n_quantiles",
)
_ARRAY_API = os.environ.get("SCIPY_ARRAY_API") == "1"


def theirs(name: str) -> ModuleType:
    """A file of scikit-learn's tests as a module of its own, in which the names are ours."""
    import sklearn.decomposition
    import sklearn.preprocessing

    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    scalers = {"StandardScaler": StandardScaler, "MinMaxScaler": ours.MinMaxScaler}
    functions = {"scale": ours.scale, "minmax_scale": ours.minmax_scale}
    rotations = {"PCA": ours.PCA, "IncrementalPCA": ours.IncrementalPCA}
    with (
        mock.patch.multiple(sklearn.preprocessing, **scalers, **functions),
        mock.patch.multiple(sklearn.decomposition, **rotations),
    ):
        spec.loader.exec_module(module)
    return module


def adopt(test: Callable[..., Any]) -> Callable[..., Any]:
    """Their test as one of ours, where every warning is an error unless expected."""
    marks = [pytest.mark.filterwarnings(text).mark for text in _WARNINGS]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":  # pytest warns of a generator here
            names, values, *rest = mark.args
            marks.append(pytest.mark.parametrize(names, list(values), *rest, **mark.kwargs).mark)
        else:
            marks.append(mark)
    test.pytestmark = marks  # type: ignore[attr-defined]
    return test


def named_in(file: str) -> dict[str, Callable[..., Any]]:
    return {name: test for name, test in vars(theirs(file)).items() if name.startswith("test_")}


def is_left_out(file: str, name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT[file])


THEIRS = {file: named_in(file) for file in LEFT_OUT}
RUN = {
    f"{name}__{file.rpartition('.')[2]}": adopt(test)
    for file, tests in THEIRS.items()
    for name, test in tests.items()
    if not is_left_out(file, name) and ("array_api" in name) == _ARRAY_API
}
globals().update(RUN)


@pytest.mark.parametrize("file", LEFT_OUT)
def test_the_table_names_tests_that_are_there(file: str) -> None:
    for pattern in LEFT_OUT[file]:
        assert any(fnmatch(name, pattern) for name in THEIRS[file]), pattern
    left = sum(is_left_out(file, name) for name in THEIRS[file])
    assert left < len(THEIRS[file])


@pytest.mark.skipif(_ARRAY_API, reason="this is that process")
def test_with_array_api_dispatch_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    done = subprocess.run(
        [*command, "-k", "array_api"], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout


@pytest.mark.skipif(not _ARRAY_API, reason="needs SCIPY_ARRAY_API=1, see above")
def test_array_api_dispatch_changes_nothing() -> None:
    x = torch.arange(12.0).reshape(4, 3).square()
    for estimator in (StandardScaler(), ours.MinMaxScaler(), MeanSubtractor(), Whitener("zca")):
        expected = clone(estimator).fit_transform(x)
        with config_context(array_api_dispatch=True):
            y = clone(estimator).fit_transform(x, sample_weight=torch.ones(4))
            assert isinstance(y, torch.Tensor)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(estimator.fit(x).inverse_transform(y), x)
            assert isinstance(make_pipeline(StandardScaler(), clone(estimator)).fit_transform(x), torch.Tensor)


@pytest.fixture
def global_random_seed() -> int:
    """scikit-learn's fixture."""
    return 42


@pytest.fixture(params=["float32", "float64"])
def global_dtype(request: Any) -> Any:
    """scikit-learn's fixture."""
    import numpy as np

    return np.dtype(request.param).type
