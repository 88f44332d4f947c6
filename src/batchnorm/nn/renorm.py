"""Batch renormalization (Ioffe 2017): in training too, a batch is normalized nearly as it will be in eval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.moments import bessel_factor
from batchnorm.nn.batch_norm import _BatchNormLayer
from batchnorm.ops import functional
from batchnorm.ops.arguments import check_input
from batchnorm.ops.averages import in_backward
from batchnorm.ops.exported import exporting

Schedule = Callable[[Tensor], Tensor | float]


@dataclasses.dataclass(frozen=True)
class LinearRamp:
    """A schedule for ``r_max`` or ``d_max``: ``start`` to step ``first``, ``stop`` from step ``last``, a line between.

    The paper's: ``r_max=LinearRamp(1, 3, 5_000, 40_000)`` and ``d_max=LinearRamp(0, 5, 5_000, 25_000)``.

    Raises:
        InputError: (ValueError) ``last`` is not after ``first``.
    """

    start: float
    stop: float
    first: int
    last: int

    def __post_init__(self) -> None:
        """Refuse a ramp that goes nowhere."""
        if not self.last > self.first:
            raise InputError(f"expected a ramp's last step after its first, got first={self.first}, last={self.last}")

    def __call__(self, step: Tensor) -> Tensor:
        """The bound at ``step``, a 0-d tensor."""
        done = ((step - self.first) / (self.last - self.first)).clamp(0, 1)
        return self.start + (self.stop - self.start) * done


class _BatchRenormLayer(_BatchNormLayer):
    """What the three layers have in common: the correction of a batch's normalization towards the running averages."""

    r_max: float | Schedule
    d_max: float | Schedule
    warmup_steps: int

    def __init__(
        self,
        *args: Any,
        r_max: float | Schedule = 3.0,
        d_max: float | Schedule = 5.0,
        warmup_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        _check_bound("r_max", r_max, 1)
        _check_bound("d_max", d_max, 0)
        if warmup_steps < 0:
            raise InputError(f"expected warmup_steps of 0 or more, got {warmup_steps}")
        super().__init__(*args, **kwargs)
        if self.running_mean is None:
            raise InputError("expected track_running_stats=True: batch renormalization refers to the running averages")
        self.r_max, self.d_max, self.warmup_steps = r_max, d_max, warmup_steps

    def _normalize_by_batch(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        # gamma (x_hat r + d) + beta is batch normalization with gamma r and gamma d + beta. Its gradient is then the
        # paper's, in which r and d are constants, and every order of it is there already. The price is that the batch's
        # statistics are read twice: once here, for r and d, and once in the fused step.
        check_input(input, self.running_mean, self.running_var, weight, bias, False)
        if input.size(0) * math.prod(input.shape[2:]) != 1:  # a single value: as the base layer treats or refuses it
            r, d = self._correction(input.detach(), mask)
            # Parameters may be float32 beside narrower data, and these products need every digit that they can get.
            dtype = input.dtype if input.dtype.itemsize >= 4 else torch.float32
            shift = d if weight is None else weight * d
            weight = (r if weight is None else weight * r).to(dtype)
            bias = (shift if bias is None else shift + bias).to(dtype)
        return super()._normalize_by_batch(input, mask, weight, bias, residual)

    def _correction(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """r and d of this batch, clipped; 1 and 0 during the warm-up."""
        count, mean, m2 = functional.operators().stats(x, mask)
        var = m2 / count.clamp(min=1)
        running_mean, running_var, step = self._before(mean, var, count)
        sigma, running_sigma = torch.sqrt(var + self.eps), torch.sqrt(running_var + self.eps)
        r_max = self.r_max(step) if callable(self.r_max) else self.r_max
        d_max = self.d_max(step) if callable(self.d_max) else self.d_max
        r = _clipped(sigma / running_sigma, 1 / r_max, r_max)
        d = _clipped((mean - running_mean) / running_sigma, -d_max, d_max)
        if self.warmup_steps:
            warm = step < self.warmup_steps
            r, d = torch.where(warm, 1.0, r), torch.where(warm, 0.0, d)
        return r, d

    def _before(self, mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The averages, in the statistics' precision, and the step, all as they were before this batch.

        When activation checkpointing runs a forward again they have moved, and are moved back, or r and d would be
        others than in the first run: before = (now - momentum * batch) / (1 - momentum).
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        now = self.running_mean.detach().to(mean.dtype), self.running_var.detach().to(mean.dtype)
        step = self.num_batches_tracked
        compiling = torch.compiler.is_compiling()
        if compiling and exporting():
            return *now, step  # what is exported is not recomputed
        if self._averages().mean is None or not (compiling or in_backward()):
            return *now, step
        again = torch.ops.batchnorm.recomputing(mean) if compiling else torch.ones_like(step, dtype=torch.bool)
        kept = 1 - (torch.full_like(count, self.momentum) if self.momentum is not None else 1 / step.to(count.dtype))
        before = []
        for value, batch, moved, fresh in (
            (now[0], mean, count > 0, 0.0),
            (now[1], var * bessel_factor(count, self.ddof), count > self.ddof, 1.0),
        ):
            back = torch.where(kept > 0, (value - (1 - kept) * batch) / kept, fresh)
            before.append(torch.where(again & moved, back, value))
        return before[0], before[1].clamp(min=0), step - (again & (count > 0)).to(step.dtype)

    def extra_repr(self) -> str:
        """The base layer's, r_max and d_max, and a warm-up where there is one."""
        warmup = f", warmup_steps={self.warmup_steps}" if self.warmup_steps else ""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}{warmup}"


def _check_bound(name: str, bound: float | Schedule, least: float) -> None:
    if not callable(bound) and not bound >= least:
        raise InputError(f"expected {name} of {least} or more, or a callable of the step, got {bound}")


def _clipped(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``values`` within the bounds; NaN stays NaN."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return values.clamp(low.to(values.dtype), high.to(values.dtype))
    return values.clamp(float(low), float(high))


class BatchRenorm1d(_BatchRenormLayer, torch.nn.BatchNorm1d):
    r"""Batch renormalization over (N, C) or (N, C, L) input.

    .. math::
        y = \gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta, \qquad
        r = \mathrm{clip}_{[1/r_{max}, r_{max}]}\left(\frac{\sigma_B}{\sigma}\right), \quad
        d = \mathrm{clip}_{[-d_{max}, d_{max}]}\left(\frac{\mu_B - \mu}{\sigma}\right)

    with :math:`\sigma_B = \sqrt{\mathrm{var} + \epsilon}` of the batch and :math:`\mu`, :math:`\sigma = \sqrt{\mathrm
    {running\_var} + \epsilon}` of the running averages as they were before this batch. r and d are constants in the
    gradient. Where neither is clipped, y is what eval would give for the same averages: that is what helps batches too
    small, or too alike, to stand for the population. With ``r_max=1, d_max=0`` it is batch normalization. In eval it is
    batch normalization always.

    Conventions, where torch's and the paper's differ:

    - The averages are torch's: ``running_var`` averages the *variance*, with Bessel's correction unless ``ddof=0``, and
      starts from 1; keys and meaning are those of :class:`torch.nn.BatchNorm1d`, so that a state goes both ways. The
      paper averages the biased :math:`\sigma` instead. The mean of deviations is at most the root of the mean of
      variances, so r is smaller here where batches differ much, and by :math:`\sqrt{(n - 1)/n}` for n values a
      channel: with 2 values r settles at .71, which ``ddof=0`` avoids.
    - ``momentum=0.1`` is torch's weight of the new value; the paper's is .01 (``momentum=0.01`` or ``decay=0.99``).
    - The averages start at 0 and 1, far from any data. The paper trains with ``r_max=1, d_max=0`` at first and then
      lets both grow (5,000 steps, then up to 3 and 5): see ``warmup_steps`` and :class:`LinearRamp`.

    When activation checkpointing runs a forward again, r and d are those of the first run if the averages have moved
    for this batch only: not where the layer is called several times before the backward, nor for ``momentum=1``.

    Args:
        *args, **kwargs: as :class:`batchnorm.nn.BatchNorm1d`.
        r_max: the bound of r, 1 or more: a number, or a callable that is given the step as a 0-d tensor, and made of
            torch functions if it is to be compiled. The step is ``num_batches_tracked`` before this batch is counted,
            0 for the first.
        d_max: the bound of d, in units of the running deviation; a number or a callable, as ``r_max``.
        warmup_steps: for so many steps r is 1 and d is 0: plain batch normalization, while the averages settle.

    Shape: as :class:`batchnorm.nn.BatchNorm1d`.

    Raises:
        InputError: (ValueError) a bound or number of steps out of range, ``track_running_stats=False``.

    Source: S. Ioffe (2017), "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    Algorithm 1.
    """


class BatchRenorm2d(_BatchRenormLayer, torch.nn.BatchNorm2d):
    """Batch renormalization over (N, C, H, W) input. See :class:`BatchRenorm1d`."""


class BatchRenorm3d(_BatchRenormLayer, torch.nn.BatchNorm3d):
    """Batch renormalization over (N, C, D, H, W) input. See :class:`BatchRenorm1d`."""
