"""Decorrelate: features with unit variance and no correlation."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.preprocessing.base import Array, Normalizer, samples_seen
from batchnorm.preprocessing.decomposition import Wish, solve, standardization
from batchnorm.preprocessing.factors import Whitening, apply, read_whitening
from batchnorm.preprocessing.folding import LinearMap
from batchnorm.preprocessing.inputs import Batch, give_back, refuse_infinite
from batchnorm.preprocessing.modules import WhiteningModule
from batchnorm.preprocessing.randomized import Sketch, Visit, visit_rows
from batchnorm.preprocessing.secondmoments import Growth, SecondMoments
from batchnorm.preprocessing.sources import Source


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
        identity: a float in [0, 1], or "ledoit-wolf" for the optimal one, exact from batches too (in the -cor forms at
        three times the cost of fitting). Every direction then has variance, as long as any has.
    eps: added to the variance of every direction kept, in units of the decomposed matrix.
    tol: relative rank tolerance. A direction with at most ``tol`` times the largest variance (in the cholesky form: a
        feature of whose variance at most the share ``tol`` is not explained by those behind it) is without variance:
        dropped in the pca forms, left at 0 in the others, never amplified. None is ``10 p eps`` for p features.
    channel_axis: 1 whitens the channels of data of shape (N, C, *), every position a sample; None takes (N, features).
    solver: where the directions come from, for p features, n samples and k components:
        "eigh": the p x p covariance, exact; O(n p^2 + p^3) time, 3 p^2 numbers of memory (with Ledoit-Wolf in the -cor
        forms 5).
        "gram": the n x n products between samples, exact but for directions of less than ``10 n eps`` of the largest
        variance, which count as without; O(n^2 p + n^3) time, and the samples are kept. Not for "cholesky".
        "auto": "gram" as long as fewer samples than features have been seen, then "eigh", into which it turns without
        loss; "eigh" also where the result is p x p anyway ("cholesky"; a pca form of all components with shrinkage).
        "randomized": subspace iteration from a random start (Halko, Martinsson, Tropp 2011), for a whole
        ``n_components`` much below n and p; O(n p k) time for each of 6 to 9 passes over the data, p k numbers of
        memory. The leading variances are as exact as the spectrum falls; nothing is known of directions beyond, and
        ``rank_`` is at most k. ``fit`` alone, from data that can be read again; without Ledoit-Wolf and "cholesky".
        Where memory would not do, ``fit`` says so beforehand.
    random_state: the start of "randomized": an int, with which two fits are the same, or as in scikit-learn.

    Attributes
    ----------
    In float64: whitening_ (outputs, features), dewhitening_ (features, outputs), mean_ (features,); not for "cholesky":
    components_ (n_components_, features), the eigenvectors as rows, by falling variance, each with the sign that makes
    the first of its largest entries positive; explained_variance_ (the data's, before shrinking and ``eps``) and
    explained_variance_ratio_. rank_, shrinkage_ (the intensity used), n_samples_seen_, n_features_in_,
    feature_names_in_. ``partial_fit`` leaves the decomposition until one of them, or ``transform``, is used.

    A sample with a NaN in any feature is left out of ``fit``, so that the covariance stays positive semidefinite, and
    comes out of ``transform`` as NaN. A constant feature (see ``StandardScaler``) has variance 0. Fewer samples than
    features are fine: at most N - 1 directions have variance.

    As long as fewer samples than features have been seen, what was learned holds these samples, and so does a file that
    ``save`` writes; with solver="eigh" or "randomized" never.

    Unlike ``sklearn.decomposition.PCA(whiten=True)`` the variances are biased (1/N), as in the scalers.
    """

    _stats: SecondMoments | Sketch
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
        solver: str = "auto",
        random_state: Any = 0,
    ) -> None:
        self.method = method
        self.n_components = n_components
        self.shrinkage = shrinkage
        self.eps = eps
        self.tol = tol
        self.channel_axis = channel_axis
        self.solver = solver
        self.random_state = random_state

    # Learning

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Learn from one more batch. Any split of the data gives what one ``fit`` of the whole gives. See ``fit``.

        Raises InputError with solver="randomized", which needs all data at once.
        """
        self._refuse_randomized("learn from batch after batch")
        return super().partial_fit(X, y, sample_weight)

    def _refuse_randomized(self, what: str) -> None:
        if self.solver == "randomized":
            raise InputError(f"solver='randomized' cannot {what}: fit all data at once, or use solver='auto'")

    def _check_parameters(self) -> None:
        super()._check_parameters()
        Wish.of(self)

    def _check_mergeable(self, other: Self) -> None:
        if other.method != self.method:
            raise InputError(f"cannot merge a Whitener of method={other.method!r} into one of method={self.method!r}")
        self._refuse_randomized("be merged")
        other._refuse_randomized("be merged")
        super()._check_mergeable(other)
        if self.__sklearn_is_fitted__():
            self._check_learned(self._stats, other._stats)

    @staticmethod
    def _check_learned(known: SecondMoments | Sketch | None, stats: SecondMoments | Sketch) -> None:
        if isinstance(known, Sketch) or isinstance(stats, Sketch):
            raise InputError("what solver='randomized' has learned cannot be added to: fit again")
        if known is not None and (known.fourth is None) != (stats.fourth is None):
            raise InputError('shrinkage="ledoit-wolf" needs statistics of its own from the first batch on: fit again')

    def _statistics(self, batch: Batch, weights: Tensor | None) -> SecondMoments | Sketch:
        wanted: Any = self.n_components
        width = batch.num_channels
        if isinstance(wanted, Integral) and int(wanted) > width:
            raise InputError(f"n_components={wanted} is more than the data's n_features = {width}: ask for fewer")
        stats: SecondMoments | Sketch
        if self.solver == "randomized":
            stats = Sketch.from_batch(batch.values, channel_axis=batch.axis, weights=weights)
        else:
            stats = SecondMoments.from_batch(
                batch.values,
                channel_axis=batch.axis,
                weights=weights,
                fourth=self._fourth(),
                keep={"auto": width, "eigh": 0, "gram": None}[self.solver],
            )
        self._refuse_unusable(batch, *stats.to_dict().values())
        return stats

    def _fourth(self) -> str | None:
        """Which fourth moments Ledoit-Wolf needs."""
        if self.shrinkage != "ledoit-wolf":
            return None
        return "pairs" if self.method.endswith("-cor") else "norms"

    def _accumulate(self, stats: Any, batch: Batch, weights: Tensor | None) -> Any:
        if callable(stats):  # one of the further passes over a source
            visit_rows(batch.values, batch.axis, weights, stats)
            return stats
        learned = self._statistics(batch, weights)
        if stats is None:
            return learned
        if self.solver != "randomized":
            self._check_learned(stats, learned)
        return stats.merge(learned)

    def _accumulate_part(self, stats: Any, batch: Batch, weights: Tensor | None) -> Any:
        if isinstance(stats, Growth):
            if stats.add(batch.values, batch.axis, weights):
                moments = stats.moments
                self._refuse_unusable(batch, moments.mean, moments.m2)
            else:
                refuse_infinite(self, batch)
            return stats
        learned = self._accumulate(stats, batch, weights)
        if not Growth.possible(learned):
            return learned
        return Growth(learned, owned=stats is None or stats.products is not learned.products)

    def _learn_parts(self, source: Source, sample_weight: Any, stats: Any) -> Any:
        if self.solver != "randomized":
            learned = super()._learn_parts(source, sample_weight, stats)
            return learned.result() if isinstance(learned, Growth) else learned
        if not source.again:
            raise InputError(f"solver='randomized' reads data several times, and {source.label} can be read only once")

        def visit(function: Visit) -> None:
            super(Whitener, self)._learn_parts(source, sample_weight, function)

        return replace(super()._learn_parts(source, sample_weight, None), visit=visit)

    def _publish(self) -> None:
        if isinstance(self._stats, Sketch) and self._stats.visit is not None:
            wanted: Any = self.n_components
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            _, factor = standardization(self._stats.moments, self.method)
            self._stats = self._stats.solved(factor, int(wanted), seed)
        self.n_samples_seen_ = samples_seen(self._stats.count.reshape(1))
        self._solution = None

    def _complete(self) -> None:
        self._solve()

    def _solve(self) -> Whitening:
        """The matrices, computed once after learning."""
        check_is_fitted(self)
        if self._solution is None:
            self._solution = solve(self._stats, Wish.of(self))
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
        array: Array = self._stats.moments.mean.numpy()
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
        return solution.num_outputs if self.method == "cholesky" else solution.components.shape[0]

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
        return {"check_names": not inverse, "num_features": self._solve().num_outputs if inverse else None}

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
        moments = self._stats.moments
        return apply(
            self._solve(), batch.values, batch.axis, moments.mean, moments.mean_low, batch.float_dtype, inverse
        )

    def to_module(self, dtype: torch.dtype = torch.float32, *, inverse: bool = False) -> WhiteningModule:
        solution, moments = self._solve(), self._stats.moments
        return WhiteningModule(
            moments.mean,
            moments.mean_low,
            solution.dewhitening if inverse else solution.whitening,
            channel_axis=self.channel_axis,
            inverse=inverse,
            dtype=dtype,
        )

    def _linear_map(self) -> LinearMap:
        solution, moments = self._solve(), self._stats.moments
        spreads = (solution.dewhitening, moments.std())
        return LinearMap(moments.mean, moments.mean_low, solution.whitening, 0.0, moments.mean, spreads)

    # Saving: the solution too, so that the same file gives the same transform on every machine.

    def _extra_state(self) -> dict[str, Tensor]:
        return {f"solution.{name}": tensor for name, tensor in self._solve().to_dict().items()}

    def _read_state(self, tensors: dict[str, Tensor]) -> None:
        prefix = "solution."
        solution = read_whitening({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        learned = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        if "randomized" in learned:
            self._stats = Sketch.from_dict(learned)
        else:
            keep = {"auto": self.n_features_in_, "eigh": 0, "gram": None}.get(self.solver, 0)
            self._stats = SecondMoments.from_dict(learned, fourth=self._fourth(), keep=keep)
        self._publish()
        self._solution = solution
