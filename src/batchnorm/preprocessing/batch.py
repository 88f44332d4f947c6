"""What the estimators compute on: data as a tensor, and where its features are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import ShapeError
from batchnorm.moments import Moments

# The float64 copy of one block of rows stays in a core's second-level cache.
BLOCK_ELEMENTS = 2**17


class NothingToLearnError(ShapeError):
    """No sample, or none with a weight: no error where another process has some."""


@dataclass(frozen=True)
class Batch:
    """Data as a tensor that shares memory with what the caller passed (``source``), and where its channels are."""

    values: Tensor
    source: Any
    axis: int
    writable: bool
    first_row: int = 0  # of a part of a stream, for messages

    @property
    def num_rows(self) -> int:
        """The number of samples."""
        return self.values.shape[0]

    @property
    def num_channels(self) -> int:
        """The number of features."""
        return self.values.shape[self.axis]

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of results: that of floating data, else float64 as NumPy has it or torch's default."""
        if self.values.is_floating_point():
            return self.values.dtype
        return torch.get_default_dtype() if isinstance(self.source, Tensor) else torch.float64

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of samples, small enough for a float64 copy."""
        return row_blocks(self.values)

    def moments(self, weights: Tensor | None) -> Moments:
        """The moments of each feature, NaN left out."""
        return Moments.from_batch(self.values, channel_axis=self.axis, weights=weights, skip_nan=True)

    def first_infinite(self, values: Tensor | None = None) -> tuple[int, int] | None:
        """Row and column of the first infinite value of the data, or of other ``values`` of the same shape."""
        values = self.values if values is None else values
        if not values.is_floating_point() or _sum_is_finite(values):
            return None
        for rows, block in row_blocks(values):
            infinite = torch.isinf(block)
            if bool(infinite.any()):
                index = [int(i) for i in infinite.nonzero()[0]]
                return index[0] + rows.start, index[self.axis]
        return None


def row_blocks(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, small enough for a float64 copy."""
    rows = values.shape[0]
    step = max(1, BLOCK_ELEMENTS * rows // max(1, values.numel()))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        yield block, values[block]


def _sum_is_finite(values: Tensor) -> bool:
    """Whether one sum says that all values are finite: mostly the answer, and read only once."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return bool(torch.isfinite(values.sum(dtype=torch.float32 if half else None)))
