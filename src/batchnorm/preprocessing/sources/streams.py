"""Sources in the process: iterables of batches, DataLoaders, memory maps."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError
from batchnorm.preprocessing.sources.source import Part, Source

# A block of a memory map: large enough for the disk to be read at its speed, small beside the memory of any machine.
BLOCK_BYTES = 32 * 2**20


class IterableSource(Source):
    """Batches from an iterable: arrays, tensors, frames; of a tuple or list the first entry counts, as in (x, y)."""

    def __init__(self, batches: Iterable[Any], *, key: str | None = None) -> None:
        self.batches = batches
        self.key = key
        self.label = f"the {type(batches).__name__}"
        self.again = not isinstance(batches, Iterator)

    def parts(self) -> Iterator[Part]:
        """One part an item."""
        row = 0
        for number, item in enumerate(self.batches):
            values = self._values(item, number)
            yield Part(values, row=row)
            row += len(values)

    def _values(self, item: Any, number: int) -> Any:
        if isinstance(item, dict):
            if self.key is None or self.key not in item:
                asked = "pass columns=KEY" if self.key is None else f"has no {self.key!r}"
                raise InputError(f"batch {number} of {self.label} is a dict with {sorted(map(str, item))}: {asked}")
            return item[self.key]
        return item[0] if isinstance(item, (tuple, list)) and item and hasattr(item[0], "shape") else item


class MemoryMapSource(Source):
    """Blocks of rows of a memory-mapped array; pages that were read are given back to the system."""

    ahead = 1

    def __init__(self, array: NDArray[Any], batch_rows: int | None = None) -> None:
        self.array = array
        self.rows = array.shape[0] if array.ndim else 0
        self.label = str(getattr(array, "filename", None) or "the memory map")
        self.batch_rows = batch_rows

    def parts(self) -> Iterator[Part]:
        """Blocks, copied out of the map."""
        rows = self.array.shape[0]
        step = self.batch_rows or max(1, BLOCK_BYTES * rows // max(1, self.array.nbytes))
        for start in range(0, rows, step):
            block = np.array(self.array[start : start + step])
            self._release()
            yield Part(block, file=self.label, row=start)

    def _release(self) -> None:
        # Pages of the file that a process has mapped in count as its own memory until it is told to let go.
        base = self.array
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
            base.madvise(mmap.MADV_DONTNEED)
