"""Files that a Ray cluster reads and writes: what ``--ray ADDRESS`` of the command line does."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm._errors import BatchnormError, InputError, OutputError
from batchnorm.preprocessing.distributed.ray_data import RayDataset, need_ray, ray_dataset
from batchnorm.preprocessing.distributed.ray_transform import transform
from batchnorm.preprocessing.sources.paths import partitions

Cut = Callable[[str], Iterator[dict[str, int]]]
Paths = str | PathLike[str] | Sequence[str | PathLike[str]]
_FORMATS = ("parquet", "csv", "npy")
_RANGE_BYTES = 64 * 2**20


def fit_files_on_ray(
    estimator: Any,
    source: Paths,
    *,
    columns: Sequence[str] | str | None = None,
    weights: str | None = None,
    address: str | None = "auto",
) -> Any:
    """Fit ``estimator`` to files on a Ray cluster, and return it.

    ``source``: a file, folder, pattern, or several; .parquet, .csv or .npy, on a path that all nodes see, or a URI
    (``s3://...``). ``columns``, ``weights``: see :func:`ray_dataset`; of Parquet no other columns are read. An .npy
    file has the one column "data". ``address``: of the cluster, as for ``ray.init``; "local" starts one on this
    machine. A Ray that runs in this process already is used whatever the address, and left running.

    Raises InputError where there are no such files, and what ``fit`` raises.
    """
    with cluster(address), _reading(source):
        data = _open(source, columns, weights)
        wanted = data.chosen if weights is None or data.chosen is None else [*data.chosen, weights]
        if wanted is not None and set(wanted) <= set(data.known or []):
            data = ray_dataset(data.dataset.select_columns(wanted), data.chosen, weights)  # the reader skips the others
        return estimator.fit(data)


def transform_files_on_ray(
    estimator: Any,
    source: Paths,
    folder: str | PathLike[str],
    *,
    columns: Sequence[str] | str | None = None,
    inverse: bool = False,
    address: str | None = "auto",
) -> None:
    """Transform files on a Ray cluster into a new ``folder`` of files of the same format, other columns as they are.

    The folder, which all nodes must see, appears when it is whole. Arguments as for :func:`fit_files_on_ray`.

    Raises OutputError where the folder exists or cannot be written, InputError and what ``transform`` raises.
    """
    target = Path(folder)
    if target.exists():
        raise OutputError(f"cannot write to {str(target)!r}: it exists already, name a new folder")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with cluster(address), _reading(source):
        data = _open(source, columns, None)
        out = transform(estimator, data, inverse=inverse)
        kind = _format(_paths(source)[0])
        try:
            partial.mkdir(parents=True)
            if kind == "npy":
                (name,) = columns if columns is not None and not isinstance(columns, str) else [columns or "data"]
                out.write_numpy(str(partial), column=name)
            else:
                getattr(out, f"write_{kind}")(str(partial))
            os.replace(partial, target)
        except OSError as error:
            raise OutputError(f"cannot write to {str(target)!r}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A connection to the Ray cluster at ``address`` if this process has none; closed at the end if made here.

    Raises InputError where nothing answers there.
    """
    need_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"expected a Ray cluster at {address!r}, got {cause!r}: see `ray start`") from error
    try:
        yield
    finally:
        ray.shutdown()


def _open(source: Paths, columns: Sequence[str] | str | None, weights: str | None) -> RayDataset:
    data = need_ray()
    paths = _paths(source)
    kind = _format(paths[0])
    if not any("://" in path for path in paths):
        if kind == "npy":
            return ray_dataset(_pieces(data, paths, kind, _ranges, _range), columns, weights)
        if kind == "parquet" and not any(map(_partitioned, paths)):
            return ray_dataset(_pieces(data, paths, kind, _row_groups, _row_group), columns, weights)
    read = {"npy": data.read_numpy, "csv": data.read_csv, "parquet": data.read_parquet}[kind]
    context = data.DataContext.get_current()
    newer = getattr(context, "use_datasource_v2", False)
    # Ray 2.60's newer reader looks paths up in threads, which fail now and then where aiohttp is not installed: they
    # import fsspec's HTTP file system at once.
    if newer:
        context.use_datasource_v2 = False
    try:
        dataset = read(paths)
    finally:
        if newer:
            context.use_datasource_v2 = True
    # Or our errors would be the last lines of Ray's.
    dataset.context.raise_original_map_exception = True
    return ray_dataset(dataset, columns, weights)


