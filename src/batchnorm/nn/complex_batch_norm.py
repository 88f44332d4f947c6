"""Batch norm for complex numbers, as a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import DtypeError, ShapeError
from batchnorm.nn.batch_norm import Averages, _BatchNormLayer
from batchnorm.ops import averages, complex_whitening
from batchnorm.ops.arguments import check_eps, real_values, single_value
from batchnorm.ops.functional import Activation, OnSingleValue
from batchnorm.ops.schema import statistics_dtype


class _ComplexBatchNormLayer(_BatchNormLayer):
    """Its parameters and statistics are real, so that ``.double()`` and optimizers treat them as ever."""

    running_covar: Tensor | None

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
    ) -> None:
        check_eps(eps, training=True)
        dtype = dtype.to_real() if dtype is not None and dtype.is_complex else dtype
        super().__init__(
            num_features,
            eps,
            momentum,
            False,
            track_running_stats,
            device,
            dtype,
            activation=activation,
            decay=decay,
            ddof=ddof,
            on_single_value=on_single_value,
        )
        self.affine = affine
        if affine:
            self.weight = torch.nn.Parameter(torch.empty(num_features, 3, device=device, dtype=dtype))
            if bias:
                self.bias = torch.nn.Parameter(torch.empty(num_features, 2, device=device, dtype=dtype))
        self.register_buffer("running_var", None)
        self.register_buffer("running_covar", None)
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(num_features, 2, device=device, dtype=dtype))
            self.register_buffer("running_covar", torch.zeros(num_features, 3, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, covariance diag(1, 1) / sqrt(2), no batches counted."""
        mean, covariance, num_batches = (
            self._buffers.get(name) for name in ("running_mean", "running_covar", "num_batches_tracked")
        )
        if mean is not None and covariance is not None and num_batches is not None:
            mean.zero_()
            _diagonal(covariance)
            num_batches.zero_()

    def reset_parameters(self) -> None:
        """gamma = diag(1, 1) / sqrt(2), so that E|y|^2 is 1; beta = 0; the running statistics as new."""
        self.reset_running_stats()
        if self.weight is not None:
            _diagonal(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _normalize_nested(self, input: Tensor, *_: Any) -> Tensor:
        raise DtypeError(
            "expected a dense complex input with a mask or lengths, "
            f"got a nested {input.dtype}: torch has no gradient for those"
        )

    def _averages(self) -> Averages:
        if not self.training or not self.track_running_stats:
            return Averages(None, None, None)
        return Averages(self.running_mean, self.running_covar, self.num_batches_tracked)

    def _normalize_by_batch(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        self._check(input, weight, bias, residual)
        values = input.size(0) * math.prod(input.shape[2:]) if mask is None else real_values(mask)
        if values == 1 and self.on_single_value == "raise":
            raise single_value(input, mask)
        count, mean, covariance = complex_whitening.stats(input, mask)
        used_mean, root = mean, complex_whitening.inverse_root(covariance, self.eps)
        averaged = count
        if self.on_single_value != "raise" and (values is None or values == 1):
            single = count == 1
            other_mean, other_root = self._population(mean)
            used_mean, root = torch.where(single, other_mean, mean), torch.where(single, other_root, root)
            averaged = torch.where(single, 0, count)
        running_mean, running_covar, num_batches = self._averages()
        averages.update(
            running_mean,
            running_covar,
            num_batches,
            mean,
            covariance,
            averaged,
            self.momentum,
            self.ddof,
            masked=mask is not None or values == 1,
        )
        act = self.activation or "none"
        return complex_whitening.normalize(input, used_mean, root, weight, bias, residual, mask, act)

    def _normalize_by_running(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        self._check(input, weight, bias, residual)
        mean, root = self._statistics(statistics_dtype(input.device))
        act = self.activation or "none"
        return complex_whitening.normalize(input, mean, root, weight, bias, residual, mask, act)

    def _population(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What a single value is normalized with: the running statistics, or nothing."""
        if self.on_single_value == "running":
            return self._statistics(like.dtype)
        return torch.zeros_like(like), like.new_tensor([1.0, 1.0, 0.0])

    def _statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_covar is not None
        # Copies: a later training step moves the buffers in place, and the backward of this call must not notice.
        mean = self.running_mean.detach().to(dtype, copy=True)
        covariance = self.running_covar.detach().to(dtype, copy=True)
        return mean, complex_whitening.inverse_root(covariance, self.eps)

    def _check(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
        if not x.is_complex():
            raise DtypeError(f"expected a complex input, got {x.dtype}: BatchNorm layers are for real numbers")
        if x.size(1) != self.num_features:
            raise ShapeError(f"expected an input with {self.num_features} channels, got {list(x.shape)}")
        for name, tensor, width in (("weight", weight, 3), ("bias", bias, 2)):
            shapes = ((x.size(1), width), (x.size(0), x.size(1), width))
            if tensor is not None and tensor.shape not in shapes:
                raise ShapeError(f"expected {name} of shape {shapes[0]} or {shapes[1]}, got {tuple(tensor.shape)}")
        if residual is not None and (residual.shape != x.shape or not residual.is_complex()):
            raise ShapeError(
                f"expected a complex residual of the input's shape {list(x.shape)}, "
                f"got {residual.dtype} {list(residual.shape)}"
            )


def _diagonal(symmetric: Tensor) -> None:
    with torch.no_grad():
        symmetric.copy_(symmetric.new_tensor([2**-0.5, 2**-0.5, 0.0]).expand_as(symmetric))


class ComplexBatchNorm1d(_ComplexBatchNormLayer):
    r"""Batch normalization over complex (N, C) or (N, C, L) input.

    .. math::
        y = \Gamma \, (V + \epsilon I)^{-1/2} \begin{pmatrix} \Re(x - \mathrm{mean}) \\ \Im(x - \mathrm{mean})
            \end{pmatrix} + \beta

    with V the 2 x 2 covariance of real and imaginary part of a channel: each has variance 1 afterwards and they are
    uncorrelated, which no division by one deviation achieves. In training, mean and (biased) V are those of the batch,
    inside the gradient, and the running averages move towards them (V with Bessel's correction for ``ddof=1``); in eval
    the running averages take their place.

    ``weight`` (gamma) is (C, 3), the entries rr, ii and ri of a symmetric matrix, diag(1, 1) / sqrt(2) at first, so
    that the mean of ``|y|^2`` is 1; ``bias`` is (C, 2), ``running_mean`` (C, 2) and ``running_covar`` (C, 3). All are
    real. Statistics are computed in float64.

    Args:
        dtype: of the parameters, real; a complex one stands for its real part.
        activation: applied to real and imaginary part each ("relu" gives the CReLU of the paper).

    The other arguments are those of :class:`BatchNorm1d`.

    Shape: input, output and ``residual`` (N, C) or (N, C, L); ``mask`` (N,) or (N, L); ``weight`` and ``bias`` given to
    ``forward`` (C, 3) and (C, 2), or with a leading N for each sample's own.

    Raises:
        DtypeError: (TypeError, RuntimeError) the input is not complex, or nested.
        ShapeError: (ValueError, RuntimeError) as :class:`BatchNorm1d`.

    Source: Trabelsi et al. (2018), "Deep Complex Networks", section 3.5.
    """

    _check_input_dim = torch.nn.BatchNorm1d._check_input_dim


class ComplexBatchNorm2d(_ComplexBatchNormLayer):
    """Batch normalization over complex (N, C, H, W) input. See :class:`ComplexBatchNorm1d`."""

    _check_input_dim = torch.nn.BatchNorm2d._check_input_dim


class ComplexBatchNorm3d(_ComplexBatchNormLayer):
    """Batch normalization over complex (N, C, D, H, W) input. See :class:`ComplexBatchNorm1d`."""

    _check_input_dim = torch.nn.BatchNorm3d._check_input_dim
