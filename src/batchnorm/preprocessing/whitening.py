"""Decorrelate: features with unit variance and no correlation."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm._errors import InputError
from batchnorm.moments import Scatter
from batchnorm.preprocessing.base import Array, Normalizer, samples_seen
from batchnorm.preprocessing.decomposition import METHODS, Whitening, solve
from batchnorm.preprocessing.folding import LinearMap
from batchnorm.preprocessing.inputs import Batch, give_back, refuse_infinite
from batchnorm.preprocessing.modules import WhiteningModule
from batchnorm.preprocessing.shrinkage import FourthMoments

_MATRICES = ("whitening", "dewhitening", "components", "variance", "ratio")


class Whitener(Normalizer):
    """Whiten: ``y = W (x - mean)`` with ``W S W^T = I``, ``S`` the biased covariance (ddof 0) of the data.

    Parameters
    ----------
    method: the matrix ``W`` (Kessy, Lewin, Strimmer 2018, see ``decomposition``): "pca" rotates to the eigenvectors and
        scales each to unit variance; "zca" rotates back, so that outputs stay as close to the features as whitening
        allows; "cholesky" is triangular; "pca-cor" and "zca-cor" standardize the features first, which makes them
        independent of the features' units ("pca-cor" is the recipe centre, normalize, covariance, SVD, project).
    n_components: how many directions to keep: an int; a share of the variance, a float in (0, 1]; None for all. The pca
        forms then have so many outputs, the zca forms project onto so many; "cholesky" takes an int and gives the last
        so many outputs, which whiten the last so many features.
    shrinkage: draw the decomposed matrix (covariance, or correlation in the -cor forms) towards a multiple of the
        identity: a float in [0, 1], or "ledoit-wolf" for the optimal one, exact from batches too (at three times the
        cost of fitting). Every direction then has variance, as long as any has.
    eps: added to the variance of every direction kept, in units of the decomposed matrix.
    tol: relative rank tolerance. A direction with at most ``tol`` times the largest variance (in the cholesky form: a
        feature of whose variance at most the share ``tol`` is not explained by those behind it) is without variance:
        dropped in the pca forms, left at 0 in the others, never amplified. None is ``10 p eps`` for p features.
    channel_axis: 1 whitens the channels of data of shape (N, C, *), every position a sample; None takes (N, features).

    Attributes, float64
    -------------------
    whitening_ (outputs, features), dewhitening_ (features, outputs), mean_ (features,); not for "cholesky":
    components_ (n_components_, features), the eigenvectors as rows, by falling variance, each with the sign that makes
    the first of its largest entries positive; explained_variance_ (the data's, before shrinking and ``eps``) and
    explained_variance_ratio_. rank_, shrinkage_ (the intensity used), n_samples_seen_, n_features_in_,
    feature_names_in_. ``partial_fit`` leaves the decomposition until one of them, or ``transform``, is used.

    A sample with a NaN in any feature is left out of ``fit``, so that the covariance stays positive semidefinite, and
    comes out of ``transform`` as NaN. A constant feature (see ``StandardScaler``) has variance 0. Fewer samples than
    features are fine: at most N - 1 directions have variance.

    Unlike ``sklearn.decomposition.PCA(whiten=True)`` the variances are biased (1/N), as in the scalers.
    """

    _stats: Scatter | FourthMoments
    _solution: Whitening | None
    n_samples_seen_: int | float | Array

    def __init__(
        self,
        method: str = "pca",
        *,
        n_components: int | float | None = None,
        shrinkage: str | float | None = None,
        eps: float = 0.0,
        tol: float | None = None,
        channel_axis: int | None = None,
    ) -> None:
        self.method = method
        self.n_components = n_components
        self.shrinkage = shrinkage
        self.eps = eps
        self.tol = tol
        self.channel_axis = channel_axis

    # Learning

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice("method", self.method, METHODS)
        wanted: Any = self.n_components
        whole = isinstance(wanted, Integral) and not isinstance(wanted, bool) and int(wanted) >= 1
        share = isinstance(wanted, Real) and not isinstance(wanted, Integral) and 0 < float(wanted) <= 1
        if wanted is not None and not (whole or share):
            raise InputError(
                f"n_components must be an integer from 1, a share of the variance in (0, 1] or None, got {wanted!r}"
            )
        if share and self.method == "cholesky":
            raise InputError(f'method="cholesky" has no shares of variance: n_components must be whole, got {wanted!r}')
        shrinkage: Any = self.shrinkage
        fixed = isinstance(shrinkage, Real) and not isinstance(shrinkage, bool) and 0 <= float(shrinkage) <= 1
        if not (shrinkage is None or fixed or (isinstance(shrinkage, str) and shrinkage == "ledoit-wolf")):
            raise InputError(f'shrinkage must be None, "ledoit-wolf" or a number in [0, 1], got {shrinkage!r}')
        for name, value in (("eps", self.eps), ("tol", 0 if self.tol is None else self.tol)):
            if not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
                raise InputError(f"{name} must be a finite number and not negative, got {value!r}")

    def _check_mergeable(self, other: Self) -> None:
        if other.method != self.method:
            raise InputError(f"cannot merge a Whitener of method={other.method!r} into one of method={self.method!r}")
        super()._check_mergeable(other)
        if self.__sklearn_is_fitted__():
            self._check_same_statistics(other._stats)

    def _check_same_statistics(self, stats: Scatter | FourthMoments) -> None:
        if type(stats) is not type(self._stats):
            raise InputError('shrinkage="ledoit-wolf" needs statistics of its own from the first batch on: fit again')

    def _statistics(self, batch: Batch, weights: Tensor | None) -> Scatter | FourthMoments:
        wanted: Any = self.n_components
        if isinstance(wanted, Integral) and int(wanted) > batch.num_channels:
            raise InputError(
                f"n_components={wanted} is more than the data's n_features = {batch.num_channels}: ask for fewer"
            )
        kind = FourthMoments if self.shrinkage == "ledoit-wolf" else Scatter
        stats = kind.from_batch(batch.values, channel_axis=batch.axis, weights=weights, skip_nan=True).to("cpu")
        self._refuse_unusable(batch, *stats.to_dict().values())
        if self.__sklearn_is_fitted__():
            self._check_same_statistics(stats)
        return stats

    def _publish(self) -> None:
        self.n_samples_seen_ = samples_seen(self._stats.count.reshape(1))
        self._solution = None

    def _complete(self) -> None:
        self._solve()

    def _scatter(self) -> Scatter:
        return self._stats.base if isinstance(self._stats, FourthMoments) else self._stats

    def _solve(self) -> Whitening:
        """The matrices, computed once after learning."""
        check_is_fitted(self)
        if self._solution is None:
            self._check_parameters()
            wanted: Any = self.n_components
            if wanted is not None:
                wanted = int(wanted) if isinstance(wanted, Integral) else float(wanted)
            shrinkage: Any = self.shrinkage
            self._solution = solve(
                self._stats,
                method=self.method,
                n_components=wanted,
                shrinkage=shrinkage if shrinkage is None or isinstance(shrinkage, str) else float(shrinkage),
                eps=float(self.eps),
                tolerance=None if self.tol is None else float(self.tol),
            )
        return self._solution

    # What was learned

    def _array(self, name: str) -> Array:
        if self.method == "cholesky" and name in ("components", "variance", "ratio"):
            raise AttributeError(
                'a Whitener of method="cholesky" has no components: they belong to the pca and zca forms'
            )
        array: Array = getattr(self._solve(), name).numpy()
        return array

    @property
    def mean_(self) -> Array:
        """The mean of each feature, (features,)."""
        check_is_fitted(self)
        array: Array = self._scatter().mean.numpy()
        return array

    @property
    def whitening_(self) -> Array:
        """``W`` of ``y = W (x - mean)``, (outputs, features)."""
        return self._array("whitening")

    @property
    def dewhitening_(self) -> Array:
        """``D`` of ``x = D y + mean``, (features, outputs)."""
        return self._array("dewhitening")

    @property
    def components_(self) -> Array:
        """The eigenvectors kept, as rows, (n_components_, features)."""
        return self._array("components")

    @property
    def explained_variance_(self) -> Array:
        """The variance of the data along each component, (n_components_,); of standardized data in the -cor forms."""
        return self._array("variance")

    @property
    def explained_variance_ratio_(self) -> Array:
        """Its share of the total variance."""
        return self._array("ratio")

    @property
    def n_components_(self) -> int:
        """The number of components kept; for "cholesky" of outputs."""
        solution = self._solve()
        return int((solution.whitening if self.method == "cholesky" else solution.components).shape[0])

    @property
    def rank_(self) -> int:
        """The number of directions with variance; for "cholesky" the number of independent features."""
        return self._solve().rank

    @property
    def shrinkage_(self) -> float:
        """The intensity of the shrinkage, 0 for none."""
        return self._solve().intensity

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """The features' own names, for the pca forms ``whitener0``, ``whitener1``, ..."""
        names: Array = super().get_feature_names_out(input_features)
        if self.method.startswith("pca"):
            return np.asarray([f"whitener{i}" for i in range(self.n_components_)], dtype=object)
        return names[-self.n_components_ :] if self.method == "cholesky" else names

    # Using it

    def _expected(self, inverse: bool) -> dict[str, Any]:
        return {"check_names": not inverse, "num_features": self._solve().whitening.shape[0] if inverse else None}

    def _transform_batch(self, batch: Batch, inverse: bool, copy: bool | None) -> Any:
        refuse_infinite(self, batch)
        with torch.no_grad():
            out = self._map(batch, inverse, copy)
        return give_back(self, batch, out, self._columns(inverse))

    def _columns(self, inverse: bool) -> list[str] | None:
        """Names of the result's columns, None where they are those of the input."""
        if self.method.startswith("zca"):
            return None
        names: Array = super().get_feature_names_out() if inverse else self.get_feature_names_out()
        return list(names)

    def _map(self, batch: Batch, inverse: bool, copy: bool | None) -> Tensor:  # noqa: ARG002 -- always a new tensor
        solution, scatter = self._solve(), self._scatter()
        device = batch.values.device
        mean, low = scatter.mean.to(device), scatter.mean_low.to(device)
        matrix = (solution.dewhitening if inverse else solution.whitening).to(device).T
        shape = list(batch.values.shape)
        shape[batch.axis] = matrix.shape[1]
        out = torch.empty(shape, dtype=batch.float_dtype, device=device)
        for block, values in batch.row_blocks():
            rows = values.movedim(batch.axis, -1).to(torch.float64)
            y = (rows @ matrix + low) + mean if inverse else ((rows - mean) - low) @ matrix
            out[block] = y.movedim(-1, batch.axis)
        return out

    def to_module(self, dtype: torch.dtype = torch.float32, *, inverse: bool = False) -> WhiteningModule:
        solution, scatter = self._solve(), self._scatter()
        return WhiteningModule(
            scatter.mean,
            scatter.mean_low,
            solution.dewhitening if inverse else solution.whitening,
            channel_axis=self.channel_axis,
            inverse=inverse,
            dtype=dtype,
        )

    def _linear_map(self) -> LinearMap:
        solution, scatter = self._solve(), self._scatter()
        spreads = (solution.dewhitening, scatter.std())
        return LinearMap(scatter.mean, scatter.mean_low, solution.whitening, 0.0, scatter.mean, spreads)

    # Saving: the solution too, so that the same file gives the same transform on every machine.

    def _extra_state(self) -> dict[str, Tensor]:
        solution = self._solve()
        numbers = torch.tensor([float(solution.rank), solution.intensity], dtype=torch.float64)
        matrices = {name: getattr(solution, name) for name in _MATRICES}
        return {"solution.numbers": numbers, **{f"solution.{name}": tensor for name, tensor in matrices.items()}}

    def _read_state(self, tensors: dict[str, Tensor]) -> None:
        prefix = "solution."
        solved = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        learned = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        if set(solved) != {"numbers", *_MATRICES}:
            raise InputError(f"a Whitener needs its solution's tensors, got {sorted(solved)}")
        self._stats = (FourthMoments if "fourth" in learned else Scatter).from_dict(learned)
        self._publish()
        rank, intensity = solved.pop("numbers").tolist()
        self._solution = Whitening(**solved, rank=int(rank), intensity=intensity)
