"""``batchnorm::moments`` of tables and images on a GPU: one pass over the memory, in float64. Imports Triton.

Slices of the data are summed about origins of their own; what they found is merged by Chan's formulas, in torch and in
their order, so that the same data give the same bits.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from batchnorm.moments.blocks import two_sum
from batchnorm.moments.cuda_kernel import sums

_ROWS, _FEATURES = 32, 64  # of a tile of rows
_POSITIONS = (2048, 1024, 512, 256, 128, 64)  # of a tile of planes, whose samples fill up what is left of the largest
_LEAST_TILES = 4  # of a slice
_PROGRAMS = 4  # for each multiprocessor


def moments(x: Tensor, weights: Tensor | None, skip_nan: bool) -> tuple[Tensor, ...]:
    """The operator for (N, C) and (N, C, L) whose features or positions lie side by side.

    Anything else is the reference's.
    """
    from batchnorm.moments.operator import Sums, reference

    samples, features = x.shape[:2]
    positions = x[0, 0].numel()
    if x.ndim == 3 and positions == 1:
        x = x[:, :, 0]
    if x.ndim == 2:
        rows, stride = x.stride(1) == 1, x.stride(0)
    else:
        # Channels-last images are a table of positions, where nothing lies between the samples.
        rows = x.stride(1) == 1 and x.stride(0) == positions * x.stride(2)
        stride = x.stride(2) if rows else x.stride(0)
    if not rows and (x.ndim == 2 or x.stride(2) != 1):
        return reference(x, weights, skip_nan)
    if rows:
        a, b = _ROWS, _FEATURES
        units, tiles = -(-features // b), -(-samples * positions // a)
    else:
        b = min(_POSITIONS, key=lambda length: (-(-positions // length) * length, -length))  # the least waste
        a = max(1, min(_POSITIONS[0] // b, 1 << (samples - 1).bit_length()))
        units, tiles = features, -(-samples // a) * -(-positions // b)
    splits = max(1, min(-(-_multiprocessors(x.device) * _PROGRAMS // units), tiles // _LEAST_TILES))
    partial = x.new_empty(6, splits, features, dtype=torch.float64)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        sums[(units, splits)](
            x,
            None if weights is None else weights.contiguous(),
            partial,
            samples,
            positions,
            stride,
            0 if rows else x.stride(1),
            splits,
            features,
            ROWS=rows,
            WEIGHTED=weights is not None,
            SKIP_NAN=skip_nan,
            A=a,
            B=b,
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
