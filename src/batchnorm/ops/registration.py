"""The seam: registers every operator of :mod:`batchnorm.ops.schema` once, for all implementations.

PyTorch's dispatcher chooses the implementation. The reference is registered for every backend at once (as
CompositeExplicitAutograd); a C++ library registers CPU, which outranks it. What stands here belongs to the operator
and not to an implementation, so each of them inherits it: shapes without data (fakes, for torch.compile and export),
gradients, and ``torch.vmap``.

The gradients are themselves differentiable. Those of ``stats``, ``normalize`` and ``train_forward`` are made of
operators; those of ``grad_sums`` and ``grad_input`` (the second derivatives) differentiate the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import reference
from batchnorm.ops.schema import NAMESPACE, SCHEMAS, needs_residual, needs_sign, runs, statistics_dtype

# Kept for the life of the process: a Library that is collected takes its registrations with it.
_library = torch.library.Library(NAMESPACE, "DEF")


def _laid_out(x: Tensor, result: Tensor) -> Tensor:
    """``result`` with the strides of ``empty_like(x)``, as every implementation and the fakes promise."""
    out = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == out.stride() else out.copy_(result)


def _stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.batchnorm.stats(x, mask)


def _normalize(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, sign = reference.normalize(x, *rest)
    return _laid_out(x, y), sign


def _train_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # The statistics go through the dispatcher: a library that has only that kernel is used already.
    y, *statistics = reference.train_forward(x, *rest, stats=_stats)
    return _laid_out(x, y), *statistics


def _grad_input(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx, dresidual = reference.grad_input(grad, x, *rest)
    return _laid_out(x, dx), _residual_laid_out(x, dresidual)


def _train_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias, dresidual = reference.train_backward(grad, x, *rest)
    return _laid_out(x, dx), dweight, dbias, _residual_laid_out(x, dresidual)


def _infer(x: Tensor, *rest: Any) -> Tensor:
    return _laid_out(x, reference.infer(x, *rest))


def _train_step(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, saved, sign = reference.train_step(x, *rest)
    return _laid_out(x, y), saved, sign


def _train_step_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias, dresidual = reference.train_step_backward(grad, x, *rest)
    return _laid_out(x, dx), dweight, dbias, _residual_laid_out(x, dresidual)


def _residual_laid_out(x: Tensor, dresidual: Tensor) -> Tensor:
    return _laid_out(x, dresidual) if dresidual.dim() == x.dim() else dresidual


# --- shapes without data ----------------------------------------------------------------------------------------------


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.size(1), dtype=statistics_dtype(x.device))


def _scalar(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=statistics_dtype(x.device))


def _sign(x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    _, number, length = runs(x)
    size = number * ((length + 7) // 8) if needs_sign(activation, residual) else 0
    return x.new_empty(size, dtype=torch.uint8)


def _fake_stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _scalar(x), _channels(x), _channels(x)


def _fake_normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _sign(x, residual, activation)


def _fake_train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, ...]:
    channels = (_channels(x), _channels(x), _channels(x))
    return torch.empty_like(x), _scalar(x), *channels, _sign(x, residual, activation)


def _fake_grad_sums(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _channels(x), _channels(x)


def _fake_grad_input(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if rest[-1] else x.new_empty(0)


def _fake_train_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dweight, dbias = (
        _channels(x) if parameter is None else x.new_empty(x.size(1), dtype=parameter.dtype)
        for parameter in (weight, bias)
    )
    return torch.empty_like(x), dweight, dbias, torch.empty_like(x) if rest[-1] else x.new_empty(0)


def _fake_infer(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_train_step(x: Tensor, weight: Any, bias: Any, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    saved = x.new_empty(2 * x.size(1) + 1, dtype=statistics_dtype(x.device))
    return torch.empty_like(x), saved, _sign(x, residual, rest[-1])


def _fake_train_step_backward(
    grad: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_train_backward(grad, x, saved, saved, weight, bias, *rest)


def _fake_update_running(*_: Any) -> None:
    return None


# --- gradients --------------------------------------------------------------------------------------------------------


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
    _, _, invstd, weight, bias, *_ = ctx.saved_tensors
    saved = (grad, *ctx.saved_tensors, ctx.activation)
    sum_dz, sum_dz_xhat = torch.ops.batchnorm.grad_sums(*saved)
    # Constant statistics add nothing to dx: sums of zero, of which the count does not matter.
    zero, one = torch.zeros_like(invstd), invstd.new_ones(())
    want_residual = _wants_residual(ctx, ctx.needs_input_grad[5])
    dx, dresidual = torch.ops.batchnorm.grad_input(*saved, one, zero, zero, want_residual)
    gamma = 1 if weight is None else weight.to(invstd.dtype)
    dmean = -gamma * invstd * sum_dz
    dinvstd = gamma * sum_dz_xhat / invstd
    return (
        dx,
        dmean,
        dinvstd,
        None if weight is None else sum_dz_xhat.to(weight.dtype),
        None if bias is None else sum_dz.to(bias.dtype),
        _residual_gradient(ctx, grad, dresidual, want_residual, ctx.needs_input_grad[5]),
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
    want_residual = _wants_residual(ctx, ctx.needs_input_grad[3])
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
        _residual_gradient(ctx, grad, dresidual, want_residual, ctx.needs_input_grad[3]),
        None,
        None,
        None,
    )


def differentiable_backward(
    grad: Tensor, x: Tensor, affine: tuple[Any, ...], eps: float, want_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of a training step where someone will differentiate them (create_graph=True).

    The statistics must then depend on x, which saved ones do not. Made of operators that have gradients of their own,
    it is differentiable to any order. ``affine`` is weight, bias, residual, sign, mask, activation.
    """
    weight, bias = affine[:2]
    count, mean, m2 = torch.ops.batchnorm.stats(x, affine[4])
    invstd = torch.rsqrt(m2 / count.clamp(min=1) + eps)
    sum_dz, sum_dz_xhat = torch.ops.batchnorm.grad_sums(grad, x, mean, invstd, *affine)
    dx, dresidual = torch.ops.batchnorm.grad_input(
        grad, x, mean, invstd, *affine, count, sum_dz, sum_dz_xhat, want_residual
    )
    dweight = sum_dz_xhat if weight is None else sum_dz_xhat.to(weight.dtype)
    dbias = sum_dz if bias is None else sum_dz.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def _wants_residual(ctx: Any, needed: bool) -> bool:
    # Without activation and mask the residual's gradient is `grad` itself: nothing to compute, nothing to store.
    return bool(needed) and not (ctx.activation == "none" and ctx.saved_tensors[7] is None)


