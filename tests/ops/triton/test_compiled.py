"""Every kernel, as each kind of launch compiles it, down to machine code for cards that are not here.

What cannot be seen without a card is whether it runs; what can, is that the compiler and the assembler take it, how
many registers it needs, whether its loops spill, and that the instructions are there on which the results depend.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.ops import schema
from batchnorm.ops.triton import plan

pytest.importorskip("triton", reason="Triton is not installed (pip install batchnorm[gpu])")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles nothing in the interpreter", allow_module_level=True)

from batchnorm.moments import cuda
from batchnorm.ops.triton import averages, backward, forward, launching
from ops.triton.compiling import Compiled, compile_launch

WAITING = r"\.acquire\.|\.acquire\b"
HOPPER = plan.Device(multiprocessors=132, cache_bytes=50 << 20)
MODULES = (forward, backward, averages)
LAST = torch.channels_last
SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "channels_last": ((64, 64, 56, 56), LAST),
    "channels_last, uneven": ((33, 70, 15, 13), LAST),
    "channels_last, 2048": ((64, 2048, 7, 7), LAST),
    "contiguous": ((64, 64, 56, 56), torch.contiguous_format),
    "contiguous, 7x7": ((64, 512, 7, 7), torch.contiguous_format),
    "(N, C)": ((4096, 1024), torch.contiguous_format),
    "three": ((5, 3), torch.contiguous_format),
}


@dataclasses.dataclass(frozen=True)
class Launched:
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled goes with the test, and was compiled by it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What would be launched on a Hopper card, instead of launching."""
    found: list[Launched] = []

    def record(kernel: Any, _: Any, programs: int, arguments: dict[str, Any], **options: Any) -> None:
        found.append(Launched(kernel, programs, arguments, options))

    for module in (launching, averages):
        monkeypatch.setattr(module, "run", record)
    monkeypatch.setattr(launching, "device_of", lambda _: HOPPER)
    return found


def call(name: str) -> Callable[..., Any]:
    return next(getattr(module, name) for module in MODULES if hasattr(module, name))


def data(shape: str, dtype: torch.dtype) -> dict[str, Any]:
    """Memory that is never touched."""
    size, memory_format = SHAPES[shape]
    x = torch.empty(size, dtype=dtype, memory_format=memory_format)
    c = x.size(1)
    return {
        "x": x,
        "vector": torch.ones(c),
        "wide": torch.ones(c, dtype=torch.float64),
        "count": torch.ones((), dtype=torch.float64),
        "saved": torch.ones(2 * c + 1, dtype=torch.float64),
        "ghosts": torch.ones(4, 3 * c + 1, dtype=torch.float64),
        "mask": torch.ones(x.size(0), *x.shape[2:], dtype=torch.bool),
        "batches": torch.ones((), dtype=torch.int64),
    }


def steps(d: dict[str, Any], activation: str, *, added: bool, masked: bool) -> None:
    """A training step, forward and backward."""
    x, v, mask = d["x"], d["vector"], d["mask"] if masked else None
    residual = torch.empty_like(x) if added else None
    averages = (v.clone(), v.clone(), 1e-5, None, d["batches"], 1)
    sign = call("train_step")(x, v, v, residual, mask, *averages, activation)[2]
    kept = residual if schema.needs_residual(activation) else None
    call("train_step_backward")(x, x, d["saved"], v, v, kept, sign, mask, activation, added)


def smaller_operators(d: dict[str, Any]) -> None:
    """What a training step is made of, one by one; ghosts."""
    x, v, wide = d["x"], d["vector"], d["wide"]
    call("stats")(x, None)
    call("stats")(x, d["mask"])
    call("normalize")(x, wide, wide, v, v, None, None, "relu")
    call("infer")(x, v, v, v, v, None, None, 1e-5, "silu")
    given = (x, x, wide, wide, v, v, None, None, None, "relu")
    call("grad_sums")(*given)
    call("grad_input")(*given, d["count"], wide, wide, False)
    size = x.size(0) // 4
    call("ghost_forward")(x, v, v, None, None, size, 4, 1e-5, "relu")
    call("ghost_backward")(x, x, d["ghosts"], v, v, None, None, None, size, "relu", False)
    call("update_running")(v.clone(), v.clone(), wide, wide, d["count"], 0.1, None, 1)
    call("ghost_update")(v.clone(), v.clone(), d["ghosts"], None, d["batches"], 1)


def check(launched: Launched, capability: int) -> Compiled:
    made = compile_launch(launched.kernel, launched.arguments, launched.options, capability)
    limit = launched.options.get("maxnreg", 255)
    assert made.registers <= limit
    # All programs that a plan counts on must fit on a multiprocessor: its registers, and the shared memory of the
    # smallest card among those.
    resident = 65536 // (limit * made.warps * 32)
    assert resident >= 2
    assert 2 * (made.shared + 1024) <= 100 * 1024
    assert made.cooperative == launched.options.get("launch_cooperative_grid", False)
    # Runs of odd length (7x7) are read value by value, and the addresses of sixteen do not all fit in registers.
    assert made.spilled_in_loops <= (0 if launched.arguments.get("VEC", 8) > 1 else 16), "spilled in an inner loop"
    assert made.spilled <= 512
    return made


