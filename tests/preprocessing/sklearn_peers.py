"""Our estimators under the names and with the parameters of scikit-learn's, for scikit-learn's own tests."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from batchnorm import preprocessing
from batchnorm.preprocessing import StandardScaler, Whitener


class MinMaxScaler(preprocessing.MinMaxScaler):
    """Ours, with scikit-learn's default range."""

    def __init__(
        self,
        feature_range: tuple[float, float] = (0, 1),
        *,
        copy: bool = True,
        clip: bool = False,
        channel_axis: int | None = None,
    ) -> None:
        super().__init__(feature_range, copy=copy, clip=clip, channel_axis=channel_axis)


def _rows(function: Any, X: Any, axis: int) -> Any:
    """A scaling of columns applied to a vector, to columns or to rows."""
    if hasattr(X, "toarray"):
        if axis != 0:
            raise ValueError("can only scale sparse data on axis=0")
        return function(X)
    array = np.asarray(X)
    if array.ndim == 1:
        return function(array.reshape(-1, 1)).ravel()
    return function(array) if axis == 0 else function(array.T).T


def scale(X: Any, *, axis: int = 0, with_mean: bool = True, with_std: bool = True, copy: bool = True) -> Any:
    """``sklearn.preprocessing.scale`` by our StandardScaler."""
    scaler = StandardScaler(with_mean=with_mean, with_std=with_std, copy=copy)
    return _rows(scaler.fit_transform, X, axis)


def minmax_scale(X: Any, feature_range: tuple[float, float] = (0, 1), *, axis: int = 0, copy: bool = True) -> Any:
    """``sklearn.preprocessing.minmax_scale`` by our MinMaxScaler."""
    return _rows(MinMaxScaler(feature_range, copy=copy).fit_transform, X, axis)


class PCA(TransformerMixin, BaseEstimator):
    """scikit-learn's PCA by our Whitener: its variances are unbiased, and without ``whiten`` the outputs keep theirs.

    With ``n`` samples: ``var_unbiased = var n / (n - 1)``, whitened ``y sqrt((n - 1) / n)``, not whitened
    ``y sqrt(var)``. Parameters about solvers are accepted; there is one exact answer.
    """

    def __init__(
        self,
        n_components: Any = None,
        *,
        copy: bool = True,
        whiten: bool = False,
        svd_solver: str = "auto",
        tol: float = 0.0,
        iterated_power: Any = "auto",
        n_oversamples: int = 10,
        power_iteration_normalizer: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.copy = copy
        self.whiten = whiten
        self.svd_solver = svd_solver
        self.tol = tol
        self.iterated_power = iterated_power
        self.n_oversamples = n_oversamples
        self.power_iteration_normalizer = power_iteration_normalizer
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002
        self.whitener_ = Whitener("pca", n_components=self.n_components).fit(X)
        return self

    def _factor(self) -> Any:
        count = self.whitener_.n_samples_seen_
        if self.whiten:
            return np.sqrt((count - 1) / count)
        return np.sqrt(self.whitener_.explained_variance_)

    def transform(self, X: Any) -> Any:
        y = self.whitener_.transform(X)
        return (y * self._factor()).astype(y.dtype)

    def inverse_transform(self, X: Any) -> Any:
        return self.whitener_.inverse_transform((X / self._factor()).astype(X.dtype))

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        names = self.whitener_.get_feature_names_out(input_features)
        return [name.replace("whitener", type(self).__name__.lower()) for name in names]

    @property
    def components_(self) -> Any:
        return self.whitener_.components_

    @property
    def n_components_(self) -> int:
        return self.whitener_.n_components_

    @property
    def n_samples_seen_(self) -> Any:
        return self.whitener_.n_samples_seen_

    @property
    def mean_(self) -> Any:
        return self.whitener_.mean_

    @property
    def explained_variance_(self) -> Any:
        count = self.whitener_.n_samples_seen_
        return self.whitener_.explained_variance_ * (count / (count - 1))

    @property
    def explained_variance_ratio_(self) -> Any:
        return self.whitener_.explained_variance_ratio_

    @property
    def singular_values_(self) -> Any:
        return np.sqrt(self.whitener_.explained_variance_ * self.whitener_.n_samples_seen_)


class IncrementalPCA(PCA):
    """The same, learning ``batch_size`` rows at a time."""

    def __init__(
        self, n_components: Any = None, *, whiten: bool = False, copy: bool = True, batch_size: int | None = None
    ) -> None:
        super().__init__(n_components, whiten=whiten, copy=copy)
        self.batch_size = batch_size

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002
        vars(self).pop("whitener_", None)
        step = self.batch_size or 5 * X.shape[1]
        for start in range(0, X.shape[0], step):
            self.partial_fit(X[start : start + step])
        return self

    def partial_fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002
        whitener = getattr(self, "whitener_", Whitener("pca", n_components=self.n_components))
        self.whitener_ = whitener.partial_fit(X)
        return self
