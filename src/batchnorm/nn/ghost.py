"""Ghost batch norm (Hoffer et al. 2017): a large batch, normalized as several small ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.nn.batch_norm import _BatchNormLayer
from batchnorm.ops import functional


class _GhostBatchNormLayer(_BatchNormLayer):
    """What the three layers have in common: the cut of a training batch."""

    virtual_batch_size: int

    def __init__(self, *args: Any, virtual_batch_size: int, **kwargs: Any) -> None:
        if virtual_batch_size < 1:
            raise InputError(f"expected virtual_batch_size of 1 or more, got {virtual_batch_size}")
        super().__init__(*args, **kwargs)
        self.virtual_batch_size = virtual_batch_size

    def _normalize_by_batch(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        # A batch that is one ghost takes the base layer's way, and all that it knows of single values.
        if not self.training or input.size(0) <= self.virtual_batch_size:
            return super()._normalize_by_batch(input, mask, weight, bias, residual)
        mean, var, num_batches = self._averages()
        return functional.batch_norm(
            input,
            mean,
            var,
            weight,
            bias,
            True,
            self.momentum,
            self.eps,
            mask=mask,
            residual=residual,
            activation=self.activation,
            ddof=self.ddof,
            num_batches_tracked=num_batches,
            virtual_batch_size=self.virtual_batch_size,
        )

    def _normalize_nested(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        if self.training:  # packed, its rows would be positions
            raise InputError(
                "expected a padded input with a mask or lengths, got a nested one, whose rows cannot be cut"
            )
        return super()._normalize_nested(input, weight, bias, residual)

    def extra_repr(self) -> str:
        """The base layer's, and the virtual batch size."""
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class GhostBatchNorm1d(_GhostBatchNormLayer, torch.nn.BatchNorm1d):
    r"""Ghost batch normalization over (N, C) or (N, C, L) input.

    In training a batch is cut into virtual batches, ghosts, of ``virtual_batch_size`` samples in their order, and each
    is normalized with its own statistics:

    .. math::
        y_n = \gamma \frac{x_n - \mathrm{mean}_g}{\sqrt{\mathrm{var}_g + \epsilon}} + \beta, \qquad
        g = \lfloor n / \mathrm{virtual\_batch\_size} \rfloor

    The layer is what a plain one would be if it were called with one ghost after the other: the running averages move
    once for each ghost, and ``num_batches_tracked`` counts ghosts. In eval, and where a batch is no larger than one
    ghost, it is plain batch normalization.

    The last ghost is smaller where N is not divisible. Where it would be a single value a channel (one sample of
    (N, C) input), it joins the one before. A ghost of which a mask leaves nothing
    moves no average and is not counted; one value makes x_hat 0 and moves the mean only. Nested input is for eval: in
    training pad it.

    Algorithm 1 of the paper weights ghost i (1 to k) by :math:`\eta (1 - \eta)^i` and the old average by a power of
    :math:`1 - \eta` whose exponent it writes as the ghost's size. With k for that exponent, the order of the ghosts
    reversed, which matters for no expectation, and i from 0, without which the weights do not sum to 1, that is
    :math:`(1 - \eta)^k \mathrm{running} + \sum_i \eta (1 - \eta)^{k - i} \mathrm{batch}_i`: one ghost after the other,
    as here. The paper averages deviations; here it is torch's unbiased variance, or with ``ddof=0`` the biased one.
    ``momentum`` is per ghost: k ghosts forget as much of the past as k batches.

    Args:
        *args, **kwargs: as :class:`batchnorm.nn.BatchNorm1d`.
        virtual_batch_size: samples in a ghost, 1 or more; 1 only where a sample has several positions.

    Shape: as :class:`batchnorm.nn.BatchNorm1d`.

    Raises:
        InputError: (ValueError) ``virtual_batch_size`` is less than 1.
        ShapeError: (ValueError, RuntimeError) every ghost would be a single value a channel.

    Source: E. Hoffer, I. Hubara, D. Soudry (2017), "Train longer, generalize better: closing the generalization gap in
    large batch training of neural networks", Algorithm 1.
    """


class GhostBatchNorm2d(_GhostBatchNormLayer, torch.nn.BatchNorm2d):
    """Ghost batch normalization over (N, C, H, W) input. See :class:`GhostBatchNorm1d`."""


class GhostBatchNorm3d(_GhostBatchNormLayer, torch.nn.BatchNorm3d):
    """Ghost batch normalization over (N, C, D, H, W) input. See :class:`GhostBatchNorm1d`."""
