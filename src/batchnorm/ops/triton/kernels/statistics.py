"""Count, mean and m2 of channels: about an origin in float32, merged in float64.

A few tiles are summed value by value about an origin near the mean, so that no digit of a large mean is lost; their
sums become a count, a mean and an m2, which Chan's formulas add to what is known in float64; and the mean so far is
the next origin. Every order of additions is fixed by the launch, and so is every bit of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.ops.triton.kernels.tiles import (
    counted,
    existing,
    fold,
    locate,
    narrowed,
    read,
    real_among,
    spread,
    widened,
)


@triton.jit
def near(value):
    """An origin for sums, in float32: 0 where the value is infinite or NaN, so that others' deviations stay numbers."""
    value = value.to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def reciprocal(number):
    """1 / number, and 1 where there is none: a division of float64 is a long way, and a channel needs several."""
    return 1.0 / tl.where(number > 0, number, 1.0)


@triton.jit
def summed(
    x, mask, begin, end, origin, tile, first, last, channels, positions,
    ROWS: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of tiles [begin, end): the count, and sum and sum of squares about ``origin``, each (W,) in float64."""
    number = tl.zeros((1,), tl.int32)  # one for all channels: a mask is over positions
    total = tl.zeros((A, B), tl.float32)
    squares = tl.zeros((A, B), tl.float32)
    about = spread(origin, ROWS)
    for t in tl.range(begin, end, num_stages=STAGES):
        offset, place, exists = locate(t, tile, first, last, channels, positions, ROWS, A, B, 1)
        deviation = read(x, offset, exists, WHOLE, False) - about
        if MASKED:
            real = real_among(mask, place, exists, MASKED)
            deviation = tl.where(real, deviation, 0.0)
            number += counted(mask, t, tile, first, last, channels, positions, ROWS, A, B)
        else:
            if not WHOLE:
                deviation = tl.where(exists, deviation, 0.0)
            number += existing(t, first, last, positions, ROWS, A, B)
        total += deviation
        squares += deviation * deviation
    return number.to(tl.float64), fold(total, ROWS).to(tl.float64), fold(squares, ROWS).to(tl.float64)


@triton.jit
def slice_moments(
    x, mask, begin, end, tile, first, last, channels, positions,
    ROWS: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of tiles [begin, end) of a unit: the count (1,), mean and m2 (W,), in float64; 0 where nothing is real."""
    W: tl.constexpr = B if ROWS else 1
    n = tl.zeros((1,), tl.float64)
    total = tl.zeros((W,), tl.float64)
    m2 = tl.zeros((W,), tl.float64)
    # The mean of the first tile to begin with. It is read again below, from the cache.
    k, s, _ = summed(
        x, mask, begin, tl.minimum(begin + 1, end), tl.zeros((W,), tl.float32), tile, first, last, channels, positions,
        ROWS, WHOLE, MASKED, A, B, STAGES,
    )  # fmt: skip
    origin = near(s * reciprocal(k))
    for group in range(begin, end, GROUP):
        k, s, q = summed(
            x, mask, group, tl.minimum(group + GROUP, end), origin, tile, first, last, channels, positions,
            ROWS, WHOLE, MASKED, A, B, STAGES,
        )  # fmt: skip
        own_mean = s * reciprocal(k)
        own = q - own_mean * s
        own_mean += origin.to(tl.float64)
        own = tl.where(own < 0, 0.0, own)  # by rounding, never by more; a NaN stays
        together = n + k
        delta = own_mean - total * reciprocal(n)
        m2 += own + delta * delta * (n * k * reciprocal(together))
        total += k * own_mean  # and not mean + delta k / n, which makes NaN of an infinite mean
        n = together
        origin = near(total * reciprocal(n))
    return n, total * reciprocal(n), m2


@triton.jit
def pooled(partial, unit, units, splits, W: tl.constexpr, CHUNK: tl.constexpr):
    """Count, mean and m2 of a unit from those of its slices, which :func:`publish` left; in their order."""
    w = tl.arange(0, W)[None, :]
    stride = (units * splits).to(tl.int64) * W
    base = tl.cast(unit, tl.int64) * splits
    n = tl.zeros((1,), tl.float64)
    s = tl.zeros((W,), tl.float64)
    q = tl.zeros((W,), tl.float64)
    # Past the first-level cache, which may hold what stood there before another processor wrote.
    origin = tl.load(partial + stride + base * W + tl.arange(0, W), cache_modifier=".cg")
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    for begin in range(0, splits, CHUNK):
        i = begin + tl.arange(0, CHUNK)[:, None]
        at = partial + (base + i) * W + w
        there = (i < splits) & (w < W)
        k = tl.load(partial + (base + i) * W, mask=i < splits, other=0.0, cache_modifier=".cg")  # one for all channels
        mean = tl.load(at + stride, mask=there, other=0.0, cache_modifier=".cg")
        m2 = tl.load(at + 2 * stride, mask=there, other=0.0, cache_modifier=".cg")
        deviation = tl.where(k > 0, mean - origin[None, :], 0.0)
        n += tl.sum(k, axis=0)
        s += tl.sum(k * deviation, axis=0)
        q += tl.sum(m2 + k * deviation * deviation, axis=0)
    deviation = s * reciprocal(n)
    m2 = q - deviation * s
    return n, tl.where(n > 0, origin + deviation, 0.0), tl.where(m2 < 0, 0.0, m2)


@triton.jit
def publish(partial, unit, units, split, splits, first, second, third, THREE: tl.constexpr, W: tl.constexpr):
    """Leave a slice's two or three vectors where whoever comes last finds those of all slices."""
    stride = (units * splits).to(tl.int64) * W
    at = partial + (tl.cast(unit, tl.int64) * splits + split) * W + tl.arange(0, W)
    tl.store(at, tl.broadcast_to(first, (W,)))
    tl.store(at + stride, second)
    if THREE:
        tl.store(at + 2 * stride, third)


@triton.jit
def arrive(arrivals, unit):
    """Say that this program's part of a unit is published; how many had said so before.

    The order is a release and an acquire over the whole device: what each program stored before it said so can be read
    by the one that came last.
    """
    tl.debug_barrier()  # all threads of this program have stored
    return tl.atomic_add(arrivals + unit, 1, sem="acq_rel", scope="gpu")


@triton.jit
def announce(arrivals, unit):
    """Say that the unit's result stands in memory: one arrival more than there are programs."""
    tl.debug_barrier()
    tl.atomic_add(arrivals + unit, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(arrivals, unit, splits):
    """Until the unit's result has been announced. All programs must be resident: a cooperative launch sees to it."""
    while tl.atomic_add(arrivals + unit, 0, sem="acquire", scope="gpu") <= splits:
        pass
    tl.debug_barrier()


@triton.jit
def move_running(running_mean, running_var, c, exists, mean, var, count, step, ddof):
    """running = (1 - step) running + step batch, where the batch tells; var with Bessel's correction."""
    moves = exists & (step != 0)
    known = moves & (count > 0)
    at = running_mean + c
    kept = widened(tl.load(at, mask=known, other=0.0))
    tl.store(at, narrowed((1 - step) * kept + step * mean, at.dtype.element_ty), mask=known)
    known = moves & (count > ddof)
    at = running_var + c
    kept = widened(tl.load(at, mask=known, other=0.0))
    unbiased = var * (count / tl.where(count > ddof, count - ddof, 1.0))
    tl.store(at, narrowed((1 - step) * kept + step * unbiased, at.dtype.element_ty), mask=known)
