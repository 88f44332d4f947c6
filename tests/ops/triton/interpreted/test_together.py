"""Programs that share a unit and wait for each other, several of them at a time, round after round."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from batchnorm.ops.triton import launching, plan
from ops.test_kernels import Case
from ops.triton.interpreted import together
from ops.triton.interpreted.comparing import KERNELS, check_backward, check_forward
from ops.triton.interpreted.ways import BOTH

SHAPES = {
    "planes": ((6, 3, 9, 11), torch.contiguous_format),
    "rows": ((6, 70, 4, 5), torch.channels_last),
}


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> list[tuple[int, int]]:  # noqa: ARG001
    """How the launches are cut whose programs meet: units at a time, and programs of each."""
    found: list[tuple[int, int]] = []
    run = launching.run

    def record(*arguments: Any, launch_cooperative_grid: bool = False, **options: Any) -> None:
        if launch_cooperative_grid:
            found.append((arguments[3]["lanes"], arguments[3]["splits"]))
        run(*arguments, **options)

    monkeypatch.setattr(launching, "run", record)
    monkeypatch.setattr(plan, "both", BOTH)
    # Room for eight programs, and a cache that holds two units of three: so there are two rounds.
    monkeypatch.setattr(launching, "device_of", lambda _: plan.Device(4, 0))
    monkeypatch.setattr(plan, "_held", lambda *_: 2)
    together.side_by_side(monkeypatch)
    return found


@pytest.mark.parametrize(
    ("layout", "dtype", "masked"),
    [
        ("planes", torch.float32, True),
        ("planes", torch.bfloat16, False),
        ("rows", torch.float32, False),
        ("rows", torch.bfloat16, True),
    ],
    ids=str,
)
def test_who_waits_is_told(layout: str, dtype: torch.dtype, masked: bool, launches: list[tuple[int, int]]) -> None:
    shape, memory_format = SHAPES[layout]

    def values(scale: float, offset: float) -> torch.Tensor:
        return (torch.randn(shape) * scale + offset).to(dtype).contiguous(memory_format=memory_format)

    case = Case(
        x=values(3, 10),
        grad=values(1, 0),
        weight=torch.randn(shape[1]),
        bias=torch.randn(shape[1]),
        residual=values(1, 0),
        mask=torch.rand(shape[0], *shape[2:]) > 0.3 if masked else None,
        activation="relu",
    )
    label = f"{layout} {dtype}"
    check_backward(case, label, *check_forward(case, label, parts=False), parts=False)
    assert len(launches) == 2  # one forward, one backward
    for lanes, splits in launches:
        units = shape[1] if layout == "planes" else -(-shape[1] // plan._COLUMNS)
        assert splits > 1
        assert lanes * splits <= 8
        assert lanes < units  # programs meet once for each of several units


def test_the_same_bits_whoever_comes_first(launches: list[tuple[int, int]]) -> None:
    x, grad = torch.randn(2, 6, 3, 9, 11).unbind()
    affine = (torch.randn(3), torch.randn(3), None, None)
    found = []
    for _ in range(3):
        _, count, mean, _, invstd, _ = whole = KERNELS.train_forward(x, *affine, 1e-5, "relu")
        back = KERNELS.train_backward(grad, x, mean, invstd, *affine[:2], None, None, None, "relu", count, False)
        found.append((*whole, *back))
    assert len(launches) == 6
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("module", ["forward", "backward"])
def test_programs_that_nobody_tells_wait_for_ever(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests would notice a missing announcement."""
    x, one = torch.randn(6, 3, 9, 11), torch.ones(3, dtype=torch.float64)
    call, arguments = {
        "forward": (KERNELS.train_forward, (x, None, None, None, None, 1e-5, "none")),
        "backward": (KERNELS.train_backward, (x, x, one, one, *[None] * 5, "none", one[0] * 594, False)),
    }[module]
    monkeypatch.setattr(together, "SECONDS", 3.0)
    monkeypatch.setattr(importlib.import_module(f"batchnorm.ops.triton.kernels.{module}"), "announce", lambda *_: None)
    with pytest.raises(Exception, match="programs wait for ever"):
        call(*arguments)
