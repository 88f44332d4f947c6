"""Batch norm that learns its number of channels from its first input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNormLayer, _momentum
from batchnorm.ops import jagged
from batchnorm.ops.functional import Activation, OnSingleValue


class _LazyBatchNormLayer(_BatchNormLayer):
    """torch's lazy construction, with our arguments. To be mixed into torch's lazy classes."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        decay: float | None = None,
        ddof: int = 1,
        on_single_value: OnSingleValue = "raise",
        inference_weight: float = 0.0,
    ) -> None:
        if decay is not None:
            momentum = _momentum(momentum, decay)
        lazily: Any = torch.nn.modules.batchnorm._LazyNormBase.__init__
        lazily(self, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self._set_policies(activation, ddof, on_single_value, inference_weight)

    def reset_parameters(self) -> None:
        """As of the layer that this becomes; nothing before."""
        this: Any = self
        if not this.has_uninitialized_params() and self.num_features != 0:
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, **_: Any) -> None:
        """Make gamma, beta and the running statistics for the channels of the input, whatever comes with it."""
        self._check_input_dim(input)
        parent: Any = super()
        parent.initialize_parameters(
            torch.empty(1, jagged.channels(input), device="meta") if input.is_nested else input
        )


class LazyBatchNorm1d(_LazyBatchNormLayer, torch.nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` without ``num_features``: its first input tells, and makes it one.

    The other arguments are those of :class:`BatchNorm1d`, in its order. As with all lazy modules of torch, make the
    optimizer after the first forward.
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNormLayer, torch.nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` without ``num_features``. See :class:`LazyBatchNorm1d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNormLayer, torch.nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` without ``num_features``. See :class:`LazyBatchNorm1d`."""

    cls_to_become = BatchNorm3d
