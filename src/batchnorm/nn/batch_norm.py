"""Batch normalization as layers: thin state (gamma, beta, running statistics) over :mod:`batchnorm.ops`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm._errors import InputError
from batchnorm.ops import functional, jagged
from batchnorm.ops.arguments import check_inference_weight, positions
from batchnorm.ops.functional import SINGLE_VALUE_POLICIES, Activation, OnSingleValue
from batchnorm.ops.schema import ACTIVATIONS


class Averages(NamedTuple):
    """The buffers that a training forward moves: None where there are none, or where they are to be left alone."""

    mean: Tensor | None
    var: Tensor | None
    num_batches: Tensor | None


class _BatchNormLayer(torch.nn.modules.batchnorm._BatchNorm):
    """What all layers have in common. Mixed into torch's own classes, so that ``isinstance`` answers as before.

    Programs find batch norm by its class: to keep it out of weight decay, to initialise it, to recalibrate or convert
    it.

    ``forward`` checks, prepares the mask and chooses the statistics; a kind of batch norm overrides
    :meth:`_normalize_by_batch` (how a training batch is normalized, and what is remembered of it),
    :meth:`_normalize_by_running` (eval), or a smaller step.
    """

    # On the class too: layers pickled by torch, or by an older version, have none.
    activation: Activation | None = None
    ddof: int = 1
    on_single_value: OnSingleValue = "raise"
    inference_weight: float = 0.0

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
        decay: float | None = None,
        ddof: int = 1,
        on_single_value: OnSingleValue = "raise",
        inference_weight: float = 0.0,
    ) -> None:
        if decay is not None:
            momentum = _momentum(momentum, decay)
        # The base class of older torch versions knows no bias=, so that it is taken away afterwards.
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self._set_policies(activation, ddof, on_single_value, inference_weight)

    def _set_policies(
        self, activation: Activation | None, ddof: int, on_single_value: OnSingleValue, inference_weight: float
    ) -> None:
        if activation is not None:
            check_choice("activation", activation, ACTIVATIONS[1:])
        check_choice("ddof", ddof, (0, 1))
        check_choice("on_single_value", on_single_value, SINGLE_VALUE_POLICIES)
        if on_single_value == "running" and not self.track_running_stats:
            raise InputError('on_single_value="running" needs running statistics, got track_running_stats=False')
        check_inference_weight(inference_weight)
        self.activation = activation
        self.ddof = ddof
        self.on_single_value = on_single_value
        self.inference_weight = inference_weight

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
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """y = activation(gamma * x_hat + beta + residual), see :func:`batchnorm.nn.functional.batch_norm`.

        Args:
            weight, bias: gamma and beta for this call in place of the layer's own: (C,), or (N, C) for each sample's.
        """
        self._check_input_dim(input)
        if weight is None:
            weight = _held(self, self._parameters, "weight")
        if bias is None:
            bias = _held(self, self._parameters, "bias")
        if input.is_nested:
            if mask is not None or lengths is not None:
                raise InputError("expected no mask or lengths with a nested input, which has lengths of its own")
            return self._normalize_nested(input, weight, bias, residual)
        real = None if mask is None and lengths is None else positions(input, mask, lengths)
        if self._uses_batch():
            return self._normalize_by_batch(input, real, weight, bias, residual)
        return self._normalize_by_running(input, real, weight, bias, residual)

    def _normalize_nested(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """A nested (jagged) input, as the dense batch of its values."""
        packed = jagged.Packed(input, any(tensor is not None and tensor.dim() == 2 for tensor in (weight, bias)))
        normalize = self._normalize_by_batch if self._uses_batch() else self._normalize_by_running
        weight, bias = packed.per_position(weight), packed.per_position(bias)
        residual = None if residual is None else packed.pack(residual)
        return packed.unpack(normalize(packed.x, packed.mask, weight, bias, residual))

    def _uses_batch(self) -> bool:
        """Whether this forward takes the statistics of its batch. As in torch, without buffers it does in eval too."""
        return self.training or _held(self, self._buffers, "running_mean") is None

    def _normalize_by_batch(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """Normalize with the statistics of the batch and move :meth:`_averages`. ``mask`` is (N, *spatial) or None."""
        mean, var, num_batches = self._averages()
        momentum = self.momentum
        if mean is None and self.on_single_value == "running":
            mean, var, momentum = self.running_mean, self.running_var, 0.0  # to be used, not to be moved
        return functional.batch_norm(
            input,
            mean,
            var,
            weight,
            bias,
            True,
            momentum,
            self.eps,
            mask=mask,
            residual=residual,
            activation=self.activation,
            ddof=self.ddof,
            num_batches_tracked=num_batches,
            on_single_value=self.on_single_value,
            group=self._shares_with(input),
        )

    def _normalize_by_running(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """Normalize with the running statistics, which stay as they are."""
        return functional.batch_norm(
            input,
            _held(self, self._buffers, "running_mean"),
            _held(self, self._buffers, "running_var"),
            weight,
            bias,
            False,
            self.momentum,
            self.eps,
            mask=mask,
            residual=residual,
            activation=self.activation,
            inference_weight=self.inference_weight,
        )

    def _shares_with(self, _input: Tensor) -> Any:
        """The process group whose batch the input of a forward is a part of; None where it is a whole batch."""
        return None

    def _averages(self) -> Averages:
        """What a training forward moves: nothing in eval, and nothing when tracking was switched off.

        Whoever moves them does it through :func:`batchnorm.ops.averages.update`, which knows a recomputation.
        """
        if not self.training or not self.track_running_stats:
            return Averages(None, None, None)
        buffers = self._buffers
        return Averages(
            _held(self, buffers, "running_mean"),
            _held(self, buffers, "running_var"),
            _held(self, buffers, "num_batches_tracked"),
        )

    def extra_repr(self) -> str:
        """Torch's, and what differs from the defaults."""
        parts: list[str] = [super().extra_repr()]
        for name in ("activation", "ddof", "on_single_value", "inference_weight"):
            value = getattr(self, name)
            if value != getattr(_BatchNormLayer, name):
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


def _held(layer: torch.nn.Module, kept: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """``getattr(layer, name)``, without a module's long way to its tensors: five of them are a tenth of a small step.

    A parametrized tensor, and that of a replica, is not among those that the module keeps.
    """
    if name in kept:
        return kept[name]
    found: Tensor | None = getattr(layer, name)
    return found


def _momentum(momentum: float | None, decay: float) -> float:
    """The momentum that is the complement of ``decay`` (the weight of the old value: Keras, Flax, the paper)."""
    if momentum != 0.1:
        raise InputError(f"expected momentum or decay, got both: momentum={momentum}, decay={decay}")
    if not (math.isfinite(decay) and 0 <= decay <= 1):
        raise InputError(f"expected decay between 0 and 1, got {decay}")
    return 1 - decay


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
        decay: the weight of the old value, 1 - momentum; instead of momentum, for those who think in Keras's terms.
        ddof: 1 for an unbiased running variance (torch), 0 for a biased one (Keras, Flax, ONNX).
        on_single_value: what a training batch with one (real) value per channel does, which has no deviation. "raise":
            an error, as in torch; "running": it is normalized with the running statistics; "skip": it is not
            normalized, y = activation(gamma * x + beta + residual). The last two count and update nothing.
        inference_weight: how much a sample counts in the statistics of its own inference, 0 to 1 (Summers & Dinneen
            2020, section 3.1); small values close the gap between training and inference.

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
