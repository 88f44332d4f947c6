"""What a source is: batches of samples in order, of data that need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[int, int | None], None]

# A part of this size is read at the disk's speed, stays in the last cache while it is worked on, and is small beside
# the memory of any machine. malloc reuses blocks of up to 32 MB, larger ones it returns to the system each time.
PART_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Part:
    """One batch: ``values`` (n, features) or (n, C, *), an array, a tensor or a frame, a missing value being NaN.

    ``weights``: (n,) float64 or None. ``file`` and ``row``: where its first sample stands, for messages; rows count
    from 0.
    """

    values: Any
    weights: NDArray[np.float64] | None = None
    file: str | None = None
    row: int = 0

    @property
    def rows(self) -> int:
        """The number of samples; sparse matrices have a shape and no length, lists a length and no shape."""
        shape = getattr(self.values, "shape", None)
        return int(shape[0]) if shape else len(self.values)


class Source:
    """A stream of :class:`Part`; a subclass gives ``parts()``, and says what it knows beforehand.

    ``label``: what it is called in messages. ``names``: of the features, None where there are none. ``rows``: the
    number of samples, None where that is not known. ``again``: whether it can be read more than once. ``ahead``: how
    many parts are read in the background while one is worked on. ``progress``: called with the rows read so far and
    ``rows``; True draws a bar on a terminal. ``size`` and ``read_bytes``: of the files, and of them so far, where the
    rows are not known.
    """

    label: str = "the data"
    names: list[str] | None = None
    rows: int | None = None
    again: bool = True
    ahead: int = 0
    progress: Progress | bool | None = None
    size: int | None = None
    read_bytes: int = 0

    def parts(self) -> Iterator[Part]:
        """The parts, from the first on. Raises InputError where a file cannot be read as what it claims to be."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Part]:
        from batchnorm.preprocessing.sources.progress import reporting
        from batchnorm.preprocessing.sources.readahead import read_ahead

        done = 0
        with reporting(self) as report:
            for part in read_ahead(self.parts(), self.ahead) if self.ahead else self.parts():
                done += part.rows
                yield part
                del part  # or it would live on while the next one is read
                if report is not None:
                    report(done, self.rows)


def rows_of(shape: tuple[int, ...], itemsize: int, batch_rows: int | None) -> int:
    """How many samples a part has."""
    if batch_rows is not None:
        return batch_rows
    sample = itemsize
    for size in shape[1:]:
        sample *= max(1, size)
    return max(1, PART_BYTES // max(1, sample))
