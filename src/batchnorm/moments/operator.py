"""The operator ``batchnorm::moments``: everything about the features of a batch from one pass over it.

``x`` is (N, C) or (N, C, P), floating point, with any strides; ``weights`` (N,) float64, only for (N, C). The results
are float64 of shape (C,): ``count``, ``mean``, ``mean_low`` and ``m2`` as in :class:`batchnorm.moments.Moments`, and
the extremes ``low`` and ``high``, +inf and -inf where there are none. A row without weight does not count, whatever it
holds. NaN is no extreme; from the others it is left out with ``skip_nan``, and spoils its channel without.

The C++ kernel (csrc/features.cpp) reads the memory once, in blocks that it merges by Chan's formulas; so does the one
for GPUs (:mod:`batchnorm.moments.cuda`), where neighbours lie side by side in memory. :func:`reference` is the
textbook's two passes in plain torch, for every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import _gpu
from batchnorm._library import NAMESPACE, load
from batchnorm.moments.blocks import cut_blocks, two_sum

SCHEMA = (
    "moments(Tensor x, Tensor? weights, bool skip_nan)"
    " -> (Tensor count, Tensor mean, Tensor mean_low, Tensor m2, Tensor low, Tensor high)"
)


class Sums(NamedTuple):
    """What the operator returns, each (C,) in float64; ``n`` is ``count``, a word that tuples have taken."""

    n: Tensor
    mean: Tensor
    mean_low: Tensor
    m2: Tensor
    low: Tensor
    high: Tensor


def reference(x: Tensor, weights: Tensor | None, skip_nan: bool) -> tuple[Tensor, ...]:
    """A first mean, then deviations from it and what they say it missed."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    row = (1, -1, *[1] * (x.ndim - 2))
    w = None if weights is None else weights.reshape(-1, 1)
    count, total, rest, squares = (x.new_zeros(x.shape[1], dtype=torch.float64) for _ in range(4))
    low = torch.full_like(count, torch.inf)
    high = -low

    def blocks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Values, where they count, and their weights."""
        for block, block_weights in cut_blocks(x, w, 1):
            values = block.to(torch.float64)
            present = torch.ones_like(values, dtype=torch.bool) if block_weights is None else block_weights > 0
            counted = present & ~torch.isnan(values) if skip_nan else present.expand_as(values)
            weight = counted.to(torch.float64)
            yield values, counted, weight if block_weights is None else weight * block_weights

    for values, counted, weight in blocks():
        count += weight.sum(axes)
        total += (torch.where(counted, values, 0) * weight).sum(axes)
        known = counted & ~torch.isnan(values)
        low = torch.minimum(low, torch.where(known, values, torch.inf).amin(axes))
        high = torch.maximum(high, torch.where(known, values, -torch.inf).amax(axes))
    divisor = torch.where(count > 0, count, 1)
    anchor = total / divisor
    for values, counted, weight in blocks():
        # Close to the anchor the subtraction is exact, so the rounding of the anchor itself does no harm.
        deviation = torch.where(counted, values - anchor.view(row), 0)
        weighted = deviation * weight
        rest += weighted.sum(axes)
        squares += weighted.mul_(deviation).sum(axes)
    correction = rest / divisor
    mean, mean_low = two_sum(anchor, correction)
    return Sums(count, mean, mean_low, (squares - rest * correction).clamp_min_(0), low, high)


def _fake(x: Tensor, weights: Tensor | None, skip_nan: bool) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(x.new_empty(x.shape[1], dtype=torch.float64) for _ in Sums._fields)


# Kept for the life of the process: a Library that is collected takes its registrations with it.
_registrations = torch.library.Library(NAMESPACE, "FRAGMENT")
_registrations.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_registrations.impl("moments", reference, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::moments", _fake, lib=_registrations)
ON_CUDA = _gpu.routed("batchnorm.moments.cuda", "moments", reference, 0, (*_gpu.DTYPES, torch.float64))
"""What CUDA tensors get."""
_gpu.register(_registrations, "moments", ON_CUDA)
load()


def pieces(
    x: Tensor, weights: Tensor | None, channel_axis: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``x`` and its weights as the operators take them: as a whole where that needs no copy, else block by block.

    ``limit``: how many values a block may have, None for what suits one pass over the memory.
    """
    channels = x.shape[channel_axis]
    if x.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        whole = _view(x.movedim(channel_axis, -1), weights, channel_axis)
        if whole is not None:
            yield whole
            return
    for block, block_weights in cut_blocks(x, weights, channel_axis, limit=limit):
        rows = block.movedim(channel_axis, -1).reshape(-1, channels)
        yield rows if rows.is_floating_point() else rows.to(torch.float64), _flat(block_weights, block, channel_axis)


def _view(last: Tensor, weights: Tensor | None, channel_axis: int) -> tuple[Tensor, Tensor | None] | None:
    """The same for data with the channels last, or None where that would take a copy."""
    try:
        if weights is None and last.ndim > 2:
            return last.movedim(-1, 1).view(last.shape[0], last.shape[-1], -1), None
        return last.view(-1, last.shape[-1]), _flat(weights, last.movedim(-1, channel_axis), channel_axis)
    except RuntimeError:
        return None


def _flat(weights: Tensor | None, x: Tensor, channel_axis: int) -> Tensor | None:
    """One weight a position."""
    shape = [1 if axis == channel_axis else size for axis, size in enumerate(x.shape)]
    return None if weights is None else weights.expand(shape).reshape(-1)


def compute(x: Tensor, weights: Tensor | None, skip_nan: bool) -> Sums:
    """The operator, as a function with types."""
    return Sums(*torch.ops.batchnorm.moments(x, weights, skip_nan))
