"""The gradients of the operators, one for all their implementations, and differentiable themselves.

Those of ``stats``, ``normalize`` and ``train_forward`` are made of operators; those of ``grad_sums`` and ``grad_input``
(the second derivatives) differentiate the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import ghost, reference
from batchnorm.ops.schema import needs_residual


def _stats_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mask = inputs
    count, mean, _ = output
    ctx.save_for_backward(x, mask, count, mean)
    ctx.mark_non_differentiable(count)


def _stats_backward(ctx: Any, _: Tensor, grad_mean: Tensor, grad_m2: Tensor) -> tuple[Any, ...]:
    x, mask, count, mean = ctx.saved_tensors
    # d mean / dx = 1 / count and d m2 / dx = 2 (x - mean); the mean's own part in m2 sums to zero.
    row = (1, -1, *[1] * (x.dim() - 2))
    centred = x.to(mean.dtype) - mean.reshape(row)
    dx = (grad_mean / count.clamp(min=1)).reshape(row) + 2 * centred * grad_m2.reshape(row)
    if mask is not None:
        dx = torch.where(mask.unsqueeze(1), dx, torch.zeros_like(dx))
    return dx.to(x.dtype), None


def _normalize_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mean, invstd, weight, bias, residual, mask, activation = inputs
    _, sign = output
    ctx.mark_non_differentiable(sign)
    ctx.activation, ctx.residual_dtype = activation, None if residual is None else residual.dtype
    kept = residual if needs_residual(activation) else None
    ctx.save_for_backward(x, mean, invstd, weight, bias, kept, sign, mask)


def _normalize_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    kept = ctx.saved_tensors  # once: torch.utils.checkpoint gives them out no second time
    _, _, invstd, weight, bias, _, _, mask = kept
    saved = (grad, *kept, ctx.activation)
    # Constant statistics add nothing to dx: sums of zero, of which the count does not matter.
    zero, one = torch.zeros_like(invstd), invstd.new_ones(())
    want_residual = wants_residual(ctx.activation, mask, ctx.needs_input_grad[5])
    dx, dresidual = torch.ops.batchnorm.grad_input(*saved, one, zero, zero, want_residual)
    dresidual = residual_gradient(ctx, grad, dresidual, want_residual, ctx.needs_input_grad[5])
    if not any(ctx.needs_input_grad[1:5]):  # frozen: the sums would be a pass over the data for nothing
        return dx, None, None, None, None, dresidual, None, None
    sum_dz, sum_dz_xhat = torch.ops.batchnorm.grad_sums(*saved)
    gamma = 1 if weight is None else weight.to(invstd.dtype)
    dmean = -gamma * invstd * sum_dz
    dinvstd = gamma * sum_dz_xhat / invstd
    return (
        dx,
        dmean,
        dinvstd,
        None if weight is None else sum_dz_xhat.to(weight.dtype),
        None if bias is None else sum_dz.to(bias.dtype),
        dresidual,
        None,
        None,
    )


def _train_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, mask, eps, activation = inputs
    _, count, mean, var, invstd, sign = output
    # The statistics are for the running averages, and those are outside the gradient in every framework.
    ctx.mark_non_differentiable(count, mean, var, invstd, sign)
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.activation, ctx.residual_dtype = eps, activation, None if residual is None else residual.dtype
    kept = residual if needs_residual(activation) else None
    ctx.save_for_backward(x, mean, invstd, weight, bias, kept, sign, mask, count)


def _train_backward_rule(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    x, mean, invstd, weight, bias, residual, sign, mask, count = ctx.saved_tensors
    want_residual = wants_residual(ctx.activation, mask, ctx.needs_input_grad[3])
    if torch.is_grad_enabled():
        affine = (weight, bias, residual, sign, mask, ctx.activation)
        dx, dweight, dbias, dresidual = differentiable_backward(grad, x, affine, ctx.eps, want_residual)
    else:
        dx, dweight, dbias, dresidual = torch.ops.batchnorm.train_backward(
            grad, x, mean, invstd, weight, bias, residual, sign, mask, ctx.activation, count, want_residual
        )
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        residual_gradient(ctx, grad, dresidual, want_residual, ctx.needs_input_grad[3]),
        None,
        None,
        None,
    )


def _ghost_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, mask, size, ghosts, eps, activation = inputs
    _, saved, sign = output
    ctx.mark_non_differentiable(saved, sign)
    ctx.set_materialize_grads(False)
    ctx.cut, ctx.eps, ctx.activation = (size, ghosts), eps, activation
    ctx.residual_dtype = None if residual is None else residual.dtype
    kept = residual if needs_residual(activation) else None
    ctx.save_for_backward(x, saved, weight, bias, kept, sign, mask)


def _ghost_backward_rule(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    x, saved, weight, bias, residual, sign, mask = ctx.saved_tensors
    want_residual = wants_residual(ctx.activation, mask, ctx.needs_input_grad[3])
    affine = (weight, bias, residual, sign, mask)
    dx, dweight, dbias, dresidual = ghost_gradients(
        grad, x, saved, affine, ctx.cut, ctx.eps, ctx.activation, want_residual
    )
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        residual_gradient(ctx, grad, dresidual, want_residual, ctx.needs_input_grad[3]),
        *(None,) * 5,
    )


def ghost_gradients(
    grad: Tensor,
    x: Tensor,
    saved: Tensor,
    affine: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    cut: tuple[int, int],
    eps: float,
    activation: str,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ghost_backward``, differentiable where it is asked to be.

    ``affine`` is weight, bias, residual, sign, mask; ``cut`` the size and number of ghosts.
    """
    size, ghosts = cut
    if torch.is_grad_enabled():
        # The statistics must then depend on x, which saved ones do not; the reference is differentiable as it stands.
        saved = ghost.statistics(x, affine[4], size, ghosts, eps)
        return ghost.ghost_backward(grad, x, saved, *affine, size, activation, want_residual)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.batchnorm.ghost_backward(
        grad, x, saved, *affine, size, activation, want_residual
    )
    return gradients


