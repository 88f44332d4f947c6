"""The kernel of :mod:`batchnorm.moments.cuda`. Imports Triton.

A tile is A x B values: in *rows* (tables, channels-last images) A rows of B neighbouring features, in *planes*
(contiguous images) B positions of one feature in A samples.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums(
    x, weights, partial, samples, positions, stride, feature_stride, splits, features,
    ROWS: tl.constexpr, WEIGHTED: tl.constexpr, SKIP_NAN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Of a slice of the tiles of B features (rows) or of one (planes): sums about an origin, the origin, the extremes.

    ``partial`` is (6, splits, features): count, sum, sum of squares, origin, low, high; all in float64. The origin is
    the mean of the slice's first tile: a deviation from it is exact for data that are large beside their spread.
    ``stride`` is from row to row, or from sample to sample of planes, ``feature_stride`` from plane to plane.
    """
    W: tl.constexpr = B if ROWS else 1
    split = tl.program_id(1)
    c = tl.program_id(0) * W + tl.arange(0, W)
    if ROWS:
        number = (tl.cast(samples, tl.int64) * positions + (A - 1)) // A
    else:
        number = tl.cast((samples + (A - 1)) // A, tl.int64) * ((positions + (B - 1)) // B)
    begin = number * split // splits
    end = number * (split + 1) // splits
    value, weight = tile(
        x, weights, begin, samples, positions, stride, feature_stride, features, ROWS, WEIGHTED, SKIP_NAN, A, B
    )
    n = folded(weight, ROWS)
    origin = folded(value * weight, ROWS) / tl.where(n > 0, n, 1.0)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    about = origin[None, :] if ROWS else origin[:, None]
    count = tl.zeros((A, B), tl.float64)
    total = tl.zeros((A, B), tl.float64)
    squares = tl.zeros((A, B), tl.float64)
    low = tl.full((A, B), float("inf"), tl.float64)
    high = tl.full((A, B), float("-inf"), tl.float64)
    for t in range(begin, end):
        value, weight = tile(
            x, weights, t, samples, positions, stride, feature_stride, features, ROWS, WEIGHTED, SKIP_NAN, A, B
        )
        there = weight > 0
        deviation = tl.where(there, value - about, 0.0)
        count += weight
        total += deviation * weight
        squares += deviation * weight * deviation
        known = there & (value == value)
        low = tl.where(known & (value < low), value, low)
        high = tl.where(known & (value > high), value, high)
    at = partial + split.to(tl.int64) * features + c
    step = tl.cast(splits, tl.int64) * features
    exists = c < features
    tl.store(at, folded(count, ROWS), mask=exists)
    tl.store(at + step, folded(total, ROWS), mask=exists)
    tl.store(at + 2 * step, folded(squares, ROWS), mask=exists)
    tl.store(at + 3 * step, origin, mask=exists)
    if not ROWS:
        low = tl.min(low, axis=1, keep_dims=True)
        high = tl.max(high, axis=1, keep_dims=True)
    tl.store(at + 4 * step, tl.min(low, axis=0), mask=exists)
    tl.store(at + 5 * step, tl.max(high, axis=0), mask=exists)


@triton.jit
def tile(
    x, weights, t, samples, positions, stride, feature_stride, features,
    ROWS: tl.constexpr, WEIGHTED: tl.constexpr, SKIP_NAN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Values of tile ``t``, 0 where nothing counts, and their weights."""
    a = tl.arange(0, A).to(tl.int64)
    b = tl.arange(0, B)
    first = tl.program_id(0)
    t = tl.cast(t, tl.int64)
    if ROWS:
        row = t * A + a
        there = row < tl.cast(samples, tl.int64) * positions
        column = first * B + b
        exists = there[:, None] & (column < features)[None, :]
        offset = row[:, None] * stride + column[None, :]
    else:
        blocks = (positions + (B - 1)) // B
        sample = (t // blocks) * A + a
        there = sample < samples
        position = (t % blocks) * B + b
        exists = there[:, None] & (position < positions)[None, :]
        offset = sample[:, None] * stride + first.to(tl.int64) * feature_stride + position[None, :]
    value = tl.load(x + offset, mask=exists, other=0.0).to(tl.float64)
    weight = exists.to(tl.float64)
    if ROWS and WEIGHTED:  # tables only: a row is a sample
        weight = weight * tl.load(weights + row, mask=there, other=0.0)[:, None]
    if SKIP_NAN:
        weight = tl.where(value == value, weight, 0.0)
    return tl.where(weight > 0, value, 0.0), weight


@triton.jit
def folded(values, ROWS: tl.constexpr):
    """The sum of each feature of a tile."""
    return tl.sum(values, axis=0) if ROWS else tl.sum(tl.sum(values, axis=1, keep_dims=True), axis=0)
