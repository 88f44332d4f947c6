"""What a source is: batches of samples in order, of data that need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[int, int | None], None]


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


class Source:
    """A stream of :class:`Part`; a subclass gives ``parts()``, and says what it knows beforehand.

    ``label``: what it is called in messages. ``names``: of the features, None where there are none. ``rows``: the
    number of samples, None where that is not known. ``again``: whether it can be read more than once. ``ahead``: how
    many parts are read in the background while one is worked on. ``progress``: called with the rows read so far and
    ``rows``.
    """

    label: str = "the data"
    names: list[str] | None = None
    rows: int | None = None
    again: bool = True
    ahead: int = 0
    progress: Progress | None = None

    def parts(self) -> Iterator[Part]:
        """The parts, from the first on. Raises InputError where a file cannot be read as what it claims to be."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Part]:
        from batchnorm.preprocessing.sources.readahead import read_ahead

        done = 0
        for part in read_ahead(self.parts(), self.ahead) if self.ahead else self.parts():
            yield part
            done += len(part.values)
            if self.progress is not None:
                self.progress(done, self.rows)
