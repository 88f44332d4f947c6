"""Transform files of any size: block by block, the same kind of file out, resumable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from batchnorm._errors import InputError
from batchnorm.preprocessing.base import Normalizer, located
from batchnorm.preprocessing.inputs import read
from batchnorm.preprocessing.saving import digest
from batchnorm.preprocessing.sinks.job import Job, open_job
from batchnorm.preprocessing.sinks.places import Plan, plan
from batchnorm.preprocessing.sinks.reading import Block, Learned, Reader, open_reader
from batchnorm.preprocessing.sinks.writing import Writer
from batchnorm.preprocessing.sources import Part
from batchnorm.preprocessing.sources.readahead import read_ahead
from batchnorm.preprocessing.sources.source import Progress

DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Transformed:
    """What was done: where the result is, its files and its rows, and how many of those an earlier run had done."""

    path: Path
    files: int
    rows: int
    resumed: int


def transform_file(
    estimator: Normalizer,
    src: str | PathLike[str] | Sequence[str | PathLike[str]],
    dst: str | PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    inverse: bool = False,
    dtype: str | None = None,
    batch_rows: int | None = None,
    keep_columns: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Transformed:
    """Transform what ``src`` holds into ``dst``, block by block: memory does not grow with the data.

    Parameters
    ----------
    src: a file, a folder, a pattern such as ``"data/*.parquet"``, or several of them. ``.npy``, ``.npz``,
        ``.safetensors``, ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``, ``.feather``; or a folder of images.
    dst: a file of any of those kinds, by its suffix. A folder where ``src`` is more than one file: it gets files of the
        same names and kinds.
    columns: which columns are the features, for data and statistics without names.
    inverse: back to the data's own units.
    dtype: of the results, "float16", "float32" or "float64"; None keeps that of the data (float64 where those are
        integers, text or of several kinds).
    batch_rows: rows a block. None takes some tens of megabytes.
    keep_columns: carry columns that are no features (labels, ids, weights) along as they are, from table to table; and
        the other arrays of an .npz or .safetensors file.
    resume: go on with an interrupted transform of the same data, statistics and options; begin where there is none.
    overwrite: replace what is at ``dst``, and drop an interrupted transform there.
    progress: called with the rows done and, where known, of all.

    Missing values (NaN, null, an empty field) stay missing. The result is made in ``<dst>.partial`` and moved to
    ``dst`` when whole. An interrupt leaves that folder, which ``resume`` goes on with; an error removes it unless
    ``resume`` was asked for.

    Raises InputError (and ShapeError, DtypeError, its kin) where the data are not those that the statistics are of or
    cannot be read, before anything is written if a look at names and widths tells; OutputError where ``dst`` cannot be
    written.
    """
    check_is_fitted(estimator)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"expected dtype to be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    learned, names = _features(estimator, inverse)
    where = plan(src, dst)
    readers = [open_reader(item.source, learned, columns, batch_rows) for item in where.items]
    task = {
        "statistics": digest(estimator),
        "files": [[str(item.source.absolute()), item.target, *_stamp(item.source)] for item in where.items],
        "options": {"columns": columns and list(columns), "inverse": inverse, "dtype": dtype, "keep": keep_columns},
        "batch_rows": batch_rows,
    }
    job = open_job(where, task, resume=resume, overwrite=overwrite)
    with job:
        return _run(job, where, readers, estimator, names, inverse, dtype, keep_columns, progress)


def _run(
    job: Job,
    where: Plan,
    readers: Sequence[Reader],
    estimator: Normalizer,
    names: Sequence[str] | None,
    inverse: bool,
    dtype: str | None,
    keep: bool,
    progress: Progress | None,
) -> Transformed:
    counts = [reader.rows for reader in readers]
    total = None if any(count is None for count in counts) else sum(count or 0 for count in counts)
    done = resumed = job.rows_before
    for number, (item, reader) in enumerate(zip(where.items, readers, strict=True)):
        if number < job.file:
            continue
        out_names = names or reader.names or list(estimator.get_feature_names_out())
        target = job.target(item.target)
        writer = Writer(reader, target, job.scratch, out_names, keep)
        began = job.restore(writer.sink)
        done, resumed = done + began, resumed + began
        saved = time.monotonic()
        for block in _ahead(reader.blocks(began)):
            writer.write(block, _transform(estimator, block, reader.path, inverse, dtype, len(out_names)))
            done += len(block.values)
            if progress is not None:
                progress(done, total)
            if time.monotonic() - saved >= writer.sink.interval:
                job.checkpoint(number, writer.sink)
                saved = time.monotonic()
        if writer.sink.rows == 0 and (len(readers) == 1 or reader.rows is None):
            raise InputError(f"{reader.path} holds no rows")
        job.finish_file(number, writer.sink)
    if done == 0:
        raise InputError(f"{where.label} holds no rows")
    job.finish()
    return Transformed(where.target, len(readers), done, resumed)


def _ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    return read_ahead(blocks, 1)


def _transform(estimator: Normalizer, block: Block, path: Path, inverse: bool, dtype: str | None, outputs: int) -> Any:
    if len(block.values) == 0:
        return np.empty((0, outputs), dtype=dtype or block.values.dtype)
    with located(Part(None, file=str(path))):
        options = {**estimator._expected(inverse), "check_names": False}
        batch = read(estimator, block.values, reset=False, first_row=block.row, **options)
        out = estimator._transform_batch(batch, inverse, None)
    if not isinstance(out, np.ndarray):
        out = (out.float() if str(out.dtype) == "torch.bfloat16" else out).cpu().numpy()
    return out if dtype is None else out.astype(dtype, copy=False)


def _features(estimator: Normalizer, inverse: bool) -> tuple[Learned, list[str] | None]:
    """What the data must have, and the names of the results; None for those of the data, or none."""
    learned = getattr(estimator, "feature_names_in_", None)
    given = None if learned is None else [str(name) for name in learned]
    outputs = [str(name) for name in estimator.get_feature_names_out()]
    generated = outputs if given is not None or getattr(estimator, "method", "").startswith("pca") else None
    if inverse:
        return Learned(len(outputs), generated), given
    return Learned(estimator.n_features_in_, given), generated


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when the data do."""
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        text = "".join(f"{file}{file.stat().st_size}{file.stat().st_mtime_ns}" for file in inside)
        return len(inside), int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
    seen = path.stat()
    return seen.st_size, seen.st_mtime_ns
