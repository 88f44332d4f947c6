"""Normalization with statistics as constants: the alternative that Ioffe & Szegedy (2015), section 2, say fails."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm._errors import InputError
from batchnorm.nn.whitening import _WhiteningLayer
from batchnorm.ops import averages, reference, whitening
from batchnorm.ops.arguments import check_residual, single_value
from batchnorm.ops.functional import Activation
from batchnorm.ops.roots import Eigen, Root, tolerance
from batchnorm.ops.schema import statistics_dtype
from batchnorm.ops.whitening import Given

Kind = Literal["mean", "mean-variance", "whitening"]
KINDS = ("mean", "mean-variance", "whitening")


class NormOutsideGradient(_WhiteningLayer):
    r"""Normalization with statistics of the batch that count as constants: no gradient flows through them.

    ``y = activation(gamma * W (x - mean) + beta + residual)``, with mean and W of the batch of the latest refresh,
    where W is I for kind "mean", ``(var + eps)^(-1/2)`` for "mean-variance" and, per group of channels, the symmetric
    ``(S + eps I)^(-1/2)`` for "whitening". The gradient of x is ``W^T diag(gamma) dy`` and nothing else. In eval the
    running statistics take their place.

    **This is the alternative that does not work**, made to be looked at. The loss that a step predicts to fall does
    not: with kind "mean" and a bias b before the layer, ``u + b - mean(u + b)`` does not depend on b; the gradient says
    that it does, so every step moves b by the same amount, the loss stays, and b grows without bound. With a scale
    before "mean-variance" the same holds for the scale. Use :class:`batchnorm.nn.BatchNorm1d`, or
    :class:`batchnorm.nn.DecorrelatedBatchNorm` for whitening, whose gradients know the statistics.

    Args:
        num_features: C. kind: "mean", "mean-variance" or "whitening". every: statistics are taken from every so many
        training batches, the first included, and held between. group_size: channels of a group for "whitening", which
        divides C; C where None. eps, momentum, affine, bias, activation, decay, ddof: as
        :class:`batchnorm.nn.BatchNorm1d`; momentum is a number,
            and weighs a refresh. A direction without variance is dropped as in
            :class:`batchnorm.nn.DecorrelatedBatchNorm`.

    State: ``held_mean`` (C,) and ``held_cov`` (g, G, G), those of the latest refresh, beside the running statistics
    (G is 1 unless the kind is "whitening").

    Shape: input and output (N, C, \*spatial) with 0 to 3 spatial dimensions; ``mask`` (N, \*spatial).

    Raises:
        InputError: (ValueError) unknown kind, ``every`` below 1, a group_size that does not fit.
        ShapeError, DtypeError: as :class:`batchnorm.nn.BatchNorm1d`.

    Source: Ioffe & Szegedy (2015), section 2, "Towards Reducing Internal Covariate Shift".
    """

    held_mean: Tensor
    held_cov: Tensor

    def __init__(
        self,
        num_features: int,
        kind: Kind = "mean-variance",
        every: int = 1,
        group_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        decay: float | None = None,
        ddof: int = 1,
    ) -> None:
        check_choice("kind", kind, KINDS)
        if every < 1:
            raise InputError(f"expected every to be 1 or more, got {every}")
        if momentum is None:
            raise InputError("expected momentum to be a number, got None: the cumulative average is not kept here")
        if group_size is not None and kind != "whitening":
            raise InputError(f'expected group_size with kind="whitening" alone, got {group_size} with {kind!r}')
        size = (num_features if group_size is None else group_size) if kind == "whitening" else 1
        super().__init__(
            num_features,
            size,
            eps,
            momentum,
            affine,
            True,
            device,
            dtype,
            bias=bias,
            activation=activation,
            decay=decay,
            ddof=ddof,
        )
        self.kind, self.every = kind, every
        mean, cov = self._running()
        self.register_buffer("held_mean", mean.clone())
        self.register_buffer("held_cov", cov.clone())

    def reset_running_stats(self) -> None:
        """Running and held mean 0, covariance the identity, no batches counted: the next batch is a refresh."""
        super().reset_running_stats()
        if "held_mean" in self._buffers:
            mean, cov = self._running()
            self.held_mean.copy_(mean)
            self.held_cov.copy_(cov)

    def _running(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_cov is not None
        return self.running_mean, self.running_cov

    def _root(self, dtype: torch.dtype) -> Root:
        return Eigen(self.eps, tolerance(self.group_size, dtype))

    def _given(self, x: Tensor, mean: Tensor, cov: Tensor) -> Given:
        if self.kind == "mean":
            wide = statistics_dtype(x.device)
            return Given(mean.detach().to(wide, copy=True), torch.ones_like(cov, dtype=wide))
        return whitening.population(x, mean, cov, self._plan(cov.dtype))

    def _population(self, like: Tensor) -> Given:
        return self._given(like, *self._running())

    def _normalize_by_batch(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        self._check(input, weight, bias, training=True)
        if residual is not None:
            residual = check_residual(input, residual)
        values = whitening.values_per_channel(input, mask)
        if values == 1:
            raise single_value(input, mask)
        # A recomputation is of a batch that has been looked at. (While torch.compile traces, update asks in its graph.)
        if values != 0 and (torch.compiler.is_compiling() or not averages.in_backward()):
            self._refresh(input, mask)
        plan = self._plan(input.dtype, mask)._replace(given=self._given(input, self.held_mean, self.held_cov))
        return whitening.whiten(input, weight, bias, residual, plan, self.activation or "none")[0]

    @torch.no_grad()
    def _refresh(self, x: Tensor, mask: Tensor | None) -> None:
        """Count the batch; every so often hold its statistics and move the running ones."""
        number = self.num_batches_tracked
        assert number is not None
        due = number % self.every == 0
        # Where nobody can be asked now, what is not due is computed and not used.
        unknown = x.is_meta or torch.compiler.is_compiling() or reference.composing()
        if not unknown and not due:
            number.add_(1)
            return
        batch = whitening.statistics(x, self.group_size, mask)
        count = torch.where(due, batch.number, 0)
        for held, new in ((self.held_mean, batch.mean), (self.held_cov, batch.cov)):
            held.copy_(torch.where(count > 0, new.to(held.dtype), held))
        moments = (batch.mean, batch.cov)
        averages.update(None, None, number, *moments, batch.number, None, self.ddof, masked=mask is not None)
        averages.update(*self._running(), None, *moments, count, self.momentum, self.ddof, masked=True)

    def extra_repr(self) -> str:
        """Torch's, the kind and the interval."""
        return f"{super().extra_repr()}, kind={self.kind!r}, every={self.every}"
