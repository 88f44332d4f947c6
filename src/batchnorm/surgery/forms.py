"""What a batch norm's statistics are made of: count, mean and sums of products, for each kind of layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm._errors import SurgeryError
from batchnorm.moments import pooled
from batchnorm.nn.complex_batch_norm import _ComplexBatchNormLayer
from batchnorm.nn.recognition import Layer
from batchnorm.nn.whitening import _WhiteningLayer
from batchnorm.ops import complex_whitening, whitening


class Statistics(NamedTuple):
    """What is known of a layer's input, each flat and float64.

    Attributes:
        number: values a channel, (1,).
        mean: (M,): a number a channel, two for complex ones.
        products: sums of products of deviations from the mean, (P,), in the order of the layer's second buffer.
    """

    number: Tensor
    mean: Tensor
    products: Tensor


class Form:
    """Which second moments a layer keeps: here the variance of each channel, in ``running_var``."""

    buffer = "running_var"

    def __init__(self, layer: Layer) -> None:
        found = layer.module._buffers.get(self.buffer)
        if not isinstance(found, Tensor):
            raise SurgeryError(
                f"{layer.name!r}: expected a batch norm with a {self.buffer}, got {type(layer.module).__name__} with "
                f"{', '.join(layer.module._buffers) or 'no buffers'}: leave it out by layers="
            )
        self.shape = found.shape

    def of_batch(self, x: Tensor, mask: Tensor | None) -> Statistics:
        """Of one call."""
        number, mean, m2 = torch.ops.batchnorm.stats(x, mask)
        return Statistics(number.reshape(1), mean, m2)

    def products(self, deviation: Tensor) -> Tensor:
        """(K, P) of (K, M)."""
        return deviation.square()

    def squares(self, products: Tensor) -> Tensor:
        """Those of each channel with itself, (M,) of (P,)."""
        return products


class _ComplexForm(Form):
    buffer = "running_covar"

    def of_batch(self, x: Tensor, mask: Tensor | None) -> Statistics:
        number, mean, covariance = complex_whitening.stats(x, mask)
        return Statistics(number.reshape(1), mean.flatten(), (covariance * number).flatten())

    def products(self, deviation: Tensor) -> Tensor:
        real, imaginary = deviation.unflatten(1, (-1, 2)).unbind(-1)
        return torch.stack([real.square(), imaginary.square(), real * imaginary], -1).flatten(1)

    def squares(self, products: Tensor) -> Tensor:
        return products.unflatten(0, (-1, 3))[:, :2].flatten()


class _WhiteningForm(Form):
    buffer = "running_cov"

    def of_batch(self, x: Tensor, mask: Tensor | None) -> Statistics:
        batch = whitening.statistics(x, self.shape[-1], mask)
        wide = batch.mean.dtype
        products = batch.cov.to(wide) * batch.number
        return Statistics(batch.number.reshape(1).to(wide), batch.mean, products.flatten())

    def products(self, deviation: Tensor) -> Tensor:
        grouped = deviation.unflatten(1, (-1, self.shape[-1]))
        return (grouped.unsqueeze(-1) * grouped.unsqueeze(-2)).flatten(1)

    def squares(self, products: Tensor) -> Tensor:
        return products.view(self.shape).diagonal(dim1=-2, dim2=-1).flatten()


def form_of(layer: Layer) -> Form:
    """The form that the layer's class has."""
    if isinstance(layer.module, _ComplexBatchNormLayer):
        return _ComplexForm(layer)
    return (_WhiteningForm if isinstance(layer.module, _WhiteningLayer) else Form)(layer)


def pool(sets: Iterable[Statistics], form: Form) -> Statistics:
    """All together; each field of ``sets`` has a leading K."""
    number, mean, products = (torch.cat(parts) for parts in zip(*sets, strict=True))
    return Statistics(*pooled(number, mean, products, form.products))
