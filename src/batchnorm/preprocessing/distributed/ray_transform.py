"""``transform`` of a Ray Dataset: a lazy ``map_batches`` with the estimator once in the cluster's object store."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchnorm._errors import InputError
from batchnorm.preprocessing.distributed.ray_data import RayDataset, as_spread
from batchnorm.preprocessing.distributed.tables import read_features, write_features
from batchnorm.preprocessing.inputs import check_names, read
from batchnorm.preprocessing.output import frames_wanted


def transform(
    estimator: Any, data: RayDataset, *, inverse: bool, output_columns: Sequence[str] | None = None, **options: Any
) -> Any:
    """A lazy Dataset with the features transformed in their place, the other columns as they are.

    Where no columns were chosen the features are those that the estimator knows by name, else all columns.
    ``output_columns``: put the results there, beside the features. ``options``: of ``map_batches``.

    Raises InputError for a column that is missing; what is wrong with the data is raised, by Ray, when these are used.
    """
    import ray

    known, columns = data.known, data.columns
    if data.chosen is None:
        expected = _expected(estimator, inverse)
        if expected is not None and (known is None or not inverse or set(expected) <= set(known)):
            columns = expected
    missing = [name for name in columns or [] if known is not None and name not in known]
    if missing:
        raise InputError(f"expected a column {missing[0]!r}, the data have {', '.join(map(repr, known or []))}")
    # Tables go in and come out, whatever set_output says of arrays.
    plain = copy.copy(estimator)
    vars(plain).pop("_sklearn_output_config", None)
    block = functools.partial(_transform_block, ray.put(plain), columns, inverse, output_columns)
    # A reference within a partial is not resolved by Ray: each worker fetches the estimator once.
    return data.dataset.map_batches(block, **{"batch_size": None, "batch_format": "pyarrow", **options})


def transform_dataset(estimator: Any, X: Any, inverse: bool) -> Any:
    """:func:`transform` as a method of the estimator. Raises InputError where that is to give data frames."""
    config = frames_wanted(estimator)
    if config is not None and not inverse:
        raise InputError(
            f"expected to return a Ray Dataset, but set_output asks for {config!r} frames: "
            'use set_output(transform="default")'
        )
    return transform(estimator, as_spread(X), inverse=inverse)


def transform_table(
    estimator: Any, table: Any, columns: Sequence[str] | None, *, inverse: bool, output_columns: Sequence[str] | None
) -> Any:
    """An Arrow table with the features transformed, see :func:`transform`. Raises what ``transform`` does of arrays."""
    if not table.column_names:  # an empty block may have no columns
        return table
    features = read_features(table, columns)
    if table.num_rows:
        batch = read(estimator, features.values, reset=False, **{**estimator._expected(inverse), "check_names": False})
        if features.names is not None and not inverse:
            check_names(estimator, features.names, reset=False)
        values = estimator._transform_batch(batch, inverse, None)
    else:
        values = features.values.astype(np.float64)
    names: Sequence[str] = features.columns
    if output_columns is not None:
        names = list(output_columns)
    elif not features.tensor:
        renamed = getattr(estimator, "_columns", None)
        names = (renamed(inverse) if renamed is not None else None) or names
    if not table.num_rows and not features.tensor:
        values = np.empty((0, len(names)))
    return write_features(table, features, values, names, beside=output_columns is not None)


def _expected(estimator: Any, inverse: bool) -> list[str] | None:
    """The names of the columns that hold what is to be transformed, None where the estimator knows none."""
    names = getattr(estimator, "feature_names_in_", None)
    if inverse and names is not None:
        names = estimator.get_feature_names_out()
    return None if names is None else [str(name) for name in names]


def _transform_block(shared: Any, columns: Any, inverse: bool, output_columns: Any, table: Any) -> Any:
    return transform_table(_fetched(shared), table, columns, inverse=inverse, output_columns=output_columns)


@functools.lru_cache(maxsize=2)
def _fetched(shared: Any) -> Any:
    import ray

    return ray.get(shared)
