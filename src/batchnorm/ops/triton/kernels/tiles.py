"""Tiles: how the values of a few channels lie in memory, how a tile of them is read, folded and spread again.

A tile is A x B values. In *rows* memory ((N, C) and channels-last) it is A positions of B neighbouring channels; in
*planes* memory (contiguous) it is B positions of one channel in A samples. What belongs to a channel is a vector of W
values: B of them in rows, one in planes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channels_of(tile, channels, W: tl.constexpr):
    """The channels of a tile, (W,), and which of them exist."""
    c = tile * W + tl.arange(0, W)
    return c, c < channels


@triton.jit
def tiles_of(first, last, positions, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """How many tiles the samples [first, last) of a unit make."""
    if ROWS:
        number = ((last - first) * positions + (A - 1)) // A
    else:
        number = ((last - first + (A - 1)) // A) * ((positions + (B - 1)) // B)
    return number


@triton.jit
def samples_of(ghost, size, ghosts, samples):
    """The samples [first, last) of a ghost: ``size`` each, the last with what is left. 64 bits, as all offsets."""
    first = ghost.to(tl.int64) * size
    last = tl.where(ghost == ghosts - 1, samples + first * 0, first + size)
    return first, last


@triton.jit
def locate(
    t, tile, first, last, channels, positions, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, P: tl.constexpr
):
    """Where tile ``t`` is: offsets of its values (A, B), of their positions in a mask, and which values exist.

    P is the number of values a byte stands for: 1 for the values themselves, 8 for the bytes of ``sign``, whose runs
    each begin a new byte.
    """
    a = tl.arange(0, A).to(tl.int64)[:, None]
    b = tl.arange(0, B // P)[None, :]
    t = tl.cast(t, tl.int64)
    if ROWS:
        row = first * positions + t * A + a
        run = (channels + (P - 1)) // P
        column = tile * (B // P) + b
        offset = row * run + column
        place = row
        exists = (row < last * positions) & (column < run)
    else:
        blocks = (positions + (B - 1)) // B
        sample = first + (t // blocks) * A + a
        run = (positions + (P - 1)) // P
        column = (t % blocks) * (B // P) + b
        offset = (sample * channels + tile) * run + column
        place = sample * run + column
        exists = (sample < last) & (column < run)
    return offset, place, exists


@triton.jit
def existing(t, first, last, positions, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """How many values of a channel tile ``t`` has."""
    t = tl.cast(t, tl.int64)
    if ROWS:
        number = inside(last * positions - (first * positions + t * A), A)
    else:
        blocks = (positions + (B - 1)) // B
        number = inside(last - (first + (t // blocks) * A), A) * inside(positions - (t % blocks) * B, B)
    return number.to(tl.int32)


@triton.jit
def counted(
    mask, t, tile, first, last, channels, positions, ROWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """How many real values of a channel tile ``t`` has; (1,), as every channel has as many."""
    if ROWS:
        row = first * positions + tl.cast(t, tl.int64) * A + tl.arange(0, A)
        number = tl.sum((tl.load(mask + row, mask=row < last * positions, other=0) != 0).to(tl.int32), axis=0)
    else:
        _, place, exists = locate(t, tile, first, last, channels, positions, ROWS, A, B, 1)
        number = tl.sum(tl.sum(real_among(mask, place, exists, True).to(tl.int32), axis=1), axis=0)
    return number


@triton.jit
def inside(left, limit: tl.constexpr):
    """``left``, from 0 to ``limit``."""
    return tl.where(left < 0, 0, tl.where(left > limit, limit, left))


@triton.jit
def read(source, offset, exists, WHOLE: tl.constexpr, LAST_USE: tl.constexpr):
    """A tile in float32, 0 where nothing exists. LAST_USE: the cache need not keep it."""
    policy: tl.constexpr = "evict_first" if LAST_USE else ""
    if WHOLE:
        value = tl.load(source + offset, eviction_policy=policy)
    else:
        value = tl.load(source + offset, mask=exists, other=0.0, eviction_policy=policy)
    return value.to(tl.float32)


@triton.jit
def write(target, offset, value, exists, WHOLE: tl.constexpr):
    """A float32 tile, rounded to the type of the data."""
    value = value.to(target.dtype.element_ty)
    if WHOLE:
        tl.store(target + offset, value)
    else:
        tl.store(target + offset, value, mask=exists)


@triton.jit
def widened(value):
    """A vector in float64, from whatever type it is kept in; 16-bit types by way of float32."""
    if value.dtype != tl.float64:
        value = value.to(tl.float32).to(tl.float64)
    return value


@triton.jit
def narrowed(value, TYPE: tl.constexpr):
    """A float64 vector in another type; 16-bit types by way of float32."""
    if tl.float64 != TYPE:
        value = value.to(tl.float32).to(TYPE)
    return value


@triton.jit
def real_among(mask, place, exists, MASKED: tl.constexpr):
    """Which values are real: they exist, and the mask says so."""
    if MASKED:
        exists = exists & (tl.load(mask + place, mask=exists, other=0) != 0)
    return exists


@triton.jit
def fold(tile, ROWS: tl.constexpr):
    """The sum of each channel of a tile, (W,). The order of its additions depends on the launch alone."""
    return tl.sum(tile, axis=0) if ROWS else tl.sum(tl.sum(tile, axis=1, keep_dims=True), axis=0)


@triton.jit
def spread(channel, ROWS: tl.constexpr):
    """(W,) so that it broadcasts over a tile."""
    return channel[None, :] if ROWS else channel[:, None]


@triton.jit
def pack(bits, A: tl.constexpr, B: tl.constexpr):
    """Eight booleans a byte, from the lowest bit: (A, B) to (A, B / 8)."""
    eights = tl.reshape(bits.to(tl.int32), (A, B // 8, 8))
    place = tl.arange(0, 8)[None, None, :]
    return tl.sum(eights << place, axis=2).to(tl.uint8)


@triton.jit
def unpack(bytes_, A: tl.constexpr, B: tl.constexpr):
    """The inverse of :func:`pack`: (A, B / 8) to booleans (A, B)."""
    place = tl.arange(0, 8)[None, None, :]
    eights = (bytes_.to(tl.int32)[:, :, None] >> place) & 1
    return tl.reshape(eights, (A, B)) != 0
