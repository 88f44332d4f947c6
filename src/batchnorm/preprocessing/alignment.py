"""CORAL, correlation alignment: give one domain's data the mean and the covariance of another's.

    y = C_t^(1/2) C_s^(-1/2) (x - mean_s) + mean_t

(B. Sun, J. Feng, K. Saenko, "Return of frustratingly easy domain adaptation", AAAI 2016, algorithm 1: there in rows, on
features that are centred already.)
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from batchnorm._checks import check_not_negative
from batchnorm._errors import BatchnormError, InputError
from batchnorm.moments import Moments, Scatter
from batchnorm.preprocessing.base import Array, Normalizer, samples_seen
from batchnorm.preprocessing.domains import Alignment, Domains, Learned, Roots, learn
from batchnorm.preprocessing.folding import LinearMap
from batchnorm.preprocessing.inputs import Batch, refuse_infinite
from batchnorm.preprocessing.modules import ScalingModule, WhiteningModule
from batchnorm.preprocessing.rollback import unchanged_on_error
from batchnorm.preprocessing.shrinkage import FourthMoments, checked_shrinkage


class CORAL(Normalizer):
    """Align a source domain with a target domain: ``y = A (x - mean_s) + mean_t``, ``A = C_t^(1/2) C_s^(-1/2)``.

    Whiten the source with its own covariance, re-colour it with the target's; roots are symmetric. The result has the
    target's mean and covariance. No labels are needed. ``fit(source, target).transform(source)``, and then train on
    the result for the target; or fit with the *new* domain as source and the one that a model was trained on as target,
    and put the alignment in front of that model. See docs/domain-adaptation.md for both, and for when it fails.

    Parameters
    ----------
    regularization: added to the variance of every direction in both domains, in squared units of the features. The
        paper adds 1, to features that were standardized: for those, ``regularization=1.0`` is the paper's CORAL. The
        default is 0, because only then does the result have the target's covariance, and whatever the features' units.
    shrinkage: draw both covariances towards a multiple of the identity: a float in [0, 1], or "ledoit-wolf" for each
        domain's own optimal intensity; for few samples.
    match_mean: give the result the target's mean too; False keeps the source's, as the paper does (where it is 0).
    tol: relative rank tolerance. A direction with at most ``tol`` times its domain's largest variance is without
        variance: where the source has none the result has none, and nothing is amplified. None is ``10 p eps`` for p
        features.
    channel_axis: 1 aligns the channels of data of shape (N, C, *), every position a sample; None takes (N, features).

    Attributes, float64
    -------------------
    matrix_ (features, features), ``A``; source_mean_, target_mean_ (features,); source_covariance_, target_covariance_
    (features, features), biased (ddof 0), before shrinking and ``regularization``; source_rank_, target_rank_: the
    number of directions with variance; source_shrinkage_, target_shrinkage_: the intensities used; n_samples_seen_ (of
    the source) and n_target_samples_seen_; n_features_in_, feature_names_in_. ``partial_fit`` leaves the decomposition
    until one of them, or ``transform``, is used.

    The result has the target's covariance if the source varies in every direction in which the target does, that is if
    ``source_rank_`` is all features. ``inverse_transform`` is exact if both ranks are; else it projects.

    A sample with a NaN in any feature is left out of ``fit``, and comes out of ``transform`` as NaN. A constant feature
    (see ``StandardScaler``) has variance 0.
    """

    _stats: Domains
    _solution: Alignment | None
    n_samples_seen_: int | float | Array
    n_target_samples_seen_: int | float | Array

    def __init__(
        self,
        *,
        regularization: float = 0.0,
        shrinkage: str | float | None = None,
        match_mean: bool = True,
        tol: float | None = None,
        channel_axis: int | None = None,
    ) -> None:
        self.regularization = regularization
        self.shrinkage = shrinkage
        self.match_mean = match_mean
        self.tol = tol
        self.channel_axis = channel_axis

    # Learning

    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, *, target: Any = None, target_weight: Any = None
    ) -> Self:
        """Forget what was learned before and learn both domains: ``fit(source, target)`` or ``fit(X, target=...)``.

        ``X``: the source, ``target``: the target, each anything that the other estimators' ``fit`` takes, with the same
        features and any number of samples. ``y``: the target, where ``target`` is not given; else ignored, so that a
        pipeline may pass labels. ``sample_weight``, ``target_weight``: (N,), one for each domain.

        Raises InputError (no target, labels in its place, infinite values, bad weights), ShapeError, DtypeError; the
        estimator is then as it was.
        """
        domains = {"source": (X, sample_weight), "target": (_target(y, target), target_weight)}
        if domains["target"][0] is None:
            raise InputError("CORAL needs two domains, got no target: fit(source, target)")
        return self._learn_domains(domains, afresh=True, complete=True)

    def partial_fit(
        self, X: Any = None, y: Any = None, sample_weight: Any = None, *, target: Any = None, target_weight: Any = None
    ) -> Self:
        """Learn from one more batch of either domain or of both: ``partial_fit(source)``, ``partial_fit(target=...)``.

        Any split of the data, in any order, gives what one ``fit`` of the whole gives. Arguments as for ``fit``.
        """
        domains = {"source": (X, sample_weight), "target": (_target(y, target), target_weight)}
        domains = {domain: given for domain, given in domains.items() if given[0] is not None}
        if not domains:
            raise InputError(
                "expected a batch of the source, partial_fit(X), or of the target, partial_fit(target=...)"
            )
        return self._learn_domains(domains, afresh=not self.__sklearn_is_fitted__(), complete=False)

    def _learn_domains(self, domains: dict[str, tuple[Any, Any]], *, afresh: bool, complete: bool) -> Self:
        with unchanged_on_error(self):
            if afresh:
                self._forget()
            known = Domains() if afresh else self._stats
            stats = {"source": known.source, "target": known.target}
            for domain, (X, weight) in domains.items():
                try:
                    stats[domain] = self._learned(X, weight, stats[domain], together=complete)
                except BatchnormError as error:
                    if domain == "source":
                        raise
                    raise type(error)(f"target: {error}") from error
            self._stats = Domains(**stats)
            self._publish()
            if complete:
                self._solve()
        return self

    def _check_learned(self, known: Any, stats: Learned) -> None:  # noqa: ARG002 -- both domains count
        if self.__sklearn_is_fitted__():
            self._check_same_statistics(Domains(source=stats))

    def _statistics(self, batch: Batch, weights: Tensor | None) -> Learned:
        stats = learn(batch.values, batch.axis, weights, fourth=self.shrinkage == "ledoit-wolf")
        self._refuse_unusable(batch, *stats.to_dict().values())
        if self.__sklearn_is_fitted__():
            self._check_same_statistics(Domains(source=stats))
        return stats

    def _check_same_statistics(self, other: Domains) -> None:
        kinds = {type(s) for domains in (self._stats, other) for s in (domains.source, domains.target)} - {type(None)}
        if len(kinds) > 1:
            raise InputError('shrinkage="ledoit-wolf" needs statistics of its own from the first batch on: fit again')

    def _check_mergeable(self, other: Self) -> None:
        super()._check_mergeable(other)
        if self.__sklearn_is_fitted__():
            self._check_same_statistics(other._stats)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        checked_shrinkage(self.shrinkage)
        check_not_negative("regularization", self.regularization)
        check_not_negative("tol", 0 if self.tol is None else self.tol)

    def _publish(self) -> None:
        for name, stats in (("n_samples_seen_", self._stats.source), ("n_target_samples_seen_", self._stats.target)):
            setattr(self, name, 0 if stats is None else samples_seen(stats.count.reshape(1)))
        self._solution = None

    def _solve(self) -> Alignment:
        """The matrices, computed once after learning."""
        check_is_fitted(self)
        if self._solution is None:
            self._check_parameters()
            options: dict[str, Any] = {
                "shrinkage": checked_shrinkage(self.shrinkage),
                "regularization": float(self.regularization),
                "tolerance": None if self.tol is None else float(self.tol),
            }
            source, target = (Roots.of(self._known(domain), **options) for domain in ("source", "target"))
            self._solution = Alignment.of(source, target)
        return self._solution

    def _known(self, domain: str) -> Learned:
        check_is_fitted(self)
        stats: Learned | None = getattr(self._stats, domain)
        if stats is None:
            how = "partial_fit(X)" if domain == "source" else "partial_fit(target=...)"
            raise InputError(f"CORAL needs two domains and has seen no {domain}: {how}")
        if float(stats.count) == 0:
            raise InputError(f"CORAL needs samples without NaN: every sample of the {domain} has a NaN in some feature")
        return stats

    def _scatter(self, domain: str) -> Scatter:
        stats = self._known(domain)
        return stats.base if isinstance(stats, FourthMoments) else stats

    def _moments(self) -> tuple[Moments, Moments]:
        """Those whose mean is taken out, and those whose mean is put in."""
        put_in = "target" if self.match_mean else "source"
        return self._scatter("source").moments(), self._scatter(put_in).moments()

    # What was learned

    @property
    def matrix_(self) -> Array:
        """``A`` of ``y = A (x - mean_s) + mean_t``, (features, features)."""
        return self._solve().matrix.numpy()

    @property
    def source_mean_(self) -> Array:
        """The mean of each feature in the source, (features,)."""
        return self._scatter("source").mean.numpy()

    @property
    def target_mean_(self) -> Array:
        """The mean of each feature in the target, (features,)."""
        return self._scatter("target").mean.numpy()

    @property
    def source_covariance_(self) -> Array:
        """The biased covariance of the source, (features, features)."""
        return self._scatter("source").cov().numpy()

    @property
    def target_covariance_(self) -> Array:
        """The biased covariance of the target, (features, features)."""
        return self._scatter("target").cov().numpy()

    @property
    def source_rank_(self) -> int:
        """The number of directions in which the source varies."""
        return self._solve().ranks[0]

    @property
    def target_rank_(self) -> int:
        """The number of directions in which the target varies."""
        return self._solve().ranks[1]

    @property
    def source_shrinkage_(self) -> float:
        """The intensity of the shrinkage of the source's covariance, 0 for none."""
        return self._solve().intensities[0]

    @property
    def target_shrinkage_(self) -> float:
        """The intensity of the shrinkage of the target's covariance, 0 for none."""
        return self._solve().intensities[1]

    # Using it

    def _transform_batch(self, batch: Batch, inverse: bool, copy: bool | None) -> Any:
        refuse_infinite(self, batch)
        return super()._transform_batch(batch, inverse, copy)

    def _map(self, batch: Batch, inverse: bool, copy: bool | None) -> Tensor:  # noqa: ARG002 -- always a new tensor
        solution, device = self._solve(), batch.values.device
        taken, given = (moments.to(device) for moments in self._moments()[:: -1 if inverse else 1])
        matrix = (solution.inverse if inverse else solution.matrix).to(device).T
        out = torch.empty_like(batch.values, dtype=batch.float_dtype)
        for block, values in batch.row_blocks():
            rows = values.movedim(batch.axis, -1).to(torch.float64)
            y = (((rows - taken.mean) - taken.mean_low) @ matrix + given.mean_low) + given.mean
            out[block] = y.movedim(-1, batch.axis)
        return out

    def to_module(self, dtype: torch.dtype = torch.float32, *, inverse: bool = False) -> nn.Module:
        solution = self._solve()
        taken, given = self._moments()[:: -1 if inverse else 1]
        options: dict[str, Any] = {"channel_axis": self.channel_axis, "dtype": dtype}
        matrix = solution.inverse if inverse else solution.matrix
        return nn.Sequential(
            WhiteningModule(taken.mean, taken.mean_low, matrix, **options),
            ScalingModule(-given.mean, -given.mean_low, torch.ones_like(given.mean), **options),
        )

    def _linear_map(self) -> LinearMap:
        taken, given = self._moments()
        spreads = (Roots.of(self._known("source")).power(0.5), taken.std())
        return LinearMap(taken.mean, taken.mean_low, self._solve().matrix, given.mean, taken.mean, spreads)

    # Saving: the solution too, so that the same file gives the same transform on every machine.

    def _extra_state(self) -> dict[str, Tensor]:
        if self._stats.source is None or self._stats.target is None:
            return {}
        solution = self._solve()
        numbers = torch.tensor([*solution.ranks, *solution.intensities], dtype=torch.float64)
        return {"solution.numbers": numbers, "solution.matrix": solution.matrix, "solution.inverse": solution.inverse}

    def _read_state(self, tensors: dict[str, Tensor]) -> None:
        prefix = "solution."
        solved = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self._stats = Domains.from_dict({name: t for name, t in tensors.items() if not name.startswith(prefix)})
        self._publish()
        if solved:
            a, b, c, d = solved["numbers"].tolist()
            self._solution = Alignment(solved["matrix"], solved["inverse"], (int(a), int(b)), (c, d))


def _target(y: Any, target: Any) -> Any:
    """The target's data, which come as ``target`` or in the place of ``y``. Raises InputError for labels there."""
    if target is not None or y is None:
        return target
    shape = getattr(y, "shape", None)
    if isinstance(y, (list, tuple)) and y and np.isscalar(y[0]):
        shape = (len(y),)
    if shape is not None and len(shape) < 2:
        raise InputError(
            "expected the target's data, (n, features), as second argument, got one value a sample, which looks like "
            "labels: CORAL needs none, pass the data as target=..."
        )
    return y
