"""What all estimators share: learning that can go on, be merged and fail without harm; transforming; saving."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from os import PathLike
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from batchnorm._errors import BatchnormError, DtypeError, InputError, ShapeError
from batchnorm.moments import Moments
from batchnorm.preprocessing.batch import NothingToLearnError
from batchnorm.preprocessing.distributed.estimator import Distributed
from batchnorm.preprocessing.distributed.ray_data import is_spread
from batchnorm.preprocessing.distributed.ray_transform import transform_dataset
from batchnorm.preprocessing.front import FrontOfNetwork
from batchnorm.preprocessing.inputs import Batch, check_names, give_back, read, read_weights, refuse_infinite
from batchnorm.preprocessing.output import StreamedOutput, framed
from batchnorm.preprocessing.rollback import unchanged_on_error
from batchnorm.preprocessing.sources import Part, Source, is_paths, is_stream, open_source

Array = NDArray[Any]


class Statistics(Protocol):
    """What a batch teaches: merges, and can be written down."""

    @property
    def num_features(self) -> int: ...
    def merge(self, other: Any) -> Any: ...
    def to_dict(self) -> dict[str, Tensor]: ...


# ruff: noqa: ARG002 -- scikit-learn's signature: fit takes a y that transformers ignore
class Normalizer(StreamedOutput, Distributed, FrontOfNetwork, OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Base of the estimators. All that is learned is one immutable statistics object, replaced as a whole.

    A subclass says what it learns (``_statistics``), which attributes show it (``_publish``), and how it transforms.
    """

    channel_axis: int | None
    _stats: Any
    n_features_in_: int
    feature_names_in_: Array

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Forget what was learned before and learn from ``X``.

        ``X``: (N, features), or (N, C, *) with ``channel_axis``; NumPy, torch, pandas, polars, pyarrow or nested lists,
        and sparse matrices (SciPy's, torch's CSR and CSC) where zeros stay zeros, see ``StandardScaler``. Or a
        stream of such batches: a path, a DataLoader, any iterable, a ``Source`` (see ``open_source``); a stream and a
        memory map are read once, a part at a time. Or a Ray Dataset, see ``ray_dataset``. NaN is missing and left out.
        ``y`` is ignored. ``sample_weight``: (N,), not negative; an integer weight is the same as so many repetitions,
        zero as absence. Where torch.distributed runs, every rank passes its shard and learns of all, see ``local``.

        Raises InputError (infinite values, bad weights), ShapeError, DtypeError, SynchronizationError (ranks that
        disagree, fail or do not come); the estimator is then as it was.
        """
        return self._learn(X, sample_weight, afresh=True, complete=True)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Learn from one more batch. Any split of the data gives what one ``fit`` of the whole gives. See ``fit``."""
        return self._learn(X, sample_weight, afresh=not self.__sklearn_is_fitted__(), complete=False)

    def merge(self, other: Self) -> Self:
        """Learn what ``other`` has learned, as if its data had been passed here; ``other`` stays as it was.

        An estimator that is not fitted takes the statistics over. Raises DtypeError for another class, ShapeError for
        another width, InputError for other feature names, NotFittedError where ``other`` has learned nothing.
        """
        if type(other) is not type(self):
            raise DtypeError(f"expected another {type(self).__name__} to merge, got {type(other).__name__}")
        check_is_fitted(other)
        with unchanged_on_error(self):
            self._check_parameters()
            self._check_mergeable(other)
            if self.__sklearn_is_fitted__():
                self._stats = self._stats.merge(other._stats)
            else:
                self._stats = other._stats
                self.n_features_in_ = other.n_features_in_
                if hasattr(other, "feature_names_in_"):
                    self.feature_names_in_ = other.feature_names_in_.copy()
            self._publish()
        return self

    def transform(self, X: Any) -> Any:
        """Normalize ``X`` with what was learned; the result is of the kind, dtype and shape of ``X``. NaN stays NaN.

        Of a stream (see ``fit``) it is an iterator of transformed batches. Gradients don't flow through this, see
        ``to_module``. Missing values of frames come back as NaN. Raises InputError (infinite values, a result that
        overflows float16), ShapeError, DtypeError, scikit-learn's NotFittedError.
        """
        return self._transform(X, inverse=False, copy=None)

    def inverse_transform(self, X: Any) -> Any:
        """Undo ``transform``: back to the data's own units."""
        return self._transform(X, inverse=True, copy=None)

    def save(self, path: str | PathLike[str]) -> None:
        """Write what was learned to ``path``, from which ``load`` makes the estimator again (safetensors, no pickle).

        The file appears whole or not at all. Raises OutputError where it cannot be written.
        """
        from batchnorm.preprocessing.saving import save

        check_is_fitted(self)
        save(self, path)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_stats")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.three_d_array = self.channel_axis is not None
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags

    # What a subclass provides

    def _check_parameters(self) -> None:
        """Raise an InputError where a parameter makes no sense."""
        if self.channel_axis is not None and (
            isinstance(self.channel_axis, bool)
            or not isinstance(self.channel_axis, (int, np.integer))
            or self.channel_axis == 0
        ):
            raise InputError(
                f"channel_axis must be None or the axis of the channels (1 for (N, C, *)), got {self.channel_axis!r}"
            )

    def _sparse_refusal(self) -> str | None:
        """Why sparse data cannot be taken, and what takes them; None where they can."""
        return f"{type(self).__name__} would fill in its zeros: use StandardScaler(with_mean=False), which keeps them"

    def _check_mergeable(self, other: Self) -> None:
        """Raise where the statistics of ``other`` mean something else."""
        if not self.__sklearn_is_fitted__():
            return
        if other.n_features_in_ != self.n_features_in_:
            raise ShapeError(
                f"cannot merge {type(self).__name__}s of different width: "
                f"{other.n_features_in_} features into {self.n_features_in_}"
            )
        mine, theirs = (getattr(estimator, "feature_names_in_", None) for estimator in (self, other))
        if mine is not None and theirs is not None and list(mine) != list(theirs):
            differing = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
            raise InputError(
                f"cannot merge: the features have other names, {differing[1]!r} instead of {differing[0]!r}"
            )

    def _statistics(self, batch: Batch, weights: Tensor | None) -> Statistics:
        raise NotImplementedError

    def _accumulate(self, stats: Any, batch: Batch, weights: Tensor | None) -> Any:
        """What ``stats`` (None for nothing) and the batch teach together; ``stats`` itself stays as it was."""
        learned = self._statistics(batch, weights)
        return learned if stats is None else stats.merge(learned)

    def _accumulate_part(self, stats: Any, batch: Batch, weights: Tensor | None) -> Any:
        """The same for a part of a stream, which nobody sees before the end: it may be done in place."""
        return self._accumulate(stats, batch, weights)

    def _publish(self) -> None:
        """Set the learned attributes from ``_stats``."""
        raise NotImplementedError

    def _complete(self) -> None:
        """What ``fit`` does after ``_publish`` and ``partial_fit``, of which more may come, leaves until later."""
        warn_of_empty(self)

    def _seen(self) -> Tensor:
        """Which features have had a value."""
        raise NotImplementedError

    def _map(self, batch: Batch, inverse: bool, copy: bool | None) -> Tensor:
        """The transform; ``copy=False`` may write into the batch, None leaves that to the parameter.

        Raises InputError for infinite values, before anything is written.
        """
        raise NotImplementedError

    def _extra_state(self) -> dict[str, Tensor]:
        """Tensors to save besides the statistics."""
        return {}

    def _read_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved tensors and publish them; raise InputError where they don't fit."""
        raise NotImplementedError

    # The steps in common

    def _learn(self, X: Any, sample_weight: Any, *, afresh: bool, complete: bool) -> Self:
        with unchanged_on_error(self):
            if afresh:
                self._forget()
            self._stats = self._learned(X, sample_weight, None if afresh else self._stats, together=complete)
            self._publish()
            if complete:
                self._complete()
        return self

    def _forget(self) -> None:
        for name in [name for name in vars(self) if name.endswith("_") or name == "_stats"]:
            delattr(self, name)

    def _learned_here(self, X: Any, sample_weight: Any, stats: Any) -> Any:
        if self._is_stream(X) or isinstance(X, np.memmap):
            return self._learn_parts(open_source(X), sample_weight, stats)
        batch = read(self, X, reset=self._is_new())
        return self._accumulate(stats, batch, read_weights(sample_weight, batch))

    def _is_new(self) -> bool:
        """Whether the features are still to be learned."""
        return not hasattr(self, "n_features_in_")

    def _is_stream(self, X: Any) -> bool:
        # A list of arrays of two or more dimensions is one array of samples where samples have such shapes.
        one_array = self.channel_axis is not None and isinstance(X, (list, tuple)) and not is_paths(X)
        return is_stream(X) and not one_array

    def _learn_parts(self, source: Source, sample_weight: Any, stats: Any) -> Any:
        """What ``stats`` (None for nothing) and the parts of ``source`` teach together."""
        weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64).reshape(-1)
        row, weighed = 0, False
        for part in source:
            rows = part.rows
            if rows == 0:
                continue
            if weights is not None and len(weights) < row + rows:
                raise ShapeError(f"sample_weight must have one weight a sample, got {len(weights)} for more samples")
            with located(part):
                batch = self._read_part(source, part, reset=self._is_new())
                own = part.weights if weights is None else weights[row : row + rows]
                w = read_weights(own, batch, zeros=True)
                stats = self._accumulate_part(stats, batch, w)
            row += rows
            weighed |= w is None or bool((w > 0).any())
        if row == 0:
            raise NothingToLearnError(
                f"Found no samples in {source.label}: 0 sample(s) while a minimum of 1 is required."
            )
        if weights is not None and len(weights) != row:
            raise ShapeError(f"sample_weight must have one weight a sample, got {len(weights)} for {row} samples")
        if not weighed:
            raise NothingToLearnError("sample weights must contain at least one non-zero number: all are zero")
        return stats

    def _read_part(self, source: Source, part: Part, *, reset: bool, **options: Any) -> Batch:
        if source.names is None or not options.get("check_names", True):
            return read(self, part.values, reset=reset, first_row=part.row, **options)
        # The source has the names, its arrays have none.
        batch = read(self, part.values, reset=reset, first_row=part.row, **{**options, "check_names": False})
        check_names(self, source.names, reset=reset)
        return batch

    def _transform(self, X: Any, *, inverse: bool, copy: bool | None) -> Any:
        check_is_fitted(self)
        if is_spread(X):
            return transform_dataset(self, X, inverse)
        if self._is_stream(X):
            return self._transform_parts(open_source(X), inverse)
        return self._transform_batch(read(self, X, reset=False, **self._expected(inverse)), inverse, copy)

    def _transform_parts(self, source: Source, inverse: bool) -> Iterator[Any]:
        for part in source:
            if part.rows == 0:
                continue
            with located(part):
                batch = self._read_part(source, part, reset=False, **self._expected(inverse))
                out = self._transform_batch(batch, inverse, None)
            yield out if inverse else framed(self, out, part.values)

    def _expected(self, inverse: bool) -> dict[str, Any]:
        """How ``read`` is to check what is to be transformed."""
        return {"check_names": not inverse}

    def _transform_batch(self, batch: Batch, inverse: bool, copy: bool | None) -> Any:
        with torch.no_grad():
            out = self._map(batch, inverse, copy)
        return give_back(self, batch, out)

    def _refuse_unusable(self, batch: Batch, *statistics: Tensor) -> None:
        """Statistics that skip NaN are only not finite where a value was not, or where its square overflowed."""
        if not all(bool(torch.isfinite(s).all()) for s in statistics):
            refuse_infinite(self, batch)
            raise InputError(
                "Input X holds values too large: their range or their squares overflow float64; rescale the data"
            )


