"""Files of one array: .npy, .npz and .safetensors, written row by row."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from batchnorm.preprocessing.sinks.sink import AppendingSink, State, sync

_SAFETENSORS_NAMES = {"float16": "F16", "float32": "F32", "float64": "F64"}


class NpySink(AppendingSink):
    """An .npy file. How many rows it has is written into its header at the end, which NumPy leaves room for."""

    _dtype: np.dtype[Any] | None = None
    _tail: tuple[int, ...] = ()

    def restore(self, state: State) -> bool:
        self._dtype, self._tail = np.dtype(state["dtype"]), tuple(state["tail"])
        return super().restore(state)

    def _write(self, block: Any) -> None:
        if self._dtype is None:
            self._dtype, self._tail = block.dtype, block.shape[1:]
        file = self._open()
        if file.tell() == 0:
            self._header(file)
        file.write(np.ascontiguousarray(block, dtype=self._dtype).data)

    def _flush(self) -> State:
        assert self._dtype is not None, "a checkpoint comes after a block"
        return {**super()._flush(), "dtype": self._dtype.str, "tail": list(self._tail)}

    def _finish(self, file: BinaryIO) -> None:
        file.seek(0)
        self._header(file)

    def _header(self, file: BinaryIO) -> None:
        assert self._dtype is not None
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self._tail)}
        np.lib.format.write_array_header_1_0(file, header)


class NpzSink(NpySink):
    """An .npz archive: the array as ``key``, and the other members of ``source``, where that is an archive too."""

    def __init__(self, path: Path, scratch: Path, key: str, source: Path | None) -> None:
        super().__init__(path, scratch)
        self.key = key
        self.source = source

    def _place(self) -> None:
        packed = self.scratch / "packed"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            with open(self.partial, "rb") as array:
                self._add(archive, f"{self.key}.npy", array)
            if self.source is not None:
                with zipfile.ZipFile(self.source) as source:
                    for name in source.namelist():
                        if name != f"{self.key}.npy":
                            with source.open(name) as member:
                                self._add(archive, name, member)
        with open(packed, "rb+") as file:
            sync(file)
        os.replace(packed, self.path)

    @staticmethod
    def _add(archive: zipfile.ZipFile, name: str, contents: Any) -> None:
        # A date of its own would make every archive another one; 1980 is where those of the format begin.
        with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
            shutil.copyfileobj(contents, member, 2**20)


class SafetensorsSink(NpySink):
    """A .safetensors file: the array as ``key``, and the other tensors of ``source``, where that is such a file."""

    def __init__(self, path: Path, scratch: Path, key: str, source: Path | None) -> None:
        super().__init__(path, scratch)
        self.key = key
        self.source = source

    def _place(self) -> None:
        assert self._dtype is not None
        entries, start, metadata = self._others()
        size = self.rows * int(np.prod(self._tail, dtype=np.int64)) * self._dtype.itemsize
        shape = [self.rows, *self._tail]
        name = _SAFETENSORS_NAMES[self._dtype.name]
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        header[self.key] = {"dtype": name, "shape": shape, "data_offsets": [0, size]}
        end = size
        for other, entry in entries:
            first, last = entry["data_offsets"]
            header[other] = {**entry, "data_offsets": [end, end + last - first]}
            end += last - first
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        packed = self.scratch / "packed"
        with open(packed, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            with open(self.partial, "rb") as array:
                self._skip_header(array)
                shutil.copyfileobj(array, out, 2**20)
            if self.source is not None and entries:
                with open(self.source, "rb") as file:
                    for _, entry in entries:
                        _copy(file, out, start + entry["data_offsets"][0], start + entry["data_offsets"][1])
            sync(out)
        os.replace(packed, self.path)

    @staticmethod
    def _skip_header(array: BinaryIO) -> None:
        np.lib.format.read_magic(array)
        np.lib.format.read_array_header_1_0(array)

    def _others(self) -> tuple[list[tuple[str, Any]], int, Any]:
        """The other tensors of the source in the order of its bytes, where those begin, and its metadata."""
        if self.source is None:
            return [], 0, None
        with open(self.source, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None)
        header.pop(self.key, None)
        return sorted(header.items(), key=lambda item: item[1]["data_offsets"]), 8 + length, metadata


def _copy(source: BinaryIO, out: BinaryIO, start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        piece = source.read(min(2**20, end - start))
        out.write(piece)
        start += len(piece)
