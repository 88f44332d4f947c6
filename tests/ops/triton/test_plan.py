"""How launches are cut: every value once, programs that meet all resident, and nothing that depends on the moment."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from batchnorm.ops.triton import plan
from batchnorm.ops.triton.launching import Data
from batchnorm.ops.triton.plan import Device, Launch, Problem

DEVICES = {"Hopper": Device(132, 50 << 20), "small": Device(20, 2 << 20), "one": Device(1, 0)}
SHAPES = [
    (256, 64, 112 * 112),
    (256, 2048, 49),
    (256, 100, 1),
    (4096, 1024, 1),
    (1, 1, 1),
    (2, 3, 10**6),
    (7, 100_003, 3),
    (2**31 + 5, 1, 1),
]


def problems() -> list[Problem]:
    found = []
    for samples, channels, positions in SHAPES:
        for rows in (False, True):
            for itemsize in (2, 4):
                found.append(Problem(samples, channels, positions, rows, itemsize, samples, 1))
                if samples > 4:
                    size = samples // 3
                    found.append(
                        Problem(samples, channels, positions, rows, itemsize, size, -(-samples // size), 2, True)
                    )
    return found


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_tiles_are_powers_of_two_and_units_are_covered(device: Device) -> None:
    for problem in problems():
        for cut in (plan.both, plan.statistics, plan.apply):
            launch = cut(problem, device)
            for side in (launch.A, launch.B):
                assert side & (side - 1) == 0
            assert launch.B >= 8  # a byte of signs
            assert launch.A * launch.B * problem.itemsize <= 2 * plan._TILE_BYTES
            run = problem.channels if problem.rows else problem.positions
            assert run % launch.vec == 0
            units, tiles = plan._units(problem)
            assert launch.programs == launch.lanes * launch.splits
            assert launch.lanes <= units
            assert launch.splits <= max(1, tiles)
            assert launch.split == (launch.splits > 1)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_programs_that_meet_are_resident_together(device: Device) -> None:
    for problem in problems():
        launch = plan.both(problem, device)
        if launch.split:
            threads = launch.warps * 32
            assert launch.programs <= device.multiprocessors * (65536 // (launch.registers * threads))
        else:
            assert launch.lanes == plan._units(problem)[0]


def test_units_under_way_fit_in_the_cache_where_one_does() -> None:
    device = DEVICES["Hopper"]
    problem = Problem(256, 256, 56 * 56, False, 2, 256, 1)
    launch = plan.both(problem, device)
    assert launch.split
    assert launch.lanes * 256 * 56 * 56 * 2 <= 0.4 * device.cache_bytes
    whole_rows = dataclasses.replace(problem, rows=True)  # a tile of its columns is more than the cache
    assert plan.both(whole_rows, device).lanes == plan._units(whole_rows)[0]


@pytest.mark.parametrize(("itemsize", "columns"), [(2, 32), (4, 16)])
def test_a_unit_is_as_narrow_as_the_cache_wants(itemsize: int, columns: int) -> None:
    device = DEVICES["Hopper"]
    problem = Problem(256, 512, 28 * 28, True, itemsize, 256, 1)  # 64 columns of it are more than the cache's share
    launch = plan.both(problem, device)
    assert columns == launch.B
    assert launch.lanes * columns * 256 * 28 * 28 * itemsize <= 0.4 * device.cache_bytes
    assert launch.programs > device.multiprocessors
    assert plan.statistics(problem, device).B == plan.apply(problem, device).B == 64  # nothing is read twice
    nothing_helps = dataclasses.replace(problem, positions=10**4)
    assert plan.both(nothing_helps, device).B == 64


def test_whole_tiles_need_no_bounds() -> None:
    device = DEVICES["Hopper"]
    even = Problem(64, 64, 49, True, 2, 64, 1)
    assert plan.both(even, device).whole
    for uneven in (
        dataclasses.replace(even, channels=65),
        dataclasses.replace(even, positions=48, samples=63, size=63),
    ):
        assert not plan.both(uneven, device).whole
    ghosts = Problem(70, 64, 64, True, 2, 32, 3)  # 32, 32 and 6
    launch = plan.both(ghosts, device)
    assert launch.whole == (6 * 64 % launch.A == 0)


@pytest.mark.parametrize(
    ("x", "rows", "copied"),
    [
        (torch.zeros(4, 3, 5, 6), False, False),
        (torch.zeros(4, 3, 5, 6).contiguous(memory_format=torch.channels_last), True, False),
        (torch.zeros(4, 3), True, False),
        (torch.zeros(4, 3, 5, 6).transpose(2, 3), False, True),
        (torch.zeros(4, 6, 5)[:, ::2], False, True),
        (torch.zeros(4, 6)[:, ::2], True, True),
    ],
    ids=["planes", "channels_last", "(N, C)", "permuted", "sliced", "sliced (N, C)"],
)
def test_memory_in_order_is_not_copied(x: torch.Tensor, rows: bool, copied: bool) -> None:
    data = Data(x)
    assert data.rows == rows
    assert (data.x.data_ptr() != x.data_ptr()) == copied
    out, memory = data.output()
    assert out.stride() == torch.empty_like(x).stride()
    memory.copy_(torch.arange(x.numel(), dtype=torch.float32).view(memory.shape))
    finished = data.finish((out, memory))
    assert torch.equal(
        data.match(finished).flatten() if copied else finished.flatten().sort()[0], torch.arange(x.numel()).float()
    )


def test_the_same_problem_is_cut_the_same() -> None:
    problem = problems()[0]
    first: Launch = plan.both(problem, DEVICES["Hopper"])
    assert plan.both(dataclasses.replace(problem), Device(132, 50 << 20)) == first
