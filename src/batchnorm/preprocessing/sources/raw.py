"""Rows that lie in a file as they lie in memory: .npy, .npz and .safetensors."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from batchnorm._errors import InputError
from batchnorm.preprocessing.sources.columns import listed, near, weights_of
from batchnorm.preprocessing.sources.files import FileSource
from batchnorm.preprocessing.sources.memory import refuse_columns, release
from batchnorm.preprocessing.sources.source import Part, rows_of


@dataclass(frozen=True)
class Layout:
    """Where an array lies in a file: ``offset`` in bytes, from the file's or the archive member's beginning."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    fortran: bool = False
    torch_dtype: torch.dtype | None = None  # where NumPy has none

    def finish(self, block: NDArray[Any]) -> Any:
        """Rows as they were read, as what they are."""
        return block if self.torch_dtype is None else torch.from_numpy(block).view(self.torch_dtype)


def npy_layout(stream: IO[bytes]) -> Layout:
    """Read the head of an array in NumPy's format. Raises InputError for what is no array of numbers."""
    version = npy_format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = npy_format.read_array_header_1_0(stream)
    elif version in ((2, 0), (3, 0)):
        # 3.0 differs in the encoding of the names of fields alone, and an array with fields is refused.
        shape, fortran, dtype = npy_format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the format is not known")
    if dtype.kind not in "fiub":
        raise InputError(f"holds {dtype}, expected real numbers")
    if not shape:
        raise InputError("holds a single number, expected an array (n, features)")
    return Layout(shape, dtype, stream.tell(), fortran and len(shape) > 1)


