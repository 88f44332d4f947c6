"""The numbers of one tensor, a channel at a time: moments of all its values, percentiles of a bounded sample of them.

Everything ends on the CPU as float64 arrays. What is small enough is computed there with NumPy, whose calls on a few
thousand values cost a fraction of torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.moments.operator import compute, pieces
from batchnorm.ops.jagged import Packed

Array = NDArray[Any]
Indices = NDArray[np.int64]

SAMPLE = 1024
"""Percentiles and flat ends are read from at most so many values a channel."""

# Float64 values that are handled at a time: larger temporaries are fetched from the system, and returned, each time.
_BLOCK = 12288

LEVELS = (0.5, *(float(level) for level in range(5, 100, 5)), 99.5)
"""The percentiles of a record, in per cent."""

_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)


@dataclass(eq=False)
class Taken:
    """What is taken of a tensor while a pass is under way: as little as possible, to be settled afterwards.

    Attributes:
        count: values a channel.
        channels: how many channels the tensor has.
        step: one channel in so many is looked at, from the first on.
        moments: mean and biased std of each unit, (units,); NaN where there is no value, or one is not finite.
        sample: at most :data:`SAMPLE` values of each unit, (values, units); None where none was asked for.
        high: the greatest value of each unit, where it had to be found before there was a sample.
    """

    count: int
    channels: int
    step: int
    moments: tuple[Array, Array] | None = None
    sample: Array | None = None
    high: Array | None = None


def spacing(channels: int, limit: int | None) -> int:
    """The step with which no more than ``limit`` of the channels are looked at."""
    return 1 if limit is None or channels <= limit else -(-channels // limit)


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """Where the channels of an input or output of ``module`` are: last for linear layers and their like, else 1."""
    if x.dim() == 2 or isinstance(module, _CHANNELS_LAST):
        return -1
    if isinstance(module, nn.modules.conv._ConvNd):
        return x.dim() - len(module.kernel_size) - 1  # 0 without a batch
    normalized = getattr(module, "normalized_shape", None)
    if isinstance(normalized, tuple) and normalized and normalized[-1] == x.shape[-1]:
        return -1
    return 1 if x.dim() > 2 else -1


def laid_out(x: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """``x`` as (positions, C) or (N, C, positions), without a copy where its memory allows.

    A nested tensor becomes its values. ``mask`` is True where a position, (N, *spatial), counts.
    """
    x = x.detach()
    if x.is_nested:
        packed = Packed(x, by_row=False)
        x, axis, mask = packed.x, 1, packed.mask
    dims = x.dim()
    if mask is not None:
        return x.movedim(axis, -1)[mask]
    if dims == 2:
        return x
    if dims == 1:
        return x.unsqueeze(0)
    if not x.numel():
        return x.new_empty(0, x.shape[axis])
    if axis in (-1, dims - 1):
        return x.reshape(-1, x.shape[-1])
    return x.movedim(axis, 1).flatten(2)


def take(x: Tensor, axis: int, limit: int | None, mask: Tensor | None = None, sampled: bool = True) -> Taken:
    """What is needed of ``x`` at no more than ``limit`` channels. Uses no random numbers; gradients don't flow.

    Args:
        sampled: with False, no sample of a tensor that is larger than one.
    """
    values = laid_out(x, axis, mask)
    if values.device.type == "mps":
        values = values.cpu()  # there is no float64 there
    channels = values.shape[1]
    count = values.numel() // channels if channels else 0
    taken = Taken(count, channels, spacing(channels, limit))
    if count <= SAMPLE:
        rows = values if values.dim() == 2 else values.movedim(1, -1).reshape(-1, channels)
        taken.sample = every(rows, taken.step)
    else:
        _take_moments(taken, values)
        if sampled:
            taken.sample = _sample(values, taken.step)
    return taken


def add_sample(taken: Taken, x: Tensor, axis: int, mask: Tensor | None) -> None:
    """The sample of ``x`` that :func:`take` was told to leave out."""
    if taken.sample is None:
        taken.sample = _sample(laid_out(x, axis, mask), taken.step)


def every(x: Tensor, step: int) -> Any:
    """A copy of every ``step``-th of the last dimension: an array, or on a device, where that would wait, a tensor."""
    x = x.detach()
    if not x.is_cpu:
        return x[..., ::step].clone()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()[..., ::step].copy()


def settle(taken: Sequence[Taken]) -> None:
    """Bring all to the CPU and compute the moments that are missing: those of one shape together, in few calls."""
    groups: dict[tuple[int, ...], list[Taken]] = {}
    for each in taken:
        if each.moments is not None:
            mean, std = each.moments
            each.moments = as_array(mean), as_array(std)
            each.high = as_array(each.high)
        if each.sample is not None:
            each.sample = as_array(each.sample)
            if each.moments is None:
                groups.setdefault(each.sample.shape, []).append(each)
    for (count, units), group in groups.items():
        if not count:
            nothing = np.full(units, np.nan)
            for each in group:
                each.moments = nothing, nothing
            continue
        share = np.full(count, 1.0 / count)
        together = max(1, _BLOCK // max(1, count * units))
        for start in range(0, len(group), together):
            block = group[start : start + together]
            # Side by side: long rows are what NumPy is quick with.
            values = np.concatenate([each.sample for each in block], axis=1, dtype=np.float64)  # type: ignore[misc]
            with np.errstate(all="ignore"):
                mean = share @ values
                values -= mean
                values *= values
                std = np.sqrt(share @ values)
            for place, each in enumerate(block):
                at = slice(place * units, (place + 1) * units)
                each.moments = mean[at].copy(), std[at].copy()


def as_array(values: Any) -> Array:
    """An array of what :func:`at_units` gave."""
    if isinstance(values, Tensor):
        return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    return values


def percentiles(samples: Sequence[Array]) -> list[Array]:
    """Of each sample, units x :data:`LEVELS`, interpolated linearly; NaN for a unit without finite values only."""
    found: list[Array] = [np.empty(0)] * len(samples)
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.shape, []).append(place)
    for (count, units), places in groups.items():
        if not count:
            for place in places:
                found[place] = np.full((units, len(LEVELS)), np.nan)
            continue
        together = max(1, _BLOCK // max(1, count * units))
        for start in range(0, len(places), together):
            block = places[start : start + together]
            # In rows. NaN comes last, and spoils its row as everything does that is not finite.
            ordered = np.sort(np.array([samples[place].T for place in block]), axis=2)
            with np.errstate(all="ignore"):
                levels = ordered.astype(np.float64) @ _weights(count)
            for place, of_units in zip(block, levels, strict=True):
                found[place] = of_units.copy()
    return found


def flat_share(sample: Array | None, ends: tuple[float, float]) -> float:
    """The share of values at or outside ``ends``, over all units; NaN without a value."""
    if sample is None or not sample.size:
        return math.nan
    return (np.count_nonzero(sample <= ends[0]) + np.count_nonzero(sample >= ends[1])) / sample.size


def _sample(values: Tensor, step: int) -> Any:
    """(SAMPLE, units) of more values than that."""
    count = values.numel() // values.shape[1]
    rows = torch.arange(SAMPLE, device=values.device) * _stride(count) % count
    values = values[:, ::step]
    if values.dim() == 2:
        return every(values[rows], 1)
    size = values.shape[2]
    return every(values[rows // size, :, rows % size], 1)


@lru_cache(maxsize=256)
def _stride(count: int) -> int:
    """A step of the golden section of ``count``, without a factor in common with it.

    Multiples of it, modulo ``count``, are spread over the whole batch; and over rows and columns of images, of which a
    stride with a common factor would take the same few in all.
    """
    stride = round(count * 0.6180339887)
    while math.gcd(stride, count) > 1:
        stride -= 1
    return stride


@lru_cache(maxsize=64)
def _weights(count: int) -> Array:
    """count x levels: what of ``count`` ordered values makes each level, two neighbours at most."""
    weights = np.zeros((count, len(LEVELS)))
    for column, level in enumerate(LEVELS):
        place = level / 100.0 * (count - 1)
        below = math.floor(place)
        weights[below, column] += 1.0 - (place - below)
        weights[min(below + 1, count - 1), column] += place - below
    return weights


def _take_moments(taken: Taken, values: Tensor) -> None:
    """Mean, std and the greatest value over all positions: one pass over the memory."""
    blocks = [compute(block, None, False) for block, _ in pieces(values, None, 1)]
    if len(blocks) == 1:
        _, mean, _, m2, _, high = blocks[0]
        std = (m2 / taken.count).sqrt_()
    else:
        moments = Moments(*blocks[0][:4])
        for block in blocks[1:]:
            moments = moments.merge(Moments(*block[:4]))
        mean, std = moments.mean, moments.std()
        high = torch.stack([block.high for block in blocks]).amax(0)
    taken.moments = every(mean, taken.step), every(std, taken.step)
    taken.high = every(high, taken.step)
