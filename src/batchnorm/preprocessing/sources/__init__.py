"""Where batches come from: one notion of a stream for arrays, loaders, files and folders.

:func:`open_source` makes a :class:`Source` of whatever holds samples; ``fit``, ``partial_fit`` and ``transform`` of the
estimators take sources, and call :func:`open_source` themselves on paths and iterables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from batchnorm._errors import DtypeError
from batchnorm.preprocessing.sources.source import Part, Progress, Source
from batchnorm.preprocessing.sources.streams import IterableSource, MemoryMapSource

__all__ = ["Part", "Source", "is_stream", "open_source"]


def is_stream(X: Any) -> bool:
    """Whether ``X`` is to be read batch by batch: a path, an iterable of batches, a DataLoader, a :class:`Source`.

    Arrays, tensors, frames and nested lists are not: they are one batch. Nor is a memory map, whose transform is an
    array; ``fit`` reads it in blocks all the same. A list or tuple is, if its items have two dimensions or more.
    """
    if isinstance(X, (str, PathLike, Source)):
        return True
    names = ("__array__", "shape", "__dataframe__", "columns")
    # Of the class first: a LazyFrame would work out its plan for its columns.
    if any(hasattr(owner, name) for owner in (type(X), X) for name in names) or isinstance(X, dict):
        return False
    if isinstance(X, (list, tuple)):
        return bool(X) and all(getattr(item, "ndim", 0) >= 2 for item in X)
    return isinstance(X, Iterable) and not isinstance(X, (bytes, bytearray, range, set, frozenset))


def open_source(
    X: Any,
    *,
    columns: Sequence[str] | str | None = None,
    weights: str | None = None,  # noqa: ARG001 -- of files
    batch_rows: int | None = None,
    progress: Progress | None = None,
) -> Source:
    """``X`` as a :class:`Source`.

    ``columns``: which features to take, by name, in this order. ``weights``: the column with the samples' weights,
    which is then no feature. ``batch_rows``: samples a part; None chooses so that parts take some tens of megabytes.
    ``progress``: called with the number of rows read and, where known, of all.

    Raises InputError for what cannot be read and for names that are not there.
    """
    source: Source
    if isinstance(X, Source):
        source = X
    elif isinstance(X, np.memmap):
        source = MemoryMapSource(X, batch_rows)
    elif is_stream(X) and not isinstance(X, (str, PathLike)):
        source = IterableSource(X, key=columns if isinstance(columns, str) else None)
    else:
        raise DtypeError(f"cannot read batches from a {type(X).__name__}")
    if progress is not None:
        source.progress = progress
    return source
