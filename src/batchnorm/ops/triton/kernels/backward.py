"""The backward pass: the sums, the gradient of the input, or both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.ops.triton.kernels.activations import kinked, slope_times
from batchnorm.ops.triton.kernels.forward import coefficients
from batchnorm.ops.triton.kernels.statistics import announce, arrive, publish, wait
from batchnorm.ops.triton.kernels.tiles import (
    channels_of,
    fold,
    locate,
    narrowed,
    read,
    real_among,
    samples_of,
    spread,
    tiles_of,
    unpack,
    widened,
    write,
)


@triton.jit
def gradient_tile(
    grad, x, residual, sign, mask, center, scale, shift, t, tile, first, last, channels, positions,
    ROWS: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, LAST_USE: tl.constexpr,
):  # fmt: skip
    """dz and x - center of a tile, 0 where nothing is real; and where the tile is."""
    offset, place, exists = locate(t, tile, first, last, channels, positions, ROWS, A, B, 1)
    dz = read(grad, offset, exists, WHOLE, LAST_USE)
    centred = read(x, offset, exists, WHOLE, LAST_USE) - spread(center, ROWS)
    if sign is not None:
        byte, _, there = locate(t, tile, first, last, channels, positions, ROWS, A, B, 8)
        above = unpack(tl.load(sign + byte, mask=there, other=0), A, B)
        dz = kinked(dz, above == 0, ACTIVATION, SLOPE)
    elif ACTIVATION != "none":
        # The same instruction as in the forward, so that z is the same number.
        z = tl.fma(centred, tl.broadcast_to(spread(scale, ROWS), (A, B)),
                   tl.broadcast_to(spread(shift, ROWS), (A, B)))  # fmt: skip
        if residual is not None:
            z += read(residual, offset, exists, WHOLE, LAST_USE)
        dz = slope_times(dz, z, ACTIVATION, SLOPE)
    if MASKED or not WHOLE:
        # Zeros were read there, but zero times an infinite center is none.
        real = real_among(mask, place, exists, MASKED)
        dz = tl.where(real, dz, 0.0)
        centred = tl.where(real, centred, 0.0)
    return dz, centred, offset, place, exists


@triton.jit
def slice_sums(
    grad, x, residual, sign, mask, center, scale, shift, begin, end, tile, first, last, channels, positions,
    ROWS: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum dz and sum dz (x - center) of tiles [begin, end) of a unit, (W,) in float64; a few tiles each in float32."""
    W: tl.constexpr = B if ROWS else 1
    sum_dz = tl.zeros((W,), tl.float64)
    sum_product = tl.zeros((W,), tl.float64)
    for group in range(begin, end, GROUP):
        some_dz = tl.zeros((A, B), tl.float32)
        some_product = tl.zeros((A, B), tl.float32)
        for t in tl.range(group, tl.minimum(group + GROUP, end), num_stages=STAGES):
            dz, centred, _, _, _ = gradient_tile(
                grad, x, residual, sign, mask, center, scale, shift, t, tile, first, last, channels, positions,
                ROWS, WHOLE, MASKED, ACTIVATION, SLOPE, A, B, False,
            )  # fmt: skip
            some_dz += dz
            some_product += dz * centred
        sum_dz += fold(some_dz, ROWS).to(tl.float64)
        sum_product += fold(some_product, ROWS).to(tl.float64)
    return sum_dz, sum_product


