"""Averages of a model's weights (SWA, EMA), and whose running statistics they have."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from batchnorm._checks import check_choice
from batchnorm._errors import InputError
from batchnorm.nn.recognition import batch_norms

POLICIES = ("copy", "average")


class AveragedModel(swa_utils.AveragedModel):
    """torch's, with a stated policy for the running statistics of batch norms. Made by :func:`averaged_model`."""

    def __init__(self, model: nn.Module, decay: float | None, buffers: str, device: Any) -> None:
        average = None if decay is None else swa_utils.get_ema_multi_avg_fn(decay)
        super().__init__(model, device=device, multi_avg_fn=average)
        self.decay, self.buffer_policy = decay, buffers

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights that ``model`` has now. The first time they are copied, statistics and all."""
        seen = int(self.n_averaged)
        statistics = _statistics(self.module) if self.buffer_policy == "average" and seen else []
        before = [tensor.clone() for tensor in statistics]
        super().update_parameters(model)  # which copies all buffers
        weight = 1 / (seen + 1) if self.decay is None else 1 - self.decay
        for now, old in zip(statistics, before, strict=True):
            now.copy_(torch.lerp(old, now, weight))


def averaged_model(
    model: nn.Module,
    *,
    decay: float | None = None,
    buffers: Literal["copy", "average"] = "copy",
    device: Any = None,
) -> AveragedModel:
    """An average of ``model``'s weights, which grows with each ``update_parameters(model)``, as torch's.

    An average of weights is a network that never ran: no running statistics are its own, and those that it is given are
    somebody else's. What it should have are those of its own activations: when the averaging is over,
    ``bn.recalibrate(averaged, batches)``. Until then, or where there are no data, they are by ``buffers``

    - ``"copy"``: the latest model's, as torch does by default.
    - ``"average"``: averaged like the weights, means by means and variances by variances; counters and other buffers
      are copied. (torch's ``use_buffers=True`` averages counters and all other buffers too.) The spread between the
      averaged means is *not* added to the variance: it would belong to a mixture of the models' activations, and the
      activations of averaged weights vary less than those of the models, not more.

    Neither is right where the model still moves fast compared with the average. See ``docs/recalibration.md``.

    Args:
        model: copied; it is not changed.
        decay: None for an equal average (SWA); the weight of the old value for an exponential one (EMA), 0 to 1.
        buffers: the policy.
        device: where the average is kept; None for where the model is.

    Returns:
        A ``torch.optim.swa_utils.AveragedModel`` with the same keys, whose ``module`` is the averaged network.

    Raises:
        InputError: (ValueError) another policy, or a decay out of range.
    """
    check_choice("buffers", buffers, POLICIES)
    if decay is not None and not 0 <= decay <= 1:
        raise InputError(f"expected decay, the weight of the old value, between 0 and 1, got {decay}")
    return AveragedModel(model, decay, buffers, device)


def _statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of the batch norms, each buffer once."""
    found = {
        buffer: None
        for layer in batch_norms(model)
        for name, buffer in layer.module._buffers.items()
        if name.startswith("running_") and buffer is not None and buffer.is_floating_point()
    }
    return list(found)
