"""Ray Datasets: statistics block by block where the blocks are, merged in a tree; transforms that stay lazy.

``fit`` is one ``map_batches`` that turns each block into what an estimator learns from it, and tasks that merge eight
of these (two where they are large) as soon as they are there. No data and no statistics but the last come to the
driver. Everything is a task without state of its own, which Ray runs again where a worker dies: nothing is lost, and
nothing counted twice.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sklearn.base import clone

from batchnorm._errors import BatchnormError, DtypeError, InputError, MissingDependencyError, ShapeError
from batchnorm.preprocessing.batch import NothingToLearnError
from batchnorm.preprocessing.distributed.tables import read_features
from batchnorm.preprocessing.inputs import check_names, read, read_weights
from batchnorm.preprocessing.sources import Part, Source, is_ray
from batchnorm.preprocessing.sources.columns import Choice

_FAN_IN = 8
_LARGE = 2**22  # bytes of statistics, from which on merges take two at a time: fewer are kept waiting
_IN_FLIGHT = 16  # merges that may be under way before more blocks are asked for


def need_ray() -> Any:
    """The module ``ray.data``. Raises MissingDependencyError."""
    try:
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("datasets of a cluster need ray: pip install 'batchnorm[ray]'") from error
    return ray.data


class RayDataset(Source):
    """A Ray Dataset (or DataIterator, as ``ray.train.get_dataset_shard`` gives it) with its features and weights.

    Estimators fit and transform a Dataset on the cluster. As a :class:`Source`, and for a DataIterator, it is read in
    this process, batch by batch.
    """

    def __init__(self, dataset: Any, choice: Choice) -> None:
        self.dataset = dataset
        self.weights = choice.weights
        self.batch_rows = choice.batch_rows
        self.chosen = None if choice.columns is None else list(choice.columns)
        self.label = f"the {type(dataset).__name__}"
        self.names = None

    @property
    def spread(self) -> bool:
        """Whether the data are the cluster's, and not those of this process."""
        return hasattr(self.dataset, "map_batches")

    @property
    def known(self) -> list[str] | None:
        """The names of all columns, None where some of the data would have to be computed for that."""
        names = self.dataset.columns(fetch_if_missing=False) if self.spread else None
        return None if names is None else list(names)

    @property
    def columns(self) -> list[str] | None:
        """The columns of the features, None where they are not :attr:`known`."""
        if self.chosen is not None or self.known is None:
            return self.chosen
        return [name for name in self.known if name != self.weights]

    def parts(self) -> Iterator[Part]:
        """The batches, one by one, in this process."""
        row = 0
        for table in self.dataset.iter_batches(batch_size=self.batch_rows, batch_format="pyarrow"):
            if not table.num_rows:
                continue
            features = read_features(table, self.columns, self.weights)
            if row == 0:
                self.names = features.names
            elif features.names != self.names:
                raise InputError(_other_columns(self.names, features.names))
            yield Part(features.values, features.weights, row=row)
            row += table.num_rows


def ray_dataset(dataset: Any, columns: Sequence[str] | str | None = None, weights: str | None = None) -> RayDataset:
    """Say which columns of a Ray Dataset are features and which holds the samples' weights; for fit and transform.

    ``columns``: numbers, each a feature; or the one that holds arrays, (features,) or with ``channel_axis`` (C, *).
    None takes all but the weights. ``weights``: a column of numbers, not negative.

    Raises DtypeError for anything but a Dataset or DataIterator, InputError for a choice that makes no sense.
    """
    if not is_ray(dataset):
        raise DtypeError(f"expected a Ray Dataset, got a {type(dataset).__name__}")
    return RayDataset(dataset, Choice.of(columns, weights, None))


def is_spread(X: Any) -> bool:
    """Whether ``X`` is a Ray Dataset, chosen columns or not, whose blocks are the cluster's."""
    return X.spread if isinstance(X, RayDataset) else is_ray(X) and hasattr(X, "map_batches")


def as_spread(X: Any) -> RayDataset:
    """A Ray Dataset with its choice of columns."""
    return X if isinstance(X, RayDataset) else RayDataset(X, Choice())


# --- learning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partial:
    """What some blocks teach: ``stats`` and the features they are of, or the first error among them."""

    stats: Any = None
    features: int = 0
    names: list[str] | None = None
    rows: int = 0
    error: BatchnormError | None = None

    def merge(self, other: Partial) -> Partial:
        """What both teach together."""
        if self.error is not None or (other.rows == 0 and other.error is None):
            return self
        if other.error is not None or self.rows == 0:
            return other
        if (self.features, self.names) != (other.features, other.names):
            mine, theirs = self.names or f"{self.features} features", other.names or f"{other.features} features"
            return replace(self, stats=None, error=InputError(_other_columns(mine, theirs)))
        rows = self.rows + other.rows
        if self.stats is None or other.stats is None:
            return replace(self if other.stats is None else other, rows=rows)
        return replace(self, stats=self.stats.merge(other.stats), rows=rows)


def _other_columns(mine: Any, theirs: Any) -> str:
    return f"expected the same columns in all blocks, got {theirs} after {mine}: choose with columns=[...]"


