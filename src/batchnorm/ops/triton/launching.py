"""From tensors to launches: memory as the kernels see it, on the tensors' own device and current stream."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.schema import LEAKY_SLOPE, runs, statistics_dtype
from batchnorm.ops.schema import _dense as dense
from batchnorm.ops.triton import plan

# Of the driver's message where not all programs of a cooperative launch can be resident.
_TOO_MANY = "too many blocks in cooperative launch"


class Data:
    """x as the kernels take it: dense, in rows or in planes; and whatever has its shape, in the same order.

    A tensor with other strides is copied, and results go back into a tensor of x's own strides: that costs a pass each
    way, and every layout that torch's layers produce is spared it.
    """

    def __init__(self, x: Tensor) -> None:
        self.like = x
        self.rows = runs(x)[0]
        self.samples, self.channels = x.size(0), x.size(1)
        self.positions = x.shape[2:].numel()
        spatial = range(2, x.dim())
        self._order = (0, *spatial, 1) if self.rows else (0, 1, *spatial)
        self.x = self.match(x)

    def match(self, tensor: Tensor) -> Tensor:
        """A tensor of x's shape, in x's dtype and order of memory. What it is seen as (its strides) may be another."""
        if tensor.dtype != self.like.dtype:
            tensor = tensor.to(self.like.dtype)
        return tensor if dense(tensor, self._order) else tensor.permute(self._order).contiguous()

    def output(self) -> tuple[Tensor, Tensor]:
        """A result of x's shape and strides, and the memory to write: its own, where that is in order."""
        out = torch.empty_like(self.like)
        if dense(out, self._order):
            return out, out
        return out, out.new_empty([out.size(dim) for dim in self._order])

    def finish(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """The result, once its memory has been written."""
        out, memory = output
        if memory is not out:
            back = [self._order.index(dim) for dim in range(out.dim())]
            out.copy_(memory.permute(back))
        return out

    def sign(self) -> Tensor:
        """Memory for a bit an element."""
        _, number, length = runs(self.like)
        return self.like.new_empty(number * ((length + 7) // 8), dtype=torch.uint8)

    def problem(self, *, operands: int, backward: bool, size: int | None = None, ghosts: int = 1) -> plan.Problem:
        """The problem of one call: what a launch is planned from."""
        return plan.Problem(
            samples=self.samples,
            channels=self.channels,
            positions=self.positions,
            rows=self.rows,
            itemsize=self.like.dtype.itemsize,
            size=self.samples if size is None else size,
            ghosts=ghosts,
            operands=operands,
            backward=backward,
        )


def mask_of(mask: Tensor | None) -> Tensor | None:
    """A mask as bytes in the order of positions."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def vector(tensor: Tensor | None) -> Tensor | None:
    """A parameter or statistic without gaps."""
    return None if tensor is None else tensor.contiguous()


@functools.cache
def device_of(device: torch.device) -> plan.Device:
    """What the plans need to know of a card."""
    if device.type != "cuda":  # Triton's interpreter, in tests
        return plan.Device(multiprocessors=2, cache_bytes=1 << 20)
    found = torch.cuda.get_device_properties(device)
    return plan.Device(found.multi_processor_count, found.L2_cache_size)


def shape_arguments(problem: plan.Problem, launch: plan.Launch) -> dict[str, int]:
    """The sizes that every kernel takes."""
    run = problem.channels if problem.rows else problem.positions
    return {
        "samples": problem.samples,
        "other": problem.positions if problem.rows else problem.channels,
        "run_units": run // launch.vec,
        "size": problem.size,
        "ghosts": problem.ghosts,
        "lanes": launch.lanes,
        "splits": launch.splits,
    }


def constants(problem: plan.Problem, launch: plan.Launch, activation: str, mask: Tensor | None) -> dict[str, Any]:
    """The constants that every kernel is compiled with."""
    return {
        "ROWS": problem.rows,
        "VEC": launch.vec,
        "WHOLE": launch.whole,
        "MASKED": mask is not None,
        "SPLIT": launch.split,
        "ACTIVATION": activation,
        "SLOPE": LEAKY_SLOPE,
        "A": launch.A,
        "B": launch.B,
        "GROUP": plan.GROUP,
        "CHUNK": plan.CHUNK,
        "STAGES": launch.stages,
    }


def run(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], **options: Any) -> None:
    """Launch on the device of ``like`` and its current stream."""
    place = torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()
    with place:
        kernel[(programs,)](**arguments, **options)


def scratch(like: Tensor, problem: plan.Problem, launch: plan.Launch, vectors: int) -> dict[str, Tensor | None]:
    """Where programs that share a unit leave their parts, and where they count themselves; nothing where none do."""
    if not launch.split:
        return {"partial": None, "arrivals": None}
    width = launch.B if problem.rows else 1
    units = (-(-problem.channels // width) if problem.rows else problem.channels) * problem.ghosts
    return {
        "partial": like.new_empty(vectors * units * launch.splits * width, dtype=torch.float64),
        "arrivals": like.new_zeros(units, dtype=torch.int32),
    }


_refused: set[torch.device] = set()  # cards that would not start all programs of a launch together


def perform(
    kernel: Any,
    data: Data,
    problem: plan.Problem,
    wanted: dict[str, bool],
    arguments: dict[str, Any],
    *,
    vectors: int,
    activation: str,
    mask: Tensor | None,
) -> None:
    """Launch a kernel's two phases, those that are ``wanted``: both at once, where that can be, or one after the other.

    ``vectors``: how many a program leaves in memory for each of its units after the first phase.
    """
    device = device_of(data.like.device)
    meets = plan.may_meet() and data.like.device not in _refused
    for phases, launch in _launches(problem, device, wanted, meets):
        cooperative = launch.split and sum(phases.values()) == 2
        try:
            run(
                kernel,
                data.like,
                launch.programs,
                arguments
                | phases
                | scratch(data.like, problem, launch, vectors if next(iter(phases.values())) else 0)
                | shape_arguments(problem, launch)
                | constants(problem, launch, activation, mask),
                **options(launch, cooperative=cooperative),
            )
        except RuntimeError as error:
            # A card may hold fewer programs than it has room for, where others have been given a share of it (MPS).
            # Nothing has run then.
            if not cooperative or _TOO_MANY not in str(error):
                raise
            _refused.add(data.like.device)
            perform(kernel, data, problem, wanted, arguments, vectors=vectors, activation=activation, mask=mask)


def _launches(
    problem: plan.Problem, device: plan.Device, wanted: dict[str, bool], meets: bool
) -> list[tuple[dict[str, bool], plan.Launch]]:
    """The launches of a call, each with its phases."""
    (first, has_first), (second, has_second) = wanted.items()
    if has_first and has_second:
        launch = plan.both(problem, device)
        if not launch.split or meets:
            return [(wanted, launch)]
    launches = []
    if has_first:
        launches.append(({first: True, second: False}, plan.statistics(problem, device)))
    if has_second:
        launches.append(({first: False, second: True}, plan.apply(problem, device)))
    return launches


def options(launch: plan.Launch, *, cooperative: bool) -> dict[str, Any]:
    """How Triton is to compile and launch. ``cooperative``: programs wait for each other, and so must all be resident.

    The launch is then refused where they cannot be, and otherwise runs them together.
    """
    return {"num_warps": launch.warps, "maxnreg": launch.registers, "launch_cooperative_grid": cooperative}


def columns(saved: Tensor, channels: int) -> dict[str, Tensor]:
    """The columns of the ghosts' statistics, by name; views that begin at the first ghost's."""
    mean, var, invstd, count = saved.split([channels, channels, channels, 1], 1)
    return {"mean": mean, "var": var, "invstd": invstd, "count": count}


def channels(x: Tensor) -> Tensor:
    """A statistic of each channel, to be written."""
    return x.new_empty(x.size(1), dtype=statistics_dtype(x.device))


def scalar(x: Tensor) -> Tensor:
    """A statistic that all channels share, to be written."""
    return x.new_empty((), dtype=statistics_dtype(x.device))