def differentiable_backward(
    grad: Tensor,
    x: Tensor,
    affine: tuple[Any, ...],
    eps: float,
    want_residual: bool,
    *,
    whole: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a training step where someone will differentiate them (create_graph=True).

    The statistics must then depend on x, which saved ones do not. Made of operators that have gradients of their own,
    it is differentiable to any order. ``affine`` is weight, bias, residual, sign, mask, activation. Where x is a part
    of a batch, ``whole`` gives the batch's count, mean and invstd for count, mean and m2 of x, and ``total`` its sums.
    """
    weight, bias = affine[:2]
    count, mean, m2 = torch.ops.batchnorm.stats(x, affine[4])
    if whole is None:
        invstd = torch.rsqrt(m2 / count.clamp(min=1) + eps)
    else:
        count, mean, invstd = whole(count, mean, m2)
    sum_dz, sum_dz_xhat = torch.ops.batchnorm.grad_sums(grad, x, mean, invstd, *affine)
    sums = (sum_dz, sum_dz_xhat) if total is None else total(torch.cat([sum_dz, sum_dz_xhat])).split(x.size(1))
    dx, dresidual = torch.ops.batchnorm.grad_input(grad, x, mean, invstd, *affine, count, *sums, want_residual)
    dweight = sum_dz_xhat if weight is None else sum_dz_xhat.to(weight.dtype)
    dbias = sum_dz if bias is None else sum_dz.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def wants_residual(activation: str, mask: Tensor | None, needed: bool) -> bool:
    """Whether it is to be computed: without activation and mask it is `grad` itself, and nothing need be stored."""
    return needed and not (activation == "none" and mask is None)


def residual_gradient(ctx: Any, grad: Tensor, dresidual: Tensor, computed: bool, needed: bool) -> Tensor | None:
    """What autograd gets as the residual's gradient."""
    if not needed:
        return None
    return (dresidual if computed else grad).to(ctx.residual_dtype)


def _by_reference(name: str) -> tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]:
    """Setup and backward for an operator whose gradient is that of its reference, differentiated by autograd itself."""
    formula = getattr(reference, name)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        create_graph = torch.is_grad_enabled()
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        needed = [index for index, wanted in enumerate(ctx.needs_input_grad) if wanted]
        with torch.enable_grad():
            for index in needed:
                # New names for the same values: x reaches the formula both itself and through mean, and each argument
                # must get its own partial derivative only.
                value = inputs[index]
                inputs[index] = value.view_as(value) if create_graph else value.detach().requires_grad_()
            pairs = [
                (output, grad)
                for output, grad in zip(formula(*inputs), grads, strict=True)
                if output.requires_grad and grad is not None
            ]
        found: list[Tensor | None] = [None] * len(inputs)
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            wanted = [inputs[index] for index in needed]
            partials = torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True)
            for index, partial in zip(needed, partials, strict=True):
                found[index] = partial
        return tuple(found)

    return setup_context, backward


GRADIENTS: dict[str, tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]] = {
    "stats": (_stats_context, _stats_backward),
    "normalize": (_normalize_context, _normalize_backward),
    "train_forward": (_train_context, _train_backward_rule),
    "ghost_forward": (_ghost_context, _ghost_backward_rule),
    "grad_sums": _by_reference("grad_sums"),
    "grad_input": _by_reference("grad_input"),
}
