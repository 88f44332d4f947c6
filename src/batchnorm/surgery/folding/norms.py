"""What a batch norm does in eval: a scale and a shift a channel, or a matrix, and what it does after that."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import SurgeryError
from batchnorm.nn.recognition import is_batch_norm, is_frozen
from batchnorm.nn.whitening import _WhiteningLayer
from batchnorm.ops.activations import activation_layer
from batchnorm.surgery.folding.taking import Left

_CLOSE = 1e-6


@dataclass(frozen=True)
class Affine:
    """``y = scale x + shift``, in float64: scale (C,), or (C, C) of a layer that mixes channels; shift (C,)."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """y of x (N, C, *)."""
        along = (1, -1) + (1,) * (x.dim() - 2)
        if self.scale.dim() == 1:
            return x * self.scale.view(along) + self.shift.view(along)
        return torch.einsum("pc,nc...->np...", self.scale, x) + self.shift.view(along)


def check_norms(model: nn.Module) -> None:
    """Refuse a model with a batch norm that has no constant, finite numbers to fold.

    Raises:
        SurgeryError: one is in training mode, has no running statistics, or some that are no statistics.
    """
    for name, module in model.named_modules():
        if not (is_batch_norm(module) or is_frozen(module)):
            continue
        label = f"{name or 'the model'} ({type(module).__name__})"
        if is_batch_norm(module):
            if module.training:
                raise SurgeryError(f"expected batch norms in eval mode, got {label} in training: call model.eval()")
            if module.running_mean is None:
                raise SurgeryError(
                    f"expected batch norms with running statistics, got {label} without, which normalizes by its batch "
                    "in eval too: there is no constant to fold"
                )
        keys = ("running_mean", "running_var", "running_cov", "weight", "bias")
        tensors = {key: getattr(module, key, None) for key in keys}
        check_numbers(tensors, getattr(module, "eps", 0.0), label)


def check_numbers(tensors: Mapping[str, Any], eps: float, label: str) -> None:
    """Refuse numbers that are NaN or infinite, and a variance that is negative or has no inverse root."""
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise SurgeryError(f"expected finite numbers, got NaN or infinity in {key} of {label}")
    var = tensors.get("running_var")
    if not isinstance(var, Tensor) or var.is_complex():
        return
    if bool((var < 0).any()):
        raise SurgeryError(f"expected running variances of 0 or more, got {float(var.min()):.3g} in {label}")
    if bool((var.double() + eps <= 0).any()):
        raise SurgeryError(f"expected a positive variance + eps, got 0 in {label}: its output is infinite")


@torch.no_grad()
def of_statistics(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    """scale = weight / sqrt(var + eps), shift = bias - mean * scale."""
    scale = (var.cpu().double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.cpu().double()
    shift = -mean.cpu().double() * scale
    return Affine(scale, shift if bias is None else shift + bias.cpu().double())


@torch.no_grad()
def affine_of(module: nn.Module) -> Affine:
    """What ``module`` does before its activation."""
    mean, weight, bias = module.running_mean, module.weight, module.bias
    assert isinstance(mean, Tensor)
    if isinstance(module, _WhiteningLayer):
        blocks = module.whitening_matrix().cpu().double()
        if module.weight is not None:
            blocks = module.weight.cpu().double().reshape(*blocks.shape[:2], 1) * blocks
        matrix = torch.block_diag(*blocks)
        shift = -(matrix @ mean.cpu().double())
        return Affine(matrix, shift if module.bias is None else shift + module.bias.cpu().double())
    var, eps = getattr(module, "running_var", None), getattr(module, "eps", None)
    if not isinstance(var, Tensor) or not isinstance(eps, float) or mean.is_complex() or var.dim() != 1:
        raise Left("its numbers are not a mean and a variance a channel")
    return of_statistics(mean, var, weight, bias, eps)  # type: ignore[arg-type]


def rest_of(module: nn.Module) -> nn.Module:
    """What ``module`` does after it has normalized: an activation that is a part of it, or nothing."""
    activation = getattr(module, "activation", None)
    if isinstance(activation, str):
        return activation_layer(activation)
    parts = [part for part in module.children() if not isinstance(part, nn.Identity)]  # timm's: drop and act
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()


@torch.no_grad()
def check_forward(module: nn.Module, affine: Affine, rest: nn.Module, rank: int) -> None:
    """Raise :class:`Left` unless ``module`` does what ``affine`` and then ``rest`` do, on random data, in float64.

    So it needs no list of classes: a subclass whose forward does something else is found out.
    """
    mean = module.running_mean
    assert isinstance(mean, Tensor)
    generator = torch.Generator().manual_seed(0)
    spread = affine.scale.abs() if affine.scale.dim() == 1 else affine.scale.abs().amax(1)
    along = (1, -1) + (1,) * (rank - 2)
    z = torch.randn((4, mean.numel(), *(2,) * (rank - 2)), generator=generator, dtype=torch.float64)
    x = mean.cpu().double().view(along) + z / spread.clamp(min=1e-12).view(along)
    try:
        found = copy.deepcopy(module).cpu().double()(x)
        expected = copy.deepcopy(rest).cpu().double()(affine(x))
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    except Exception as wrong:  # noqa: BLE001 - a stranger's forward
        raise Left(f"its forward cannot be checked: {type(wrong).__name__}: {wrong}") from None
    if not error <= _CLOSE:
        raise Left("its forward is not that of a batch norm with constant statistics and an activation")