def learn(estimator: Any, data: RayDataset, known: Any) -> Any:
    """What ``known`` (None for nothing) and the blocks of ``data`` teach together; width and names go to ``estimator``.

    Raises the errors of ``fit``, and Ray's own where a task of the dataset itself fails.
    """
    block = functools.partial(_learn_block, clone(estimator), data.columns, data.weights)
    partials = data.dataset.map_batches(block, batch_size=None, batch_format="pyarrow")
    whole = _reduce(partials.iter_internal_ref_bundles())
    if whole.error is not None:
        raise whole.error
    if whole.rows == 0:
        raise NothingToLearnError(f"Found no samples in {data.label}: 0 sample(s) while a minimum of 1 is required.")
    if whole.stats is None:
        raise NothingToLearnError("sample weights must contain at least one non-zero number: all are zero")
    first = not hasattr(estimator, "n_features_in_")
    if first:
        estimator.n_features_in_ = whole.features
    elif whole.features != estimator.n_features_in_:
        raise ShapeError(
            f"X has {whole.features} features, but {type(estimator).__name__} is expecting {estimator.n_features_in_} "
            "features as input"
        )
    if whole.names is not None:
        check_names(estimator, whole.names, reset=first)
    estimator._check_learned(known, whole.stats)
    return whole.stats if known is None else known.merge(whole.stats)


def _learn_block(estimator: Any, columns: list[str] | None, weights: str | None, table: Any) -> Any:
    """One row: what ``table`` teaches, pickled."""
    import pyarrow as pa

    try:
        partial = _learned(estimator, columns, weights, table)
    except BatchnormError as error:
        # As a value: raised, Ray would print it at length, and wrap it in an error of its own.
        partial = Partial(rows=table.num_rows, error=type(error)(f"in a block of {table.num_rows} rows: {error}"))
    return pa.table({"partial": pa.array([pickle.dumps(partial)], type=pa.large_binary())})


def _learned(estimator: Any, columns: list[str] | None, weights: str | None, table: Any) -> Partial:
    if table.num_rows == 0:
        return Partial()
    features = read_features(table, columns, weights)
    learner = clone(estimator)
    batch = read(learner, features.values, reset=True)
    if features.names is not None:
        check_names(learner, features.names, reset=True)
    sample_weight = read_weights(features.weights, batch, zeros=True)
    counted = sample_weight is None or bool((sample_weight > 0).any())
    stats = learner._accumulate(None, batch, sample_weight) if counted else None
    return Partial(stats, batch.num_channels, features.names, table.num_rows)


def _merged(*blocks: Any) -> tuple[Partial, BatchnormError | None]:
    """What blocks of pickled partials, or partials, teach together; and the error, small enough to look at early."""
    whole = Partial()
    for block in blocks:
        rows = [block] if isinstance(block, Partial) else map(_unpickled, _column(block))
        for partial in rows:
            whole = whole.merge(partial)
    return whole, whole.error


def _column(block: Any) -> Iterator[Any]:
    from ray.data.block import BlockAccessor

    table = BlockAccessor.for_block(block).to_arrow()
    return iter(table.column("partial")) if table.num_rows else iter(())


def _unpickled(value: Any) -> Partial:
    partial: Partial = pickle.loads(value.as_buffer())
    return partial


@functools.cache
def _merge_task() -> Any:
    import ray

    return ray.remote(num_returns=2, max_retries=-1)(_merged)


def _reduce(bundles: Iterator[Any]) -> Partial:
    """All partials as one, merged in a tree while they come; the first error ends it."""
    import ray

    levels: list[list[Any]] = []
    notes: list[Any] = []
    fan_in = _FAN_IN

    def look(pending: list[Any], keep: int) -> list[Any]:
        """The notes of merges still under way, at most ``keep``. Raises the error of one that has found one."""
        wait = max(0, len(pending) - keep)
        done, pending = ray.wait(pending, num_returns=wait or len(pending), timeout=None if wait else 0)
        for error in ray.get(done):
            if error is not None:
                raise error
        return pending

    def add(ref: Any, level: int) -> None:
        if level == len(levels):
            levels.append([])
        levels[level].append(ref)
        if len(levels[level]) >= fan_in:
            merged, note = _merge_task().remote(*levels[level])
            levels[level] = []
            notes.append(note)
            add(merged, level + 1)

    for bundle in bundles:
        if bundle.size_bytes() > _LARGE * len(bundle.block_refs):
            fan_in = 2
        for ref in bundle.block_refs:
            add(ref, 0)
        if notes:
            notes = look(notes, _IN_FLIGHT)
    rest = [ref for level in reversed(levels) for ref in level]
    if not rest:
        return Partial()
    while True:
        refs = [_merge_task().remote(*rest[start : start + fan_in]) for start in range(0, len(rest), fan_in)]
        notes += [note for _, note in refs]
        rest = [merged for merged, _ in refs]
        if len(rest) == 1:
            look(notes, 0)
            whole: Partial = ray.get(rest[0])
            return whole
