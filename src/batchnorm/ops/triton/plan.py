"""How a launch is cut: which tiles, how many programs, which of them share a unit. Numbers only, no device is asked.

A *unit* is what has statistics of its own: the channels of a tile in one ghost (one channel, in planes memory). The
choice depends on shape, dtype and card alone, so that the same call gives the same bits every time; nothing is timed.
"""

from __future__ import annotations

import dataclasses
import math
import os

# Bytes of one operand in a tile: with 8 warps, two 16-byte loads a thread are under way for each operand.
_TILE_BYTES = 8192
_WARPS = 8
# Programs a multiprocessor holds at a time, and the registers that leaves each thread of 8 warps (of 65,536 in all).
# The backward reads two tensors and keeps twice the coefficients.
_FORWARD_PROGRAMS, _FORWARD_REGISTERS = 2, 128
_BACKWARD_PROGRAMS, _BACKWARD_REGISTERS = 2, 128
# Channels side by side in a tile of rows: 128 bytes of a 16-bit type, whole sectors of memory and no more columns than
# needed, so that many units of large tensors fit in the cache one after the other.
_COLUMNS = 64
# Fewer where a unit then fits in the cache, but not fewer bytes than memory hands out at a time.
_LEAST_COLUMN_BYTES = 64
# Values of one run in a tile of planes, longest first: the first that wastes least is taken.
_RUNS = (4096, 2048, 1024, 512)
# Of the second-level cache, what the units under way may fill; the rest is for what they write.
_CACHE_SHARE = 0.4
# A program that shares a unit has this many tiles at least: sharing costs a meeting of microseconds.
_LEAST_TILES = 4
# Tiles summed value by value in float32 before the sums go on in float64.
GROUP = 32
# Slices that are merged at a time.
CHUNK = 32


