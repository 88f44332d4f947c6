"""The forward pass: statistics, normalization, or both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.ops.triton.kernels.activations import activate
from batchnorm.ops.triton.kernels.statistics import (
    announce,
    arrive,
    move_running,
    pooled,
    publish,
    reciprocal,
    slice_moments,
    wait,
)
from batchnorm.ops.triton.kernels.tiles import (
    channels_of,
    locate,
    pack,
    read,
    real_among,
    samples_of,
    spread,
    tiles_of,
    widened,
    write,
)


@triton.jit
def coefficients(mean, invstd, weight, bias, c, exists):
    """center, scale and shift of z = (x - center) * scale + shift, (W,) in float32.

    The mean is split: x - center is exact near the mean, where a mean rounded to float32 would cost digits, and the
    rest of the mean goes into shift.
    """
    slope = invstd
    if weight is not None:
        slope = invstd * widened(tl.load(weight + c, mask=exists, other=0.0))
    center = mean.to(tl.float32)
    shift = (center.to(tl.float64) - mean) * slope
    if bias is not None:
        shift += widened(tl.load(bias + c, mask=exists, other=0.0))
    return center, slope.to(tl.float32), shift.to(tl.float32)


@triton.jit
def normalize_tile(
    x, residual, mask, y, sign, center, scale, shift, t, tile, first, last, channels, positions,
    ROWS: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """y, and the signs of z where they are asked for, of one tile."""
    offset, place, exists = locate(t, tile, first, last, channels, positions, ROWS, A, B, 1)
    value = read(x, offset, exists, WHOLE, True)
    # One fused multiply-add, asked for by name: the backward recomputes z, and both must be on the same side of a kink.
    z = tl.fma(value - spread(center, ROWS), tl.broadcast_to(spread(scale, ROWS), (A, B)),
               tl.broadcast_to(spread(shift, ROWS), (A, B)))  # fmt: skip
    if residual is not None:
        z += read(residual, offset, exists, WHOLE, True)
    if sign is not None:
        byte, _, there = locate(t, tile, first, last, channels, positions, ROWS, A, B, 8)
        above = (z > 0) | (z != z)
        if not WHOLE:
            above = above & exists
        tl.store(sign + byte, pack(above, A, B), mask=there)
    out = activate(z, ACTIVATION, SLOPE)
    if MASKED:
        out = tl.where(real_among(mask, place, exists, MASKED), out, 0.0)
    write(y, offset, out, exists, WHOLE)


@triton.jit
def finish_statistics(
    n, mean, m2, c, exists, ghost, stride, mean_out, var_out, invstd_out, m2_out, count_out, running_mean, running_var,
    num_batches, eps, momentum, ddof,
):  # fmt: skip
    """Write what is known of a unit's channels, and move the running averages."""
    at = ghost.to(tl.int64) * stride + c
    var = m2 * reciprocal(n)
    tl.store(mean_out + at, mean, mask=exists)
    tl.store(count_out + ghost.to(tl.int64) * stride + c * 0, tl.broadcast_to(n, c.shape), mask=exists & (c == 0))
    if m2_out is not None:
        tl.store(m2_out + at, m2, mask=exists)
    if var_out is not None:
        tl.store(var_out + at, var, mask=exists)
    if invstd_out is not None:
        tl.store(invstd_out + at, 1.0 / tl.sqrt(var + eps), mask=exists)
    if running_mean is not None:
        step = tl.zeros((1,), tl.float64) + momentum
        if num_batches is not None:
            step = 1.0 / tl.load(num_batches).to(tl.float64)
        move_running(running_mean, running_var, c, exists, mean, var, n, step, ddof)


@triton.jit
def forward(
    x, residual, mask, weight, bias, y, sign, mean_out, var_out, invstd_out, m2_out, count_out, partial, arrivals,
    running_mean, running_var, num_batches, samples, other, run_units, size, ghosts, stride, lanes, splits, ddof,
    eps: tl.float64, momentum: tl.float64,
    ROWS: tl.constexpr, VEC: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    STATISTICS: tl.constexpr, APPLY: tl.constexpr, SPLIT: tl.constexpr, FROM_VAR: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics (STATISTICS) and normalization (APPLY) of units: the channels of a tile in one ghost.

    ``lanes`` units are under way at a time, each by ``splits`` programs that share its tiles (SPLIT: more than one).
    With both phases the programs of a unit wait for each other in between, and then read again what they read last
    first: a cache that holds the units under way gives it to them. With APPLY alone, mean and invstd are given
    (FROM_VAR: mean and var). The length of a run is run_units * VEC, so that the compiler sees how runs are aligned.
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
    if not STATISTICS:
        program = tl.num_programs(0) - 1 - program  # what was written or read last before is what the cache still holds
    split = program % splits
    for unit in range(program // splits, units, lanes):
        ghost = unit // tiles
        tile = unit % tiles
        first, last = samples_of(ghost, size, ghosts, samples)
        number = tiles_of(first, last, positions, ROWS, A, B)
        begin = (number * split // splits).to(tl.int32)
        end = (number * (split + 1) // splits).to(tl.int32)
        c, exists = channels_of(tile, channels, W)
        if STATISTICS:
            n, mean, m2 = slice_moments(
                x, mask, begin, end, tile, first, last, channels, positions, ROWS, WHOLE, MASKED, A, B, GROUP, STAGES
            )
            if SPLIT:
                publish(partial, unit, units, split, splits, n, mean, m2, True, W)
                if arrive(arrivals, unit) == splits - 1:
                    n_all, mean_all, m2_all = pooled(partial, unit, units, splits, W, CHUNK)
                    finish_statistics(
                        n_all, mean_all, m2_all, c, exists, ghost, stride, mean_out, var_out, invstd_out, m2_out,
                        count_out, running_mean, running_var, num_batches, eps, momentum, ddof,
                    )  # fmt: skip
                    if APPLY:
                        announce(arrivals, unit)
                if APPLY:
                    wait(arrivals, unit, splits)
            else:
                finish_statistics(
                    n, mean, m2, c, exists, ghost, stride, mean_out, var_out, invstd_out, m2_out, count_out,
                    running_mean, running_var, num_batches, eps, momentum, ddof,
                )  # fmt: skip
        if APPLY:
            at = ghost.to(tl.int64) * stride + c
            if STATISTICS and not SPLIT:
                # Of one program alone: known already.
                invstd = 1.0 / tl.sqrt(m2 * reciprocal(n) + eps)
            else:
                mean = widened(tl.load(mean_out + at, mask=exists, other=0.0, cache_modifier=".cg"))
                if FROM_VAR:
                    var = widened(tl.load(var_out + at, mask=exists, other=0.0))
                    invstd = 1.0 / tl.sqrt(var + eps)
                else:
                    invstd = tl.load(invstd_out + at, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float64)
            center, scale, shift = coefficients(mean, invstd, weight, bias, c, exists)
            for back in tl.range(0, end - begin, num_stages=STAGES):
                normalize_tile(
                    x, residual, mask, y, sign, center, scale, shift, end - 1 - back, tile, first, last, channels,
                    positions, ROWS, WHOLE, MASKED, ACTIVATION, SLOPE, A, B,
                )  # fmt: skip
