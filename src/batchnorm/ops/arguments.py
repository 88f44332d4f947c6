"""What a normalization takes: the checks of its tensors, and the mask as the operators want it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.ops import reference


def check_input(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> bool:
    """Raise unless these go together; whether weight or bias are (N, C), that is, one for each sample."""
    if x.dim() < 2:
        raise ShapeError(f"expected an input of shape (N, C) or (N, C, *spatial), got {list(x.shape)}")
    if not x.is_floating_point():
        raise DtypeError(f"expected a floating point input, got {x.dtype}: {_remedy(x)}")
    shape, dtype = (x.size(1),), x.dtype
    per_sample = False
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            per_sample = _check_parameters(x, running_mean, running_var, weight, bias)
            break
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ShapeError(f"{missing} must be defined: give running_mean and running_var both or neither")
    if not training and running_mean is None:
        raise ShapeError("running_mean must be defined in evaluation mode")
    return per_sample


def check_residual(x: Tensor, residual: Tensor) -> Tensor:
    """The residual in x's dtype; raises unless it has x's shape."""
    if residual.shape != x.shape:
        raise ShapeError(f"expected a residual of the input's shape {list(x.shape)}, got {list(residual.shape)}")
    return residual.to(x.dtype)


def check_eps(eps: float, training: bool) -> None:
    """Raise unless eps is finite and, in training, positive: a channel of equal values has no variance."""
    if eps < 0 or (training and eps == 0) or not math.isfinite(eps):
        raise InputError(
            f"batch_norm eps must be positive, got {eps}" if training else f"eps must not be negative: {eps}"
        )


def check_inference_weight(alpha: float) -> None:
    """Raise unless it is a weight."""
    if not 0 <= alpha <= 1:
        raise InputError(f"expected inference_weight from 0 to 1, got {alpha}")


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
    if mask.shape == shape:
        return mask
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ShapeError(f"expected a mask broadcastable to {list(shape)}, got {list(mask.shape)}") from None


def real_values(mask: Tensor) -> int | None:
    """Real values per channel, or None where asking would wait for a device or break a trace."""
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not reference.composing():
        return int(torch.count_nonzero(mask))
    return None


def single_value(x: Tensor, mask: Tensor | None) -> ShapeError:
    """The error for a batch that has a mean and no deviation: torch's words, and for masks ours."""
    if mask is None:
        return ShapeError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    return ShapeError(f"Expected more than 1 real value per channel when training, got 1 in a mask of {mask.size()}")


def _check_parameters(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> bool:
    channels, per_sample = x.size(1), False
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dim() == 2 and name in ("weight", "bias") and tensor.shape == x.shape[:2]:
            per_sample = True
            if tensor.is_floating_point() and tensor.dtype.itemsize < x.dtype.itemsize:
                continue  # another layer's output, which autocast may have made narrow
        elif tensor.dim() != 1 or tensor.size(0) != channels:
            # torch's own words, which programs match on.
            raise ShapeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor.dtype != x.dtype and not (tensor.dtype == torch.float32 and x.dtype.itemsize < 4):
            raise DtypeError(
                f"expected {name} to be {x.dtype} like the input (float32 does beside a narrower input), "
                f"got {tensor.dtype}"
            )
    return per_sample


def _remedy(x: Tensor) -> str:
    return "a ComplexBatchNorm layer takes it" if x.is_complex() else "convert it with .float()"