COOPERATIVE_SWITCH = "BATCHNORM_TRITON_COOPERATIVE"
"""Environment variable: ``0`` launches the two phases of a step one after the other, and no program ever waits."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What of a card matters here: its multiprocessors and the bytes of its second-level cache."""

    multiprocessors: int
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data of (samples, channels, positions) in rows or planes memory, in ghosts of ``size`` samples.

    ``operands``: tensors of x's size that a pass reads. ``backward``: whether it is the backward pass.
    ``columns``: channels side by side in a tile of rows, None for the usual number.
    """

    samples: int
    channels: int
    positions: int
    rows: bool
    itemsize: int
    size: int
    ghosts: int
    operands: int = 1
    backward: bool = False
    columns: int | None = None


@dataclasses.dataclass(frozen=True)
class Launch:
    """The constants and the grid of a launch; names as in the kernels.

    ``split``: whether several programs share a unit, and so leave their parts in memory. ``stages``: tiles that a loop
    has under way, all but one of them being fetched into shared memory while one is computed with.
    """

    A: int
    B: int
    vec: int
    whole: bool
    lanes: int
    splits: int
    programs: int
    split: bool
    warps: int = _WARPS
    registers: int = _FORWARD_REGISTERS
    stages: int = 3


def tile(problem: Problem) -> tuple[int, int]:
    """A and B, powers of two."""
    values = _TILE_BYTES // problem.itemsize
    if problem.rows:
        columns = min(problem.columns or _COLUMNS, max(8, _power_from(problem.channels)))
        rows = problem.size * problem.positions
        return min(values // columns, _power_from(rows)), columns
    length = problem.positions
    if length > _RUNS[-1]:
        run = min((b for b in _RUNS if b <= values), key=lambda b: (-(-length // b) * b, -b))
    else:
        run = max(8, _power_from(length))
    return min(max(1, values // run), _power_from(problem.size)), run


def both(problem: Problem, device: Device) -> Launch:
    """Statistics and normalization (or sums and gradient) in one launch.

    Where there are units for every program, each is one program's own. Otherwise programs share units: as many units
    at a time as the cache holds, so that the second look at them reads no memory. All programs are then resident at
    the same time, and the launch must be cooperative.
    """
    problem = _narrow(problem, device)
    units, tiles = _units(problem)
    resident = device.multiprocessors * (_BACKWARD_PROGRAMS if problem.backward else _FORWARD_PROGRAMS)
    held = _held(problem, device)
    # As many units at a time as the cache holds; if it holds not even one, all, so that memory is read in its order.
    lanes = min(units, resident, held or units)
    lanes = -(-units // -(-units // lanes))  # evenly over the rounds
    splits = max(1, min(resident // lanes, tiles // _LEAST_TILES))
    if splits == 1:
        lanes = units
    return _launch(problem, lanes, splits)


def may_meet() -> bool:
    """Whether programs may wait for each other in a launch."""
    return os.environ.get(COOPERATIVE_SWITCH) != "0"


def statistics(problem: Problem, device: Device) -> Launch:
    """Statistics (or sums) alone: enough programs to fill the card, which need not be resident together."""
    units, tiles = _units(problem)
    wanted = device.multiprocessors * (_BACKWARD_PROGRAMS if problem.backward else _FORWARD_PROGRAMS)
    splits = max(1, min(-(-wanted // units), tiles // _LEAST_TILES))
    return _launch(problem, units, splits)


def apply(problem: Problem, device: Device) -> Launch:
    """Normalization (or the gradient of the input) alone: nobody waits for anybody."""
    units, tiles = _units(problem)
    wanted = 4 * device.multiprocessors * (_BACKWARD_PROGRAMS if problem.backward else _FORWARD_PROGRAMS)
    splits = max(1, min(-(-wanted // units), -(-tiles // 2)))
    return _launch(problem, units, splits)


def _launch(problem: Problem, lanes: int, splits: int) -> Launch:
    a, b = tile(problem)
    run = problem.channels if problem.rows else problem.positions
    # How far runs are aligned, up to what one load takes: 16 bytes.
    vec = math.gcd(run, 16 // problem.itemsize)
    across = problem.size * problem.positions if problem.rows else problem.size
    last = (problem.samples - (problem.ghosts - 1) * problem.size) * (problem.positions if problem.rows else 1)
    return Launch(
        A=a,
        B=b,
        vec=vec,
        whole=run % b == 0 and across % a == 0 and last % a == 0,
        lanes=lanes,
        splits=splits,
        programs=lanes * splits,
        split=splits > 1,
        registers=_BACKWARD_REGISTERS if problem.backward else _FORWARD_REGISTERS,
        # Two programs with three tensors each must fit in the shared memory of the smallest cards, 100 KB.
        stages=3 if problem.operands <= 2 else 2,
    )


def _units(problem: Problem) -> tuple[int, int]:
    """How many units there are, and how many tiles the smaller of them has."""
    a, b = tile(problem)
    if problem.rows:
        units, tiles = -(-problem.channels // b), -(-problem.size * problem.positions // a)
    else:
        units, tiles = problem.channels, -(-problem.size // a) * -(-problem.positions // b)
    return units * problem.ghosts, tiles


def _held(problem: Problem, device: Device) -> int:
    """How many units the cache holds, of what is read twice: a residual is not, before the backward pass."""
    unit_bytes = _per_unit(problem) * problem.itemsize * (problem.operands if problem.backward else 1)
    return int(device.cache_bytes * _CACHE_SHARE) // max(1, unit_bytes)


def _narrow(problem: Problem, device: Device) -> Problem:
    """With as many columns as let the cache hold a unit, where there are any: x is then read from memory once."""
    tried, columns = problem, tile(problem)[1]
    while problem.rows and not _held(tried, device) and columns // 2 * problem.itemsize >= _LEAST_COLUMN_BYTES:
        columns //= 2
        tried = dataclasses.replace(problem, columns=columns)
    return tried if _held(tried, device) else problem


def _per_unit(problem: Problem) -> int:
    _, b = tile(problem)
    return problem.size * problem.positions * (min(b, problem.channels) if problem.rows else 1)


def _power_from(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