@pytest.mark.parametrize(
    ("shape", "dtype"),
    # Every layout in the type that is trained with most, and every type.
    [*((shape, torch.bfloat16) for shape in SHAPES), ("channels_last", torch.float16), ("contiguous", torch.float32)],
    ids=str,
)
def test_a_training_step_compiles(shape: str, dtype: torch.dtype, launches: list[Launched]) -> None:
    d = data(shape, dtype)
    steps(d, "relu", added=False, masked=False)
    steps(d, "relu", added=True, masked=False)
    assert len(launches) == 4  # a launch for the forward, one for the backward
    for launched in launches:
        made = check(launched, 90)
        assert made.loops >= 2  # one over the data for each phase
        # The forward and the backward must round z alike, by one instruction.
        assert "fma.rn.f32" in made.ptx
        if dtype == torch.bfloat16:
            assert "cvt.rn.bf16" in made.ptx
        assert ".local" not in made.ptx
        # Who waits for others is launched together with them; who arrives has released what it wrote.
        waits = launched.options["launch_cooperative_grid"]
        assert waits == bool(re.search(WAITING, made.ptx))
        assert waits == ("atom.global.gpu.acq_rel" in made.ptx)


@pytest.mark.parametrize("activation", schema.ACTIVATIONS)
def test_every_activation_compiles_with_mask_and_residual(activation: str, launches: list[Launched]) -> None:
    # Turn about: an activation is the same arithmetic in either memory.
    turn = schema.ACTIVATIONS.index(activation) % 2
    shape, dtype = (("channels_last", torch.bfloat16), ("contiguous", torch.float32))[turn]
    steps(data(shape, dtype), activation, added=turn == 0, masked=True)
    for launched in launches:
        check(launched, 90)


@pytest.mark.parametrize("shape", ["channels_last", "contiguous, 7x7"])
def test_the_smaller_operators_compile(shape: str, launches: list[Launched]) -> None:
    smaller_operators(data(shape, torch.bfloat16))
    assert len(launches) == 10
    for launched in launches:
        check(launched, 90)


@pytest.mark.parametrize("capability", [80, 86, 100])
@pytest.mark.parametrize("shape", ["channels_last", "contiguous"])
def test_other_cards(capability: int, shape: str, launches: list[Launched]) -> None:
    steps(data(shape, torch.bfloat16), "relu", added=True, masked=False)
    for launched in launches:
        check(launched, capability)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8192, 256), (64, 8, 3136), (9, 1), (1, 4, 50)], ids=str)
def test_moments_compile(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *values, **constants: found.append((grid, values, constants))

    kernel = cuda.sums
    monkeypatch.setattr(cuda, "sums", Recorder())
    monkeypatch.setattr(cuda, "_multiprocessors", lambda _: HOPPER.multiprocessors)
    weights = torch.ones(shape[0], dtype=torch.float64) if len(shape) == 2 else None
    cuda.moments(torch.empty(shape, dtype=dtype), weights, True)
    [(grid, values, constants)] = found
    assert grid[0] * grid[1] >= min(HOPPER.multiprocessors, math.prod(shape) // 2**14)
    options = {"num_warps": constants.pop("num_warps")}
    arguments = dict(zip([p.name for p in kernel.params], values, strict=False)) | constants
    made = compile_launch(kernel, arguments, options, 90)
    assert made.spilled == 0
    assert list(tmp_path.iterdir())


def test_two_launches_compile(launches: list[Launched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.COOPERATIVE_SWITCH, "0")
    steps(data("channels_last", torch.bfloat16), "relu", added=False, masked=False)
    assert [launched.kernel.__name__ for launched in launches] == ["forward"] * 2 + ["backward"] * 2
    for launched in launches:
        assert not re.search(WAITING, check(launched, 90).ptx)


def test_loads_are_16_bytes_wide_where_runs_allow_it(launches: list[Launched]) -> None:
    for shape in ("channels_last", "contiguous"):
        for dtype in (torch.bfloat16, torch.float32):
            steps(data(shape, dtype), "relu", added=False, masked=False)
    for launched in launches:
        ptx = check(launched, 90).ptx
        assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx)
        assert re.search(r"st\.global\.v4\.b32", ptx)


def test_offsets_of_more_than_2_31_elements_are_64_bit(launches: list[Launched]) -> None:
    """Meta tensors have the size and no memory; what they launch compiles with 64-bit sizes where these need it."""
    d = data("three", torch.bfloat16)
    x = torch.empty(2**31 + 7, 1, dtype=torch.bfloat16, device="meta")
    v, wide = torch.ones(1), torch.ones(1, dtype=torch.float64)
    call("normalize")(x, wide, wide, v, v, None, None, "relu")
    [launched] = launches
    assert launched.arguments["samples"] == 2**31 + 7
    arguments = {k: d["x"] if isinstance(a, torch.Tensor) and a.is_meta else a for k, a in launched.arguments.items()}
    compile_launch(launched.kernel, arguments, launched.options, 90)