def _residual_gradient(ctx: Any, grad: Tensor, dresidual: Tensor, computed: bool, needed: bool) -> Tensor | None:
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


# --- vmap -------------------------------------------------------------------------------------------------------------


def _vmap_one_by_one(name: str) -> Callable[..., tuple[Any, Any]]:
    """Runs the operator on each member of the batch.

    The layers do not come here: under a ``torch.func`` transform they call the reference, through which torch's own
    vmap finds its way. This is for direct calls and for vmap inside torch.compile.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        operator = getattr(torch.ops.batchnorm, name)
        members = [
            operator(*[arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if isinstance(members[0], Tensor):
            return torch.stack(members), 0
        outputs = tuple(torch.stack(values) for values in zip(*members, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "stats": reference.stats,
    "normalize": _normalize,
    "train_forward": _train_forward,
    "grad_sums": reference.grad_sums,
    "grad_input": _grad_input,
    "train_backward": _train_backward,
    "update_running": reference.update_running,
    "infer": _infer,
    "train_step": _train_step,
    "train_step_backward": _train_step_backward,
}
_FAKES: dict[str, Callable[..., Any]] = {
    "stats": _fake_stats,
    "normalize": _fake_normalize,
    "train_forward": _fake_train_forward,
    "grad_sums": _fake_grad_sums,
    "grad_input": _fake_grad_input,
    "train_backward": _fake_train_backward,
    "update_running": _fake_update_running,
    "infer": _fake_infer,
    "train_step": _fake_train_step,
    "train_step_backward": _fake_train_step_backward,
}
_GRADIENTS: dict[str, tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]] = {
    "stats": (_stats_context, _stats_backward),
    "normalize": (_normalize_context, _normalize_backward),
    "train_forward": (_train_context, _train_backward_rule),
    "grad_sums": _by_reference("grad_sums"),
    "grad_input": _by_reference("grad_input"),
}


def _register() -> None:
    for name, signature in SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _IMPLEMENTATIONS[name], "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, _FAKES[name], lib=_library)
        if name in _GRADIENTS:
            setup_context, backward = _GRADIENTS[name]
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        if name not in ("update_running", "train_step"):  # they change buffers: one of many models' has no meaning
            torch.library.register_vmap(qualified, _vmap_one_by_one(name), lib=_library)


_register()
