"""Batch normalization as layers: thin state (gamma, beta, running statistics) over :mod:`batchnorm.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm.ops import functional
from batchnorm.ops.functional import Activation
from batchnorm.ops.schema import ACTIVATIONS


class _BatchNormLayer(torch.nn.modules.batchnorm._BatchNorm):
    """What the three layers have in common. Mixed into torch's own classes, so that ``isinstance`` answers as before.

    Programs find batch norm by its class: to keep it out of weight decay, to initialise it, to recalibrate or convert
    it.
    """

    activation: Activation | None = None  # on the class too: layers pickled by torch have none

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
    ) -> None:
        if activation is not None:
            check_choice("activation", activation, ACTIVATIONS[1:])
        # The base class of older torch versions knows no bias=, so that it is taken away afterwards.
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def reset_parameters(self) -> None:
        """gamma = 1, beta = 0, running mean 0, running variance 1, no batches counted."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """y = activation(gamma * x_hat + beta + residual), see :func:`batchnorm.nn.functional.batch_norm`."""
        self._check_input_dim(input)
        # A module looks its tensors up by name, one slow call each: once is enough.
        running_mean, running_var = self.running_mean, self.running_var
        training, tracked = self.training, running_mean is not None and running_var is not None
        # As in torch: without buffers a layer normalizes with its batch, in eval too; and buffers that are no longer to
        # be tracked are used in eval and left alone in training.
        if training and not self.track_running_stats:
            running_mean = running_var = None
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training or not tracked,
            self.momentum,
            self.eps,
            mask=mask,
            lengths=lengths,
            residual=residual,
            activation=self.activation,
            num_batches_tracked=self.num_batches_tracked if training and self.track_running_stats else None,
        )

    def extra_repr(self) -> str:
        """Torch's, and the activation where there is one."""
        base: str = super().extra_repr()
        return base if self.activation is None else f"{base}, activation={self.activation!r}"


class BatchNorm1d(_BatchNormLayer, torch.nn.BatchNorm1d):
    r"""Batch normalization over (N, C) or (N, C, L) input.

    .. math::
        y = \mathrm{activation}\left(\gamma \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta
            + \mathrm{residual}\right)

    A drop-in for :class:`torch.nn.BatchNorm1d`: the same arguments, defaults and ``state_dict``, and an instance of
    it. In training, mean and biased var are those of the batch and per channel, and the running averages move towards
    them (the variance with Bessel's correction, as torch does). In eval the running averages take their place.

    What differs: statistics are float64, so that a mean much larger than the deviation costs no accuracy;
    ``activation`` and ``residual`` are part of the same operator; ``forward`` takes a ``mask`` or ``lengths`` for
    padded input.

    Args:
        num_features: C.
        eps: added to var, in units of x squared.
        momentum: the weight of the new value in the running averages; None for the cumulative average.
        affine: learn gamma (``weight``) and beta (``bias``).
        track_running_stats: keep running averages; without them, eval normalizes with its batch too.
        bias: with False, learn no beta.
        activation: "relu", "leaky_relu" (slope 0.01), "silu", "gelu" (exact), "hardswish" or None.

    Shape: input and output (N, C) or (N, C, L); ``mask`` (N,) or (N, L); ``lengths`` (N,); ``residual`` as input.

    Raises:
        ValueError, RuntimeError: as torch's layer for the same input (see
            :func:`batchnorm.nn.functional.batch_norm`), before the batch is counted.

    Source: Ioffe & Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", Algorithms 1 and 2.
    """


class BatchNorm2d(_BatchNormLayer, torch.nn.BatchNorm2d):
    """Batch normalization over (N, C, H, W) input; per channel, over N, H and W. See :class:`BatchNorm1d`.

    Shape: input and output (N, C, H, W); ``mask`` (N, H, W); ``residual`` as input.
    """


class BatchNorm3d(_BatchNormLayer, torch.nn.BatchNorm3d):
    """Batch normalization over (N, C, D, H, W) input; per channel, over N, D, H and W. See :class:`BatchNorm1d`.

    Shape: input and output (N, C, D, H, W); ``mask`` (N, D, H, W); ``residual`` as input.
    """
