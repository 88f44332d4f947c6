"""Cut data of any size into blocks.

A float64 copy is only ever made of one block, so that statistics of float32 data need no more memory than the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm._errors import DtypeError, InputError, ShapeError

# A block's float64 copy (1 MB) stays in a core's second-level cache between the two passes. On an accelerator a block
# only has to bound the memory of temporaries, and small ones would cost a launch each.
_BLOCK_ELEMENTS = 2**17
_BLOCK_ELEMENTS_ACCELERATOR = 2**24
_BLOCK_MIN_ROWS = 16
# A product of rows costs as much as adding it to the scatter matrix unless a block has many rows.
_BLOCK_MAX_PRODUCT_ROWS = 1024


def as_tensor(x: Any) -> Tensor:
    """``x`` as a tensor, without a copy wherever torch can read its memory.

    Raises DtypeError for complex numbers, text and objects.
    """
    if isinstance(x, Tensor):
        if x.is_complex():
            raise DtypeError(f"expected real numbers, got a tensor of {x.dtype}: pass its real and imaginary parts")
        return x
    array = np.asarray(x)
    if array.dtype.kind not in "fiub":
        raise DtypeError(
            f"expected real numbers, got an array of {array.dtype}: convert it to float32 or float64 first"
        )
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_WritableView(array)))


class _WritableView:
    """A read-only array's memory declared writable, because torch warns of every array that is not.

    Nothing in this package writes to a tensor that came from here.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.owner = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its rounding error, exactly (D. E. Knuth, TAOCP vol. 2, 4.2.2)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _position_weights(weights: Any, mask: Any, x: Tensor, channel_axis: int) -> Tensor | None:
    """Weights and mask as one float64 tensor that broadcasts over ``x`` (size 1 along the channels), or None."""
    positions = [size for axis, size in enumerate(x.shape) if axis != channel_axis]
    combined: Tensor | None = None
    for name, given in (("weights", weights), ("mask", mask)):
        if given is None:
            continue
        w = as_tensor(given).detach().to(x.device)
        if name == "mask" and w.dtype != torch.bool:
            raise DtypeError(f"mask must be boolean, True where a value counts, got {w.dtype}: compare it first")
        if w.ndim == 1 and channel_axis != 0 and w.shape[0] == x.shape[0]:
            w = w.view(-1, *[1] * (len(positions) - 1))
        if w.ndim != len(positions) or any(size not in (1, n) for size, n in zip(w.shape, positions, strict=True)):
            raise ShapeError(
                f"{name} must have shape ({x.shape[0]},) or {tuple(positions)} (or broadcast to it) for data of shape "
                f"{tuple(x.shape)}, got {tuple(w.shape)}"
            )
        w = w.to(torch.float64)
        if w.numel() and not bool((torch.isfinite(w) & (w >= 0)).all()):
            raise InputError(f"{name} must be finite and not negative: set the weight of what must not count to 0")
        combined = w if combined is None else combined * w
    return None if combined is None else combined.unsqueeze(channel_axis)


def cut_blocks(
    x: Tensor, weights: Tensor | None, channel_axis: int, min_rows: int | None = None, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut ``x``, never across channels, so that the float64 copy of a piece is small whatever the size of ``x``."""
    limit = limit or _BLOCK_ELEMENTS
    limit = max(limit, (min_rows or _BLOCK_MIN_ROWS) * x.shape[channel_axis])
    if x.device.type != "cpu":
        limit = max(limit, _BLOCK_ELEMENTS_ACCELERATOR)
    axis = next((a for a, size in enumerate(x.shape) if a != channel_axis and size > 1), None)
    if x.numel() <= limit or axis is None:
        if x.numel():
            yield x, weights
        return
    step = max(1, limit * x.shape[axis] // x.numel())
    for start in range(0, x.shape[axis], step):
        length = min(step, x.shape[axis] - start)
        w = weights
        if w is not None and w.shape[axis] > 1:
            w = w.narrow(axis, start, length)
        piece = x.narrow(axis, start, length)
        if piece.numel() <= limit:
            yield piece, w
        else:
            yield from cut_blocks(piece, w, channel_axis, min_rows, limit)


def prepare(x: Any, channel_axis: int | None, weights: Any, mask: Any) -> tuple[Tensor, Tensor | None, int]:
    data = as_tensor(x).detach()
    if channel_axis is None:
        # Every value belongs to one channel: give it an axis of its own, last, where it disturbs no weights.
        data, axis = data.unsqueeze(-1), data.ndim
        if data.ndim == 1:
            data, axis = data.unsqueeze(0), 1
    else:
        if not -data.ndim <= channel_axis < data.ndim:
            raise ShapeError(
                f"channel_axis={channel_axis} needs data with more axes, got shape {tuple(data.shape)}: "
                "pass (N, C, *), or channel_axis=None for one statistic of all values"
            )
        axis = channel_axis % data.ndim
        if data.ndim == 1:
            data, axis = data.unsqueeze(0), 1
    return data, _position_weights(weights, mask, data, axis), axis


def sample_rows(
    x: Tensor, weights: Tensor | None, channel_axis: int, skip_nan: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``x`` as float64 rows (n, C), a block at a time, less rows without weight and (``skip_nan``) with NaN."""
    min_rows = max(_BLOCK_MIN_ROWS, min(x.shape[channel_axis], _BLOCK_MAX_PRODUCT_ROWS))
    for block, block_weights in cut_blocks(x, weights, channel_axis, min_rows):
        rows = block.movedim(channel_axis, -1).reshape(-1, x.shape[channel_axis]).to(torch.float64)
        w: Tensor | None = None
        if block_weights is not None:
            shape = [1 if axis == channel_axis else size for axis, size in enumerate(block.shape)]
            w = block_weights.expand(shape).reshape(-1)
            rows, w = rows[w > 0], w[w > 0]
        # One sum says whether to look closer: it is NaN wherever a value is.
        if skip_nan and bool(torch.isnan(rows.sum())):
            complete = ~torch.isnan(rows).any(dim=1)
            rows, w = rows[complete], None if w is None else w[complete]
        if rows.shape[0]:
            yield rows, w
