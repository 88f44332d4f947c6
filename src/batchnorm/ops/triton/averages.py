"""Running averages on a GPU. Imports Triton."""

from __future__ import annotations

from torch import Tensor

from batchnorm.ops.triton.kernels.running import update as kernel
from batchnorm.ops.triton.launching import columns, run

_WIDTH = 128  # channels of a program


class Averages:
    """Running averages to move, as the kernels take them."""

    def __init__(
        self, mean: Tensor, var: Tensor, momentum: float | None, num_batches: Tensor | None, ddof: int
    ) -> None:
        if momentum is None and num_batches is None:
            raise ValueError("expected a momentum or num_batches, got neither")
        self.given = (mean, var)
        self.mean, self.var = mean.contiguous(), var.contiguous()
        self.momentum = 0.0 if momentum is None else momentum
        self.num_batches = num_batches if momentum is None else None
        self.ddof = ddof

    @classmethod
    def of(
        cls, mean: Tensor | None, var: Tensor | None, momentum: float | None, num_batches: Tensor | None, ddof: int
    ) -> Averages | None:
        """None where there are none."""
        return None if mean is None or var is None else cls(mean, var, momentum, num_batches, ddof)

    def finish(self) -> None:
        """Back into the buffers, where they have gaps."""
        for given, moved in zip(self.given, (self.mean, self.var), strict=True):
            if moved is not given:
                given.copy_(moved)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    num_batches: Tensor | None,
    ddof: int,
) -> None:
    """The running averages, in one launch."""
    averages = Averages.of(running_mean, running_var, momentum, num_batches, ddof)
    assert averages is not None
    _update(averages, mean.contiguous(), var.contiguous(), count, ghosts=1, stride=0)


def ghost_update(
    running_mean: Tensor,
    running_var: Tensor,
    saved: Tensor,
    momentum: float | None,
    num_batches: Tensor | None,
    ddof: int,
) -> None:
    """The running averages over one ghost after the other, in one launch."""
    averages = Averages.of(running_mean, running_var, momentum, num_batches, ddof)
    assert averages is not None
    kept = columns(saved.contiguous(), running_mean.numel())
    _update(averages, kept["mean"], kept["var"], kept["count"], ghosts=saved.size(0), stride=saved.size(1))


def _update(averages: Averages, mean: Tensor, var: Tensor, count: Tensor, *, ghosts: int, stride: int) -> None:
    channels = averages.mean.numel()
    arguments = {
        "running_mean": averages.mean,
        "running_var": averages.var,
        "mean": mean,
        "var": var,
        "count": count,
        "num_batches": averages.num_batches,
        "channels": channels,
        "ghosts": ghosts,
        "stride": stride,
        "ddof": averages.ddof,
        "momentum": averages.momentum,
        "WIDTH": _WIDTH,
    }
    run(kernel, averages.mean, -(-channels // _WIDTH), arguments, num_warps=4)
    averages.finish()
