"""The quick way through a training step in eager mode.

A layer on a small tensor costs what its calls cost, and an operator with a registered gradient spends most of its time
in torch's Python wrapping of that gradient. An autograd function over operators that have none is the shortest way that
needs no C++ autograd, whose binary interface is not stable. It serves plain reverse mode only; torch.compile and
torch.func take the operators with registered gradients, or the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.registration import differentiable_backward
from batchnorm.ops.schema import needs_residual

_train_step = torch.ops.batchnorm.train_step.default
_train_step_backward = torch.ops.batchnorm.train_step_backward.default


class TrainStep(torch.autograd.Function):
    """``train_step`` with its gradient; the arguments are the operator's, the result is y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
    ) -> Tensor:
        """Saves x and (C,) statistics; for a residual one bit an element, or the residual for a smooth activation."""
        y, saved, sign = _train_step(x, weight, bias, residual, *rest)
        mask, activation = rest[0], rest[-1]
        ctx.save_for_backward(
            x,
            saved,
            weight,
            bias,
            residual if needs_residual(activation) else None,
            sign if sign.numel() else None,
            mask,
        )
        ctx.activation, ctx.eps = activation, rest[3]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Differentiable itself where it is asked to be."""
        x, saved, weight, bias, residual, sign, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # Without activation and mask the residual's gradient is `grad` itself: nothing to compute, nothing to store.
        same = ctx.activation == "none" and mask is None
        affine = (weight, bias, residual, sign, mask, ctx.activation)
        if torch.is_grad_enabled():
            gradients = differentiable_backward(grad, x, affine, ctx.eps, needed[3] and not same)
        else:
            gradients = _train_step_backward(grad, x, saved, *affine, needed[3] and not same)
        dx, dweight, dbias, dresidual = gradients
        return (
            dx if needed[0] else None,
            dweight if needed[1] else None,
            dbias if needed[2] else None,
            (grad if same else dresidual) if needed[3] else None,
            *(None,) * 8,
        )
