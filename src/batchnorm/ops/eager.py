"""The quick way through a training step in eager mode.

A layer on a small tensor costs what its calls cost, and an operator with a registered gradient spends most of its time
in torch's Python wrapping of that gradient. An autograd function over operators that have none is the shortest way that
needs no C++ autograd, whose binary interface is not stable. It serves plain reverse mode only; torch.compile and
torch.func take the operators with registered gradients, or the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.ops import registration as registration  # defines the operators
from batchnorm.ops.gradients import differentiable_backward, ghost_gradients, wants_residual
from batchnorm.ops.schema import needs_residual

_train_step = torch.ops.batchnorm.train_step.default
_train_step_backward = torch.ops.batchnorm.train_step_backward.default


class Options(NamedTuple):
    """What a training step needs besides tensors that have gradients, in the order of the operator's arguments."""

    mask: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    momentum: float | None
    num_batches: Tensor | None
    ddof: int
    activation: str


def _asked_for(ctx: Any, grad: Tensor, gradients: tuple[Tensor, ...], computed: bool) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and residual that autograd asked for; ``grad`` is a residual's not computed."""
    need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
    dx, dweight, dbias, dresidual = gradients
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        (dresidual if computed else grad) if need_residual else None,
        None,
    )


class TrainStep(torch.autograd.Function):
    """``train_step`` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: Options
    ) -> Tensor:
        """Saves x and (C,) statistics; for a residual one bit an element, or the residual for a smooth activation."""
        y, saved, sign = _train_step(x, weight, bias, residual, *options)
        ctx.options = options
        if residual is None:
            ctx.save_for_backward(x, saved, weight, bias)
        else:
            kept = residual if needs_residual(options.activation) else None
            ctx.save_for_backward(x, saved, weight, bias, kept, sign if sign.numel() else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Differentiable itself where it is asked to be."""
        x, saved, weight, bias, *rest = ctx.saved_tensors
        residual, sign = rest or (None, None)
        options = ctx.options
        want_residual = wants_residual(options.activation, options.mask, ctx.needs_input_grad[3])
        affine = (weight, bias, residual, sign, options.mask, options.activation)
        if torch.is_grad_enabled():
            gradients = differentiable_backward(grad, x, affine, options.eps, want_residual)
        else:
            gradients = _train_step_backward(grad, x, saved, *affine, want_residual)
        return _asked_for(ctx, grad, gradients, want_residual)


# Straight to the C++ of autograd functions: Function.apply would first look, argument by argument, for what torch.func
# transforms leave behind, and the caller has made sure that none is under way.
train_step = super(torch.autograd.Function, TrainStep).apply


class GhostOptions(NamedTuple):
    """What a step of virtual batches needs besides tensors that have gradients, in the order of the operator."""

    mask: Tensor | None
    size: int
    ghosts: int
    eps: float
    activation: str


class GhostStep(torch.autograd.Function):
    """``ghost_forward`` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: GhostOptions
    ) -> tuple[Tensor, Tensor]:
        """y, and the statistics of each ghost."""
        y, saved, sign = torch.ops.batchnorm.ghost_forward.default(x, weight, bias, residual, *options)
        ctx.options = options
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        kept = residual if needs_residual(options.activation) else None
        ctx.save_for_backward(x, saved, weight, bias, kept, sign if sign.numel() else None)
        return y, saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        """Differentiable itself where it is asked to be."""
        if grad is None:
            return (None,) * 5
        x, saved, weight, bias, residual, sign = ctx.saved_tensors
        mask, size, ghosts, eps, activation = ctx.options
        want_residual = wants_residual(activation, mask, ctx.needs_input_grad[3])
        affine = (weight, bias, residual, sign, mask)
        gradients = ghost_gradients(grad, x, saved, affine, (size, ghosts), eps, activation, want_residual)
        return _asked_for(ctx, grad, gradients, want_residual)


ghost_step = super(torch.autograd.Function, GhostStep).apply