class Buffers:
    """Memory for blocks of rows. One that nobody holds a view of any more is used again.

    Fresh memory costs as much as reading into it: the system gives it page by page, zeroed.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.all = [np.empty(size, np.uint8)]
        # What the count is while nothing outside holds the buffer; it differs between versions of Python.
        self.unheld = self._holders(0)

    def _holders(self, index: int) -> int:
        return sys.getrefcount(self.all[index])

    def take(self) -> NDArray[np.uint8]:
        """One that is free."""
        for index in range(len(self.all)):
            if self._holders(index) == self.unheld:
                return self.all[index]
        self.all = [*self.all[-7:], np.empty(self.size, np.uint8)]
        return self.all[-1]


def read_rows(stream: IO[bytes], layout: Layout, batch_rows: int) -> Iterator[Any]:
    """Blocks of rows from where the stream stands. Raises EOFError where there are less than the head promised."""
    row_bytes = layout.dtype.itemsize
    for size in layout.shape[1:]:
        row_bytes *= size
    batch_rows = min(batch_rows, max(1, layout.shape[0]))
    buffers = Buffers(max(1, batch_rows * row_bytes))
    for start in range(0, layout.shape[0], batch_rows):
        rows = min(batch_rows, layout.shape[0] - start)
        buffer = buffers.take()[: rows * row_bytes]
        got = 0
        while got < len(buffer):
            count = stream.readinto(memoryview(buffer)[got:])  # type: ignore[attr-defined,arg-type]
            if not count:
                row = start + got // max(1, row_bytes)
                raise EOFError(f"it ends in row {row} of {layout.shape[0]}: the file was cut off")
            got += count
        block = buffer.view(layout.dtype).reshape(rows, *layout.shape[1:])
        del buffer  # a reference of ours must not count as one of the caller's
        yield layout.finish(block)
        del block


class NpySource(FileSource):
    """``.npy``: read into memory a block at a time; column-major ones through a memory map."""

    kind = "a NumPy array"

    def read(self, file: str) -> Iterator[Part]:
        """Blocks of rows."""
        refuse_columns(file, self.choice)
        with open(file, "rb", buffering=0) as stream:
            layout = located_layout(file, stream)
            step = rows_of(layout.shape, layout.dtype.itemsize, self.choice.batch_rows)
            if layout.fortran:
                blocks = _mapped_rows(file, stream, layout, step)
            else:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                blocks = read_rows(stream, layout, step)
            row = 0
            for values in blocks:
                yield Part(values, file=file, row=row)
                row += len(values)
                del values

    def count(self, file: str) -> int | None:
        """What the head says."""
        with open(file, "rb", buffering=0) as stream:
            return located_layout(file, stream).shape[0]


def located_layout(file: str, stream: IO[bytes]) -> Layout:
    """``npy_layout`` whose errors name the file."""
    try:
        return npy_layout(stream)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _mapped_rows(file: str, stream: IO[bytes], layout: Layout, step: int) -> Iterator[NDArray[Any]]:
    bytes_needed = layout.offset + layout.dtype.itemsize * int(np.prod(layout.shape, dtype=np.int64))
    if os.fstat(stream.fileno()).st_size < bytes_needed:
        raise EOFError("it is shorter than its head says: the file was cut off")
    if bytes_needed == layout.offset:
        return
    mapped = np.memmap(file, layout.dtype, "r", layout.offset, layout.shape, order="F")
    for start in range(0, layout.shape[0], step):
        block = np.array(np.asarray(mapped[start : start + step]))
        release(mapped)
        yield block


class NamedSource(FileSource):
    """Files that hold several arrays by name: ``columns`` names the one with the data, ``weights`` that with theirs."""

    def pick(self, file: str, names: list[str]) -> tuple[str, str | None]:
        """Which arrays to read. Raises InputError that names those there are."""
        wanted, weights = self.choice.columns, self.choice.weights
        if wanted is not None and len(wanted) > 1:
            raise InputError(f"{file}: columns names the one array that holds the data, got {listed(wanted)}")
        for name in (*(wanted or ()), *(() if weights is None else (weights,))):
            if name not in names:
                raise InputError(f"{file}: no array {name!r}{near(name, names)}")
        if wanted is not None:
            return wanted[0], weights
        rest = [name for name in names if name != weights]
        if len(rest) != 1:
            what = f"{len(rest)} arrays, {listed(rest)}: choose one with columns=NAME" if rest else "no array"
            raise InputError(f"{file}: holds {what}")
        return rest[0], weights

    def paired(self, file: str, blocks: Iterator[Any], weights: Iterator[Any] | None) -> Iterator[Part]:
        """Parts of blocks of samples and of as many weights."""
        row = 0
        for values in blocks:
            w = None if weights is None else weights_of(next(weights), str(self.choice.weights), file)
            yield Part(values, w, file, row)
            row += len(values)
            del values

    def check_lengths(self, file: str, data: Layout, weights: Layout | None) -> None:
        """Raise where there is not one weight a sample."""
        if weights is not None and weights.shape != data.shape[:1]:
            raise InputError(
                f"{file}: {self.choice.weights!r}, the weights, must have shape ({data.shape[0]},), one a sample, "
                f"got {weights.shape}"
            )


class NpzSource(NamedSource):
    """``.npz``: an array is read out of the archive a block at a time, compressed or not; column-major ones whole."""

    kind = "an archive of NumPy arrays"

    def read(self, file: str) -> Iterator[Part]:
        """Blocks of rows."""
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(file))
            layouts: list[Layout | None] = []
            streams: list[Any] = []
            for name in self._pick(file, archive):
                streams.append(None if name is None else stack.enter_context(archive.open(f"{name}.npy")))
                layouts.append(None if name is None else located_layout(f"{file}: {name}", streams[-1]))
            data, weights = layouts
            assert data is not None
            self.check_lengths(file, data, weights)
            step = rows_of(data.shape, data.dtype.itemsize, self.choice.batch_rows)
            blocks = _whole(streams[0], data, step) if data.fortran else read_rows(streams[0], data, step)
            yield from self.paired(file, blocks, None if weights is None else read_rows(streams[1], weights, step))

    def _pick(self, file: str, archive: zipfile.ZipFile) -> tuple[str, str | None]:
        return self.pick(file, [name[: -len(".npy")] for name in archive.namelist() if name.endswith(".npy")])

    def count(self, file: str) -> int | None:
        """What the head of the array says."""
        with zipfile.ZipFile(file) as archive:
            name, _ = self._pick(file, archive)
            with archive.open(f"{name}.npy") as stream:
                return located_layout(f"{file}: {name}", stream).shape[0]


def _whole(stream: IO[bytes], layout: Layout, step: int) -> Iterator[NDArray[Any]]:
    turned = Layout(layout.shape[::-1], layout.dtype, layout.offset)
    array = next(read_rows(stream, turned, turned.shape[0])).transpose()
    for start in range(0, layout.shape[0], step):
        yield array[start : start + step]


# What safetensors calls them. NumPy has no bfloat16 and no eight-bit floats: their bits are read, torch knows them.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_DTYPES |= {"U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "?"}
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class SafetensorsSource(NamedSource):
    """``.safetensors``: a tensor is read a block of rows at a time."""

    kind = "safetensors"

    def read(self, file: str) -> Iterator[Part]:
        """Blocks of rows."""
        data, weights = self._layouts(file)
        self.check_lengths(file, data, weights)
        step = rows_of(data.shape, data.dtype.itemsize, self.choice.batch_rows)
        with open(file, "rb", buffering=0) as stream, open(file, "rb", buffering=0) as second:
            stream.seek(data.offset)
            second.seek(0 if weights is None else weights.offset)
            yield from self.paired(
                file, read_rows(stream, data, step), None if weights is None else read_rows(second, weights, step)
            )

    def _layouts(self, file: str) -> tuple[Layout, Layout | None]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as tensors:  # checks the head against the file's length
                name, weights = self.pick(file, sorted(tensors.keys()))
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = json.loads(stream.read(length))
        data = self._layout(file, head, name, 8 + length)
        return data, None if weights is None else self._layout(file, head, weights, 8 + length)

    def _layout(self, file: str, head: dict[str, Any], name: str, start: int) -> Layout:
        entry = head[name]
        code, shape = entry["dtype"], tuple(entry["shape"])
        other = _TORCH_DTYPES.get(code)
        if code not in _DTYPES and other is None:
            raise InputError(f"{file}: {name!r} holds {code}, expected real numbers")
        if not shape:
            raise InputError(f"{file}: {name!r} holds a single number, expected a tensor (n, features)")
        dtype = np.dtype(_DTYPES[code] if other is None else f"u{other.itemsize}")
        return Layout(shape, dtype, start + entry["data_offsets"][0], torch_dtype=other)

    def count(self, file: str) -> int | None:
        """What the head says."""
        return self._layouts(file)[0].shape[0]
