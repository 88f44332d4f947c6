"""What the estimators can do beyond one process, as methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from sklearn.utils.validation import check_is_fitted
from torch import distributed

from batchnorm._errors import InputError
from batchnorm.preprocessing.batch import NothingToLearnError
from batchnorm.preprocessing.distributed import ranks, ray_data
from batchnorm.preprocessing.rollback import unchanged_on_error


class Distributed:
    """Base of the estimators for what takes more than one process; ``fit`` itself is in ``base``."""

    _stats: Any

    def reduce(self, group: Any = None) -> Self:
        """Learn what this estimator has learned on all ranks of ``group``: ``partial_fit`` on each, then this, once.

        ``group``: a torch.distributed process group, None for all ranks. Every rank of it must call this; all end with
        the same bits. A rank that has learned nothing takes what the others have. In a group of one, and where
        torch.distributed does not run, nothing changes. Whoever goes on with ``partial_fit`` on every rank and reduces
        again counts what they have in common once a rank.

        Raises SynchronizationError where the ranks disagree, one has failed or does not come, on all of them;
        NotFittedError where none has learned anything. The estimator is then as it was.
        """
        if not distributed.is_available() or not distributed.is_initialized():
            check_is_fitted(self)
            return self
        try:
            with unchanged_on_error(self):
                self._refuse_randomized("learn on several processes")
                self._stats = ranks.learn_together(self, self._own_statistics, group)
                self._publish()
        except NothingToLearnError:
            check_is_fitted(self)
            raise
        return self

    def _learned(self, X: Any, sample_weight: Any, known: Any, *, together: bool) -> Any:
        """What ``known`` (None for nothing) and ``X`` teach together: read here, on a cluster, or on all ranks."""

        together = together and ranks.active()

        def learn() -> Any:
            self._check_parameters()
            spread = ray_data.is_spread(X)
            if together or spread:
                self._refuse_randomized("learn on several processes")
            if not spread:
                return self._learned_here(X, sample_weight, known)
            if sample_weight is not None:
                raise InputError(
                    "expected the weights of a Ray Dataset as one of its columns, got sample_weight: "
                    'pass ray_dataset(dataset, weights="name of the column")'
                )
            return ray_data.learn(self, ray_data.as_spread(X), known)

        return ranks.learn_together(self, learn) if together else learn()

    def _learned_here(self, X: Any, sample_weight: Any, stats: Any) -> Any:
        """What ``stats`` (None for nothing) and ``X`` teach together, read by this process."""
        raise NotImplementedError

    def _check_learned(self, known: Any, stats: Any) -> None:
        """Raise an InputError where ``stats`` cannot be merged into what is ``known`` (None for nothing)."""

    def _refuse_randomized(self, what: str) -> None:
        """Raise an InputError where all data are needed at once, in one process."""

    def _check_parameters(self) -> None:
        raise NotImplementedError

    def _own_statistics(self) -> Any:
        if not hasattr(self, "_stats"):
            raise NothingToLearnError(f"this {type(self).__name__} has learned nothing yet: call partial_fit first")
        return self._stats

    def _publish(self) -> None:
        raise NotImplementedError

    def to_ray_preprocessor(
        self,
        columns: Sequence[str] | str | None = None,
        output_columns: Sequence[str] | str | None = None,
        *,
        weights: str | None = None,
    ) -> Any:
        """This estimator as a ``ray.data.preprocessor.Preprocessor``, fitted if this one is, of a copy of it.

        ``columns``: the features, see :func:`ray_dataset`. ``output_columns``: names for the results, which then stand
        beside the features; None puts them in their place. ``weights``: the column of the weights in ``fit``. The
        preprocessor has ``fit``, ``transform``, ``fit_transform`` and ``transform_batch`` (of NumPy, pandas, pyarrow),
        goes into ``ray.data.preprocessors.Chain``, and serializes.

        Raises MissingDependencyError without ray.
        """
        ray_data.need_ray()
        from batchnorm.preprocessing.distributed.ray_preprocessor import EstimatorPreprocessor

        return EstimatorPreprocessor(self, columns, output_columns, weights)