@triton.jit
def totals(partial, unit, units, splits, W: tl.constexpr, CHUNK: tl.constexpr):
    """The two sums of a unit from those of its slices, in their order."""
    w = tl.arange(0, W)[None, :]
    stride = (units * splits).to(tl.int64) * W
    base = tl.cast(unit, tl.int64) * splits
    sum_dz = tl.zeros((W,), tl.float64)
    sum_product = tl.zeros((W,), tl.float64)
    for begin in range(0, splits, CHUNK):
        i = begin + tl.arange(0, CHUNK)[:, None]
        at = partial + (base + i) * W + w
        there = (i < splits) & (w < W)
        sum_dz += tl.sum(tl.load(at, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
        sum_product += tl.sum(tl.load(at + stride, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    return sum_dz, sum_product


@triton.jit
def finish_sums(sum_dz, sum_product, mean, invstd, center, c, exists, at, dz_out, dz_xhat_out, dweight, dbias):
    """Write sum dz and sum dz x_hat, and what of them the parameters get; returns them."""
    sum_dz_xhat = (sum_product - (mean - center.to(tl.float64)) * sum_dz) * invstd
    tl.store(dz_out + at, sum_dz, mask=exists)
    tl.store(dz_xhat_out + at, sum_dz_xhat, mask=exists)
    if dweight is not None:
        tl.store(dweight + c, narrowed(sum_dz_xhat, dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + c, narrowed(sum_dz, dbias.dtype.element_ty), mask=exists)
    return sum_dz_xhat


@triton.jit
def backward(
    grad, x, residual, sign, mask, weight, bias, mean_in, invstd_in, count_in, dx, dresidual, dz_out, dz_xhat_out,
    dweight, dbias, partial, arrivals, samples, other, run_units, size, ghosts, stride, lanes, splits,
    ROWS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    SUMS: tl.constexpr, APPLY: tl.constexpr, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums (SUMS) and the gradient of the input (APPLY) of units; as the forward in everything else.

    dx = scale (dz - sum_dz / n - x_hat sum_dz_xhat / n) = dz a - b - (x - center) d
    """
    W: tl.constexpr = B if ROWS else 1
    if ROWS:
        channels = run_units * VEC
        positions = other
    else:
        channels = other
        positions = run_units * VEC
    tiles = (channels + (W - 1)) // W
    units = tiles * ghosts
    program = tl.program_id(0)
    if not SUMS:
        program = tl.num_programs(0) - 1 - program
    split = program % splits
    for unit in range(program // splits, units, lanes):
        ghost = unit // tiles
        tile = unit % tiles
        first, last = samples_of(ghost, size, ghosts, samples)
        number = tiles_of(first, last, positions, ROWS, A, B)
        begin = (number * split // splits).to(tl.int32)
        end = (number * (split + 1) // splits).to(tl.int32)
        c, exists = channels_of(tile, channels, W)
        at = ghost.to(tl.int64) * stride + c
        mean = tl.load(mean_in + at, mask=exists, other=0.0).to(tl.float64)
        invstd = tl.load(invstd_in + at, mask=exists, other=0.0).to(tl.float64)
        center, scale, shift = coefficients(mean, invstd, weight, bias, c, exists)
        sum_at = ghost.to(tl.int64) * channels + c
        if SUMS:
            # mean and invstd are read once more afterwards: held meanwhile, they would cost registers in the loop.
            sum_dz, sum_product = slice_sums(
                grad, x, residual, sign, mask, center, scale, shift, begin, end, tile, first, last, channels, positions,
                ROWS, WHOLE, MASKED, ACTIVATION, SLOPE, A, B, GROUP, STAGES,
            )  # fmt: skip
            if SPLIT:
                publish(partial, unit, units, split, splits, sum_dz, sum_product, sum_dz, False, W)
            tl.debug_barrier()
            mean = tl.load(mean_in + at, mask=exists, other=0.0).to(tl.float64)
            invstd = tl.load(invstd_in + at, mask=exists, other=0.0).to(tl.float64)
            if SPLIT:
                if arrive(arrivals, unit) == splits - 1:
                    all_dz, all_product = totals(partial, unit, units, splits, W, CHUNK)
                    finish_sums(
                        all_dz,
                        all_product,
                        mean,
                        invstd,
                        center,
                        c,
                        exists,
                        sum_at,
                        dz_out,
                        dz_xhat_out,
                        dweight,
                        dbias,
                    )
                    if APPLY:
                        announce(arrivals, unit)
                if APPLY:
                    wait(arrivals, unit, splits)
            else:
                sum_dz_xhat = finish_sums(
                    sum_dz, sum_product, mean, invstd, center, c, exists, sum_at, dz_out, dz_xhat_out, dweight, dbias
                )
        if APPLY:
            if SPLIT or not SUMS:
                sum_dz = tl.load(dz_out + sum_at, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float64)
                sum_dz_xhat = tl.load(dz_xhat_out + sum_at, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float64)
            count = tl.load(count_in + ghost.to(tl.int64) * stride).to(tl.float64)
            share = 1.0 / tl.where(count > 1, count, 1.0)
            a = invstd
            if weight is not None:
                a = invstd * widened(tl.load(weight + c, mask=exists, other=0.0))
            d = a * invstd * sum_dz_xhat * share
            b = a * sum_dz * share - (mean - center.to(tl.float64)) * d
            times, minus, per_deviation = a.to(tl.float32), b.to(tl.float32), d.to(tl.float32)
            for back in tl.range(0, end - begin, num_stages=STAGES):
                dz, centred, offset, place, exists_here = gradient_tile(
                    grad, x, residual, sign, mask, center, scale, shift, end - 1 - back, tile, first, last, channels,
                    positions, ROWS, WHOLE, MASKED, ACTIVATION, SLOPE, A, B, True,
                )  # fmt: skip
                if dresidual is not None:
                    write(dresidual, offset, dz, exists_here, WHOLE)
                out = dz * spread(times, ROWS) - spread(minus, ROWS) - centred * spread(per_deviation, ROWS)
                if MASKED:
                    out = tl.where(real_among(mask, place, exists_here, MASKED), out, 0.0)
                write(dx, offset, out, exists_here, WHOLE)
