"""The kernel of :mod:`batchnorm.moments.cuda`. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums(
    x, weights, partial, rows, stride, splits, features,
    WEIGHTED: tl.constexpr, SKIP_NAN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Of a slice of the rows and B features: count, sum and sum of squares about an origin, the origin, the extremes.

    ``partial`` is (6, splits, features). All in float64. The origin is the mean of the slice's first tile: a deviation
    from it is exact for data that are large beside their spread.
    """
    split = tl.program_id(1)
    c = tl.program_id(0) * B + tl.arange(0, B)
    begin = rows.to(tl.int64) * split // splits
    end = rows.to(tl.int64) * (split + 1) // splits
    value, weight = tile(x, weights, begin, end, stride, c, features, WEIGHTED, SKIP_NAN, A)
    n = tl.sum(weight, axis=0)
    origin = tl.sum(value * weight, axis=0) / tl.where(n > 0, n, 1.0)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    count = tl.zeros((A, B), tl.float64)
    total = tl.zeros((A, B), tl.float64)
    squares = tl.zeros((A, B), tl.float64)
    low = tl.full((A, B), float("inf"), tl.float64)
    high = tl.full((A, B), float("-inf"), tl.float64)
    for first in range(begin, end, A):
        value, weight = tile(x, weights, first, end, stride, c, features, WEIGHTED, SKIP_NAN, A)
        there = weight > 0
        deviation = tl.where(there, value - origin[None, :], 0.0)
        count += weight
        total += deviation * weight
        squares += deviation * weight * deviation
        known = there & (value == value)
        low = tl.where(known & (value < low), value, low)
        high = tl.where(known & (value > high), value, high)
    at = partial + split.to(tl.int64) * features + c
    step = splits.to(tl.int64) * features
    tl.store(at, tl.sum(count, axis=0), mask=c < features)
    tl.store(at + step, tl.sum(total, axis=0), mask=c < features)
    tl.store(at + 2 * step, tl.sum(squares, axis=0), mask=c < features)
    tl.store(at + 3 * step, origin, mask=c < features)
    tl.store(at + 4 * step, tl.min(low, axis=0), mask=c < features)
    tl.store(at + 5 * step, tl.max(high, axis=0), mask=c < features)


@triton.jit
def tile(
    x, weights, first, end, stride, c, features, WEIGHTED: tl.constexpr, SKIP_NAN: tl.constexpr, A: tl.constexpr
):  # fmt: skip
    """Values, 0 where nothing counts, and their weights."""
    row = tl.cast(first, tl.int64) + tl.arange(0, A)
    exists = (row < end)[:, None] & (c < features)[None, :]
    value = tl.load(x + row[:, None] * stride + c[None, :], mask=exists, other=0.0).to(tl.float64)
    weight = exists.to(tl.float64)
    if WEIGHTED:
        weight = weight * tl.load(weights + row, mask=row < end, other=0.0)[:, None]
    if SKIP_NAN:
        weight = tl.where(value == value, weight, 0.0)
    return tl.where(weight > 0, value, 0.0), weight