@contextlib.contextmanager
def located(part: Part) -> Iterator[None]:
    """Name the file in an error that its part of the data causes."""
    try:
        yield
    except BatchnormError as error:
        if part.file is None:
            raise
        raise type(error)(f"{part.file}: {error}") from error


def samples_seen(count: Tensor) -> int | float | Array:
    """scikit-learn's ``n_samples_seen_``: one number where all agree, integers unless weights are fractions."""
    counts: Array = count.cpu().numpy()
    if bool((counts == np.round(counts)).all()):
        counts = counts.astype(np.int64)
    return counts[0].item() if bool((counts == counts[0]).all()) else counts


def warn_of_empty(estimator: Normalizer) -> None:
    """Warn of features without a single value: their statistics are NaN, as in scikit-learn."""
    empty = (~estimator._seen()).nonzero().flatten().tolist()
    if empty:
        names = getattr(estimator, "feature_names_in_", None)
        which = ", ".join(str(i) if names is None else repr(str(names[i])) for i in empty)
        warnings.warn(
            f"{type(estimator).__name__} saw only NaN in feature {which}: its statistics are NaN",
            RuntimeWarning,
            stacklevel=5,
        )


# Within one block of this many rows rounding errors may add up; between blocks they don't, the mean having two parts.
_ERROR_ROWS = 2**14


def is_constant(moments: Moments) -> Tensor:
    """Which features cannot be told from constant ones: ``std <= n eps |mean|``, (C,).

    The bound of the rounding error of the two-pass algorithm (Chan, Golub, LeVeque, "Algorithms for computing the
    sample variance", 1983), the one that scikit-learn's StandardScaler uses, but with ``n`` no more than 2^14: longer
    data are summed in blocks, and their error does not grow further. ``eps`` is that of float64.
    """
    rows = moments.count.clamp(max=_ERROR_ROWS)
    return moments.std() <= rows * torch.finfo(torch.float64).eps * moments.mean.abs()
