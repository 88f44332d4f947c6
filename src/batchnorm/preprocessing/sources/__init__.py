"""Where batches come from: one notion of a stream for arrays, loaders, files and folders.

:func:`open_source` makes a :class:`Source` of whatever holds samples; ``fit``, ``partial_fit`` and ``transform`` of the
estimators take sources, and call :func:`open_source` themselves on paths and iterables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from batchnorm._errors import DtypeError, InputError
from batchnorm.preprocessing.sources.columns import Choice
from batchnorm.preprocessing.sources.memory import (
    ArraySource,
    FrameSource,
    MemoryMapSource,
    TableSource,
    refuse_columns,
)
from batchnorm.preprocessing.sources.source import Part, Progress, Source
from batchnorm.preprocessing.sources.streams import DatasetSource, IterableSource

__all__ = ["Part", "Source", "is_paths", "is_ray", "is_stream", "open_source"]


def is_stream(X: Any) -> bool:
    """Whether ``X`` is to be read batch by batch: a path, an iterable of batches, a DataLoader, a :class:`Source`.

    So are lists of paths, torch Datasets, Arrow datasets and streams of record batches. Arrays, tensors, frames and
    nested lists are not: they are one batch. Nor is a memory map, whose transform is an array; ``fit`` reads it in
    blocks all the same. A list or tuple is, if its items have two dimensions or more.
    """
    if isinstance(X, (str, PathLike, Source, Dataset)) or is_ray(X):
        return True
    names = ("__array__", "shape", "__dataframe__", "columns")
    # Of the class first: a LazyFrame would work out its plan for its columns.
    if any(hasattr(owner, name) for owner in (type(X), X) for name in names) or isinstance(X, dict):
        return False
    if isinstance(X, (list, tuple)):
        return bool(X) and (is_paths(X) or all(getattr(item, "ndim", 0) >= 2 for item in X))
    if isinstance(X, Iterable):
        return not isinstance(X, (bytes, bytearray, range, set, frozenset))
    return hasattr(X, "to_batches") and hasattr(X, "schema")


def is_ray(X: Any) -> bool:
    """Whether ``X`` is a Dataset or DataIterator of Ray, which is not imported for that."""
    return type(X).__module__.startswith("ray.data") and hasattr(X, "iter_batches")


def is_paths(X: Any) -> bool:
    """Whether ``X`` is a list of paths."""
    return isinstance(X, (list, tuple)) and bool(X) and all(isinstance(item, (str, PathLike)) for item in X)


def open_source(
    X: Any,
    *,
    columns: Sequence[str] | str | None = None,
    weights: str | None = None,
    batch_rows: int | None = None,
    progress: Progress | bool | None = None,
) -> Source:
    """``X`` as a :class:`Source`.

    ``X``: an array, tensor or frame (pandas, polars, Arrow); a DataLoader, a Dataset, an iterable of batches; a path,
    a pattern with ``*`` and ``**``, a folder, or a list of paths. Files are known by their suffix: ``.npy``, ``.npz``,
    ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather``, ``.csv``, ``.tsv`` (also ``.gz``), and images.

    ``columns``: which features to take, by name, in this order; of batches in dictionaries and of files with several
    arrays, the one that holds the data; of images, the mode to convert them to. ``weights``: the column with the
    samples' weights, which is then no feature. ``batch_rows``: samples a part at most; None chooses so that parts take
    16 MB. ``progress``: True for a bar on stderr if that is a terminal; or a function, called with the number of rows
    read and, where known, of all.

    Raises InputError for what cannot be read and for names that are not there, MissingDependencyError where pyarrow
    or Pillow is needed and not installed.
    """
    choice = Choice.of(columns, weights, batch_rows)
    if isinstance(X, Source) and choice != Choice():
        raise InputError(f"{X.label} is open already: choose columns, weights and batch_rows where it is opened")
    source = X if isinstance(X, Source) else _source(X, choice)
    if progress is not None:
        source.progress = progress
    return source


def _source(X: Any, choice: Choice) -> Source:
    if isinstance(X, (str, PathLike)) or is_paths(X):
        return _of_files(X, choice)
    if isinstance(X, Dataset):
        return DatasetSource(X, choice)
    if is_ray(X):
        from batchnorm.preprocessing.distributed.ray_data import RayDataset

        return RayDataset(X, choice)
    if hasattr(X, "schema") and any(hasattr(X, name) for name in ("num_rows", "to_batches", "read_next_batch")):
        return TableSource(X, choice)
    if is_stream(X):
        return IterableSource(X, choice)
    if hasattr(X, "columns") and hasattr(X, "shape"):
        return FrameSource(X, choice)
    if isinstance(X, (list, tuple)):
        X = np.asarray(X)
    if not hasattr(X, "shape") or not hasattr(X, "dtype"):
        raise DtypeError(f"cannot read batches from a {type(X).__name__}")
    refuse_columns(f"the {type(X).__name__}", choice)
    return (MemoryMapSource if isinstance(X, np.memmap) else ArraySource)(X, choice.batch_rows)


def _of_files(X: Any, choice: Choice) -> Source:
    from batchnorm.preprocessing.sources.arrow import ArrowSource, ParquetSource
    from batchnorm.preprocessing.sources.delimited import CsvSource
    from batchnorm.preprocessing.sources.images import ImageSource
    from batchnorm.preprocessing.sources.paths import find_files
    from batchnorm.preprocessing.sources.raw import NpySource, NpzSource, SafetensorsSource

    label, files, kind = find_files(X)
    sources: dict[str, type[NpySource | NpzSource | SafetensorsSource | ParquetSource | ArrowSource | CsvSource]] = {
        "npy": NpySource,
        "npz": NpzSource,
        "safetensors": SafetensorsSource,
        "parquet": ParquetSource,
        "arrow": ArrowSource,
        "csv": CsvSource,
    }
    return ImageSource(label, files, choice) if kind == "image" else sources[kind](label, files, choice)
