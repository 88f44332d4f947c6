"""``batchnorm::moments`` of a table on a GPU: one pass over the memory, in float64. Imports Triton.

Slices of the rows are summed about origins of their own; what they found is merged by Chan's formulas, in torch and in
their order, so that the same data give the same bits.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from batchnorm.moments.blocks import two_sum
from batchnorm.moments.cuda_kernel import sums

_ROWS, _FEATURES = 32, 64  # of a tile
_LEAST_ROWS = 512  # of a slice
_PROGRAMS = 4  # for each multiprocessor


def moments(x: Tensor, weights: Tensor | None, skip_nan: bool) -> tuple[Tensor, ...]:
    """The operator for (N, C) whose features lie side by side; anything else is the reference's."""
    from batchnorm.moments.operator import Sums, reference

    if x.ndim == 3 and x.shape[2] == 1:
        x = x[:, :, 0]
    if x.ndim != 2 or x.stride(1) != 1:
        return reference(x, weights, skip_nan)
    rows, features = x.shape
    columns = -(-features // _FEATURES)
    splits = max(1, min(-(-_multiprocessors(x.device) * _PROGRAMS // columns), rows // _LEAST_ROWS))
    partial = x.new_empty(6, splits, features, dtype=torch.float64)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        sums[(columns, splits)](
            x,
            None if weights is None else weights.contiguous(),
            partial,
            rows,
            x.stride(0),
            splits,
            features,
            WEIGHTED=weights is not None,
            SKIP_NAN=skip_nan,
            A=_ROWS,
            B=_FEATURES,
            num_warps=8,
        )
    return Sums(*_merged(*partial.unbind()))


def _merged(
    count: Tensor, total: Tensor, squares: Tensor, origin: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, ...]:
    """count, mean, mean_low, m2, low, high (C,) from those of slices (splits, C), about the origin of the fullest."""
    about = origin.gather(0, count.argmax(0, keepdim=True))
    share = total / torch.where(count > 0, count, 1)
    m2 = (squares - total * share).clamp_min(0)
    apart = torch.where(count > 0, (origin - about) + share, 0)  # of the slice's mean
    number = count.sum(0)
    correction = (count * apart).sum(0) / torch.where(number > 0, number, 1)
    mean, mean_low = two_sum(about[0], correction)
    m2 = m2.sum(0) + (count * (apart - correction).square()).sum(0)
    # An infinite or NaN value makes both NaN, and where nothing counts there is nothing.
    sound = correction.isfinite()
    mean, mean_low, m2 = (torch.where(sound, value, torch.nan) for value in (mean, mean_low, m2))
    mean, mean_low, m2 = (torch.where(number > 0, value, 0) for value in (mean, mean_low, m2))
    return number, mean, mean_low, m2, low.amin(0), high.amax(0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
