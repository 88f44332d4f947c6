"""The loss of Deep CORAL: how far apart two domains' activations are in their covariance."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.moments import bessel_factor


def coral_loss(source: Tensor, target: Tensor, *, ddof: int = 1) -> Tensor:
    """``|C_s - C_t|_F^2 / (4 d^2)``, the squared distance between the covariances of two domains.

    ``C = sum_i (x_i - mean)(x_i - mean)^T / (n - ddof)`` over the n samples of a domain, d its channels. Added to the
    loss on labelled source data, it draws a layer's activations on unlabelled target data towards those on the source.
    It does not see means, and is least, at 0, where a layer puts out a constant: the other loss must prevent that.

    Args:
        source, target: activations of one layer, (N, C) or (N, C, *), each with its own N and *; a position of * is a
            sample. The loss does not depend on their order: leave out padding by ``x.movedim(1, -1)[mask]``.
        ddof: 1 for the unbiased covariances of the paper, 0 for biased ones.

    Returns:
        A scalar, at least 0. float16 and bfloat16 are computed in float32, under autocast too, and give a float32 loss.

    Raises:
        ShapeError: fewer than two dimensions, no channels, or another number of channels.
        InputError: a domain with no more than ``ddof`` samples has no covariance.
        DtypeError: not floating point.

    B. Sun, K. Saenko, "Deep CORAL: correlation alignment for deep domain adaptation", ECCV 2016 workshops, equations 1
    to 3. All derivatives exist; the first are the paper's equations 5 and 6.
    """
    if isinstance(ddof, bool) or ddof not in (0, 1):
        raise InputError(f"ddof must be 1 (unbiased covariances) or 0 (biased), got {ddof!r}")
    for name, x in (("source", source), ("target", target)):
        if not x.is_floating_point():
            raise DtypeError(f"expected floating-point activations, got {name} of {x.dtype}: convert them first")
        if x.ndim < 2 or x.shape[1] == 0:
            raise ShapeError(f"expected {name} of shape (N, C) or (N, C, *), got {tuple(x.shape)}")
    if source.shape[1] != target.shape[1]:
        raise ShapeError(
            f"source and target must be activations of one layer, got {source.shape[1]} and {target.shape[1]} channels"
        )
    dtype = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    with _without_autocast(source):
        difference = _covariance("source", source.to(dtype), ddof) - _covariance("target", target.to(dtype), ddof)
        return difference.square().sum() / (4 * source.shape[1] ** 2)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Autocast would round the factors of the products to half precision."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _covariance(name: str, x: Tensor, ddof: int) -> Tensor:
    """(C, C), from deviations."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    number = rows.shape[0]
    if number <= ddof:
        least = "2 samples of each domain for an unbiased covariance" if ddof else "1 sample of each domain"
        raise InputError(f"expected at least {least}, got {number} of {name}")
    deviation = rows - rows.mean(0)
    return deviation.T @ deviation * (bessel_factor(number, ddof) / number)


class CORALLoss(nn.Module):
    """:func:`coral_loss` as a module; training and evaluation are the same, and it has no state.

    Args:
        ddof: 1 for the unbiased covariances of the paper, 0 for biased ones.
    """

    def __init__(self, *, ddof: int = 1) -> None:
        super().__init__()
        if isinstance(ddof, bool) or ddof not in (0, 1):
            raise InputError(f"ddof must be 1 (unbiased covariances) or 0 (biased), got {ddof!r}")
        self.ddof = ddof

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """The loss; shapes and errors are those of :func:`coral_loss`."""
        return coral_loss(source, target, ddof=self.ddof)

    def extra_repr(self) -> str:
        return "" if self.ddof == 1 else f"ddof={self.ddof}"
