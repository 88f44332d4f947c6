"""A linear layer whose input is whitened without changing what it computes: the statistics stay out of the gradient.

That is the way out of what :mod:`batchnorm.nn.outside` shows: whatever the statistics become, the parameters are
re-expressed so that the network computes what it did before, and no step of training is undone.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.ops import averages, whitening
from batchnorm.ops.roots import tolerance
from batchnorm.ops.schema import statistics_dtype


class WhitenedLinear(torch.nn.Module):
    r"""A linear layer in coordinates in which its input is white: the same functions, better conditioned.

    .. math:: y = V \, U (x - c) + d

    V (``weight``) and d (``bias``) are learned; U (``whitening``, symmetric) and c (``center``) are constants, at first
    I and 0, so that the layer begins as :class:`torch.nn.Linear`. :meth:`reproject` makes U and c anew of the running
    statistics of the input and re-expresses V and d, so that y is the same function of x. That keeps the statistics out
    of the gradient without the failure of :class:`NormOutsideGradient`: no step is undone, because nothing that the
    network computes changes. What changes is the metric of the gradient step: with white input plain SGD on V is close
    to a natural gradient step on the canonical weight V U.

    Call ``reproject()`` between optimizer steps, after some batches and then every so many (the paper's T is 100 and
    more): it costs an eigenvalue decomposition of (in_features, in_features). The parameters are changed in place. The
    optimizer's memory (momentum, Adam's moments) stays in the old coordinates: use plain SGD, or clear the state.
    Weight decay acts on V, not on the canonical weight.

    Training moves the running mean and covariance of the input; eval computes the same y and moves nothing. Under
    DistributedDataParallel U and c must be the same on all ranks: call ``reproject()`` on each after the buffers have
    been broadcast.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`, and initialised as that.
        eps: added to the variance of each direction, in units of x squared.
        momentum: the weight of a new batch in the running statistics; None for the cumulative average.

    Directions whose variance is at most ``4 sqrt(in_features) eps`` of the largest, with the eps of the dtype of the
    running covariance, are left alone: U neither magnifies nor drops them.

    Shape: input (N, \*, in_features), output (N, \*, out_features); ``mask`` boolean (N, \*) or broadcastable to it,
    True where a row is real: statistics are over real rows, the output is zero elsewhere.

    Raises:
        ShapeError: (ValueError, RuntimeError) an input of another width, a mask that does not fit.
        InputError: (ValueError) an eps that is not positive.

    Source: Desjardins, Simonyan, Pascanu & Kavukcuoglu (2015), "Natural Neural Networks", algorithm 1 (PRONG).
    """

    bias: torch.nn.Parameter | None
    running_mean: Tensor
    running_cov: Tensor
    num_batches_tracked: Tensor
    center: Tensor
    whitening: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        if not eps > 0:
            raise InputError(f"expected eps to be positive, got {eps}")
        made = torch.nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features, self.eps, self.momentum = in_features, out_features, eps, momentum
        self.weight = made.weight
        self.register_parameter("bias", made.bias)
        like = made.weight.detach()
        self.register_buffer("running_mean", like.new_zeros(in_features))
        self.register_buffer("running_cov", torch.eye(in_features, device=like.device, dtype=like.dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=like.device))
        # d alone has no place for V U c: without a bias nothing is centred.
        self.register_buffer("center", like.new_zeros(in_features))
        self.register_buffer("whitening", torch.eye(in_features, device=like.device, dtype=like.dtype))

    @classmethod
    def from_linear(cls, layer: torch.nn.Linear, *, eps: float = 1e-5, momentum: float | None = 0.1) -> Self:
        """The same function as ``layer``, with its parameters copied."""
        weight = layer.weight
        made = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            weight.device,
            weight.dtype,
            eps=eps,
            momentum=momentum,
        )
        with torch.no_grad():
            made.weight.copy_(weight)
            if made.bias is not None:
                made.bias.copy_(layer.bias)
        return made

    @torch.no_grad()
    def to_linear(self) -> torch.nn.Linear:
        """A plain layer that computes the same: weight V U and bias d - V U c."""
        weight, bias = self._canonical()
        made = torch.nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.weight.device, self.weight.dtype
        )
        made.weight.copy_(weight)
        if made.bias is not None:
            made.bias.copy_(bias)
        return made

    @torch.no_grad()
    def reproject(self) -> None:
        """Whiten by the running statistics from here on, and re-express V and d so that y stays what it is.

        V' = V U U'^(-1) and d' = d + V U (c' - c), computed in float64 and rounded once. Without a bias c stays 0.
        """
        weight, bias = self._canonical()
        values, vectors = torch.linalg.eigh(self.running_cov.to(weight.dtype))
        kept = values > tolerance(self.in_features, self.running_cov.dtype) * values[-1]
        root = torch.where(kept, (values + self.eps).sqrt(), 1)
        self.whitening.copy_((vectors / root) @ vectors.T)
        self.weight.copy_(weight @ (vectors * root) @ vectors.T)
        if self.bias is not None:
            self.center.copy_(self.running_mean)
            self.bias.copy_(bias + weight @ self.center.to(weight.dtype))

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """y = V U (x - c) + d; in training the running statistics move towards the batch's."""
        if input.dim() < 2 or input.size(-1) != self.in_features:
            raise ShapeError(f"expected an input of shape (N, *, {self.in_features}), got {list(input.shape)}")
        if not input.is_floating_point():
            raise DtypeError(f"expected a floating point input, got {input.dtype}: convert it with .float()")
        if mask is not None:
            if mask.dtype != torch.bool:
                raise DtypeError(f"expected a boolean mask (True = real), got {mask.dtype}")
            try:
                mask = mask.expand(input.shape[:-1])
            except RuntimeError:
                raise ShapeError(
                    f"expected a mask broadcastable to {list(input.shape[:-1])}, got {list(mask.shape)}"
                ) from None
        x = input if mask is None else torch.where(mask.unsqueeze(-1), input, 0)
        if self.training:
            self._remember(x, mask)
        # Half precision would round between the two products.
        wide = torch.promote_types(x.dtype, torch.float32)
        with whitening.full_precision(x):
            white = linear(x.to(wide) - self.center.to(wide), self.whitening.to(wide))
            y = linear(white, self.weight.to(wide), None if self.bias is None else self.bias.to(wide))
        y = y.to(_output_dtype(x))
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0)

    def _remember(self, input: Tensor, mask: Tensor | None) -> None:
        rows, real = input.reshape(-1, self.in_features), None if mask is None else mask.reshape(-1)
        batch = whitening.statistics(rows, self.in_features, real)
        averages.update(
            self.running_mean,
            self.running_cov,
            self.num_batches_tracked,
            batch.mean,
            batch.cov[0],
            batch.number,
            self.momentum,
            0,
            masked=mask is not None,
        )

    def _canonical(self) -> tuple[Tensor, Tensor]:
        """V U and d - V U c, of the statistics' dtype; d is 0 where there is none."""
        wide = statistics_dtype(self.weight.device)
        weight = self.weight.to(wide) @ self.whitening.to(wide)
        bias = weight.new_zeros(self.out_features) if self.bias is None else self.bias.to(wide)
        return weight, bias - weight @ self.center.to(wide)

    def extra_repr(self) -> str:
        """As torch.nn.Linear's, and eps."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"eps={self.eps}"
        )


def _output_dtype(x: Tensor) -> torch.dtype:
    """x's own, or under autocast that of a linear layer."""
    if x.dtype != torch.float64 and whitening.autocasting(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