def _pieces(data: Any, paths: Sequence[str], kind: str, cut: Cut, read: Any) -> Any:
    """A dataset of what ``read`` makes of the pieces that ``cut`` says a file has, one task a piece.

    Ray's own readers make one block of an .npy file whatever its size, and hold several row groups of Parquet whole.
    """
    files = [file for path in paths for file in _files(path, kind)]
    pieces = [{"file": os.path.abspath(file), **piece} for file in files for piece in cut(file)]
    if not pieces:
        raise InputError(f"Found no samples in {', '.join(paths)}: 0 sample(s) while a minimum of 1 is required.")
    return data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(read, batch_size=1)


def _ranges(file: str) -> Iterator[dict[str, int]]:
    """An .npy file in ranges of rows."""
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    if array.ndim < 2:
        raise InputError(f"{file}: expected an array (samples, features), got shape {array.shape}")
    step = max(1, _RANGE_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), step):
        yield {"start": start, "stop": start + step}


def _range(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows of one range."""
    file, start, stop = (batch[name][0] for name in ("file", "start", "stop"))
    return {"data": np.array(np.load(str(file), mmap_mode="r")[int(start) : int(stop)])}


def _row_groups(file: str) -> Iterator[dict[str, int]]:
    """The row groups of a Parquet file, and how many rows of each are to be read at a time."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(file)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        yield {"group": number, "rows": max(1, _RANGE_BYTES * group.num_rows // max(1, group.total_byte_size))}


def _row_group(batch: dict[str, Any]) -> Iterator[Any]:
    """The rows of one row group, in pieces."""
    import pyarrow as pa
    from pyarrow import parquet

    file, number, rows = (batch[name][0] for name in ("file", "group", "rows"))
    with parquet.ParquetFile(str(file), buffer_size=2**20, pre_buffer=False) as source:
        for piece in source.iter_batches(int(rows), row_groups=[int(number)]):
            yield pa.Table.from_batches([piece])


def _partitioned(path: str) -> bool:
    """Whether folders hold columns, which Ray's own reader adds."""
    if not os.path.isdir(path):
        return bool(partitions(path))
    return any(partitions(os.path.relpath(file, path)) for file in _files(path, "parquet"))


def _files(path: str, ending: str) -> list[str]:
    """The files of a folder and its subfolders, or the one that ``path`` is."""
    return sorted(map(str, Path(path).rglob(f"*.{ending}"))) if os.path.isdir(path) else [path]


@contextmanager
def _reading(source: Paths) -> Iterator[None]:
    """Errors of the tasks and of readers as the package's own."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except BatchnormError as error:
        raise _ours(error) or error from error
    except RayTaskError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise _ours(error) or InputError(f"cannot read {source!s} on Ray: {lines[-1] if lines else error!r}") from error
    except (OSError, ValueError) as error:  # the schema of Parquet is read here
        raise InputError(f"cannot read {source!s} on Ray: {(str(error) or repr(error)).splitlines()[0]}") from error


def _paths(source: Paths) -> list[str]:
    """Files and folders, patterns expanded in the order of names."""
    given = [source] if isinstance(source, (str, PathLike)) else list(source)
    found: list[str] = []
    for path in [os.fspath(item) for item in given]:
        here = [path] if "://" in path or os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not here:
            raise InputError(f"expected files at {path!r}, found none")
        found += here
    if not found:
        raise InputError("expected at least one file, got none")
    return found


def _format(path: str) -> str:
    """By the ending, of the first file if this is a folder."""
    if os.path.isdir(path):
        for _, _, names in sorted(os.walk(path)):
            endings = sorted(Path(name).suffix[1:] for name in names if Path(name).suffix[1:] in _FORMATS)
            if endings:
                return endings[0]
        raise InputError(f"expected files of {', '.join(_FORMATS)} in {path!r}, found none")
    ending = Path(path).suffix[1:]
    if ending in _FORMATS:
        return ending
    if "://" in path and not ending:  # a folder of objects
        return "parquet"
    raise InputError(f"expected files of {', '.join(_FORMATS)}, got {path!r}: on Ray there are no others")


def _ours(error: BaseException) -> BatchnormError | None:
    """The package's own error among the causes of Ray's."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        cause = getattr(at, "cause", None)
        for candidate in (at, cause):
            if isinstance(candidate, BatchnormError) and type(candidate).__module__.startswith("batchnorm"):
                # Ray has lines of its own behind our one.
                return type(candidate)(str(candidate).partition("\n")[0])
        at = cause if isinstance(cause, BaseException) else at.__cause__
    return None
