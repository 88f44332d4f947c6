"""Batch normalization as a function of its tensors: checks, choice of route, running averages."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.ops import eager, reference
from batchnorm.ops.schema import ACTIVATIONS, statistics_dtype

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "hardswish"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    ddof: int = 1,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""Normalize each channel over a batch of data, then scale, shift, add and activate.

    .. math::
        \hat{x} = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}}, \qquad
        y = \mathrm{activation}(\gamma \hat{x} + \beta + \mathrm{residual})

    With ``training=True``, mean and (biased) var are those of the batch, inside the gradient, and the running averages
    move towards them; otherwise they are ``running_mean`` and ``running_var`` and constant. The positional arguments
    are those of :func:`torch.nn.functional.batch_norm`, in its order.

    Args:
        input: x, (N, C) or (N, C, \*spatial), floating point.
        running_mean, running_var: (C,), updated in place in training where given (both or neither):
            ``running = (1 - momentum) * running + momentum * batch``. They are required with ``training=False``.
        weight, bias: gamma and beta, (C,); 1 and 0 where None.
        momentum: the weight of the new value, torch's meaning. None: the cumulative average, whose weight is
            1 / ``num_batches_tracked``.
        eps: added to var, in units of x squared. Positive in training.
        mask: boolean, (N, \*spatial) or broadcastable to it, True where a position is real. Statistics and gradients
        are
            over real positions only; the output is zero elsewhere. A batch without a real position leaves the running
            averages alone.
        lengths: (N,) integers, for (N, C, L) input: the first ``lengths[n]`` positions of row n are real.
        residual: x's shape, added before the activation.
        activation: "relu", "leaky_relu" (slope 0.01), "silu", "gelu" (exact), "hardswish" or None.
        ddof: 1 for an unbiased running variance (torch), 0 for a biased one (Keras, Flax, ONNX).
        num_batches_tracked: a 0-d integer tensor, counted up by one in training.

    Returns:
        y, with the shape and dtype of x.

    Raises:
        ShapeError: (ValueError, RuntimeError) the input has no channel dimension, or another number of channels than a
            parameter; a single value per channel in training; a mask, lengths or residual that does not fit.
        InputError: (ValueError) eps out of range, unknown activation, mask and lengths together.
        DtypeError: (TypeError, RuntimeError) x is not floating point, parameters are neither x's dtype nor float32
            beside a narrower x, a mask is not boolean.
        Nothing is counted or updated when one of these is raised.

    Source: Ioffe & Szegedy (2015), Algorithms 1 and 2.
    """
    _check_input(input, running_mean, running_var, weight, bias, training)
    if eps < 0 or (training and eps == 0) or not math.isfinite(eps):
        raise InputError(
            f"batch_norm eps must be positive, got {eps}" if training else f"eps must not be negative: {eps}"
        )
    if residual is not None:
        if residual.shape != input.shape:
            raise ShapeError(
                f"expected a residual of the input's shape {list(input.shape)}, got {list(residual.shape)}"
            )
        residual = residual.to(input.dtype)
    if training and running_mean is not None and momentum is None and num_batches_tracked is None:
        raise InputError("momentum=None is the cumulative average and needs num_batches_tracked")
    act = "none" if activation is None else activation
    check_choice("activation", act, ACTIVATIONS)
    real = positions(input, mask, lengths)

    if not training:
        assert running_mean is not None
        assert running_var is not None
        return _evaluate(input, running_mean, running_var, weight, bias, residual, real, eps, act)

    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    running = (momentum, num_batches_tracked, ddof)
    if _plain_eager():
        options = eager.Options(real, running_mean, running_var, eps, *running, act)
        return eager.train_step(input, weight, bias, residual, options)
    ops = _operators()
    y, count, mean, var, _, _ = ops.train_forward(input, weight, bias, residual, real, eps, act)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            ops.update_running(running_mean, running_var, mean.detach(), var.detach(), count, *running)
    return y


def _evaluate(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    if _plain_eager() and not (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (input, weight, bias, residual))
    ):
        return torch.ops.batchnorm.infer(
            input, running_mean, running_var, weight, bias, residual, mask, eps, activation
        )
    dtype = statistics_dtype(input.device)
    # Copies: a later training step moves the buffers in place, and the backward of this call must not notice.
    mean = running_mean.detach().to(dtype, copy=True)
    invstd = torch.rsqrt(running_var.detach().to(dtype) + eps)
    return _operators().normalize(input, mean, invstd, weight, bias, residual, mask, activation)[0]


def _plain_eager() -> bool:
    """Whether nothing but reverse mode is under way, which is what the quick way serves."""
    return not torch.compiler.is_compiling() and not reference.composing()


def _operators() -> Any:
    """The registered operators, or the reference itself where only plain torch functions will do."""
    # While torch.compile traces, the operators' own vmap and gradient rules are used.
    return reference if not torch.compiler.is_compiling() and reference.composing() else torch.ops.batchnorm


def _check_input(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    if x.dim() < 2:
        raise ShapeError(f"expected an input of shape (N, C) or (N, C, *spatial), got {list(x.shape)}")
    if not x.is_floating_point():
        raise DtypeError(f"expected a floating point input, got {x.dtype}: convert it with .float()")
    shape, dtype = (x.size(1),), x.dtype
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            _check_parameters(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
            break
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ShapeError(f"{missing} must be defined: give running_mean and running_var both or neither")
    if not training and running_mean is None:
        raise ShapeError("running_mean must be defined in evaluation mode")
    if training and x.size(0) * math.prod(x.shape[2:]) == 1:
        raise ShapeError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def _check_parameters(x: Tensor, **parameters: Tensor | None) -> None:
    channels = x.size(1)
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.size(0) != channels:
            # torch's own words, which programs match on.
            raise ShapeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor.dtype != x.dtype and not (tensor.dtype == torch.float32 and x.dtype.itemsize < 4):
            raise DtypeError(
                f"expected {name} to be {x.dtype} like the input (float32 does beside a narrower input), "
                f"got {tensor.dtype}"
            )


def positions(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask as the operators take it, (N, *spatial), or None where every position is real."""
    if mask is None and lengths is None:
        return None
    if mask is not None and lengths is not None:
        raise InputError("expected mask or lengths, got both")
    shape = (x.size(0), *x.shape[2:])
    if lengths is not None:
        if x.dim() != 3:
            raise ShapeError(
                f"lengths are for (N, C, L) input, got {list(x.shape)}: give a mask of shape (N, *spatial)"
            )
        if lengths.shape != (x.size(0),) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ShapeError(f"expected lengths as {x.size(0)} integers, got {lengths.dtype} {list(lengths.shape)}")
        return torch.arange(x.size(2), device=x.device) < lengths.to(x.device).unsqueeze(1)
    assert mask is not None
    if mask.dtype != torch.bool:
        raise DtypeError(f"expected a boolean mask (True = real), got {mask.dtype}")
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ShapeError(f"expected a mask broadcastable to {list(shape)}, got {list(mask.shape)}") from None
