"""A fitted transform folded into the linear layer or convolution behind it: ``layer(A x + b)`` as one layer of ``x``.

    W' = W A,    bias' = bias + W b        with  b = offset - A mean

computed in float64 and rounded once; the sum runs over the taps of a kernel too. A convolution sees ``b`` at every tap,
so that ``b`` must reach the padding as well: zeros that are added after normalization are other numbers before it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm._errors import DtypeError, InputError, ShapeError

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# What a layer computes is known as long as none of these methods is another's.
_METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("__call__", "forward"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("__call__", "forward", "_conv_forward")),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ("__call__", "forward", "_output_padding")
    ),
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAMPLES = 64
_IMAGES = 16
# Outputs that hardly vary are measured against this share of the largest one.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class LinearMap:
    """``y = factor ((x - mean) - mean_low) + offset`` and the data it is for, all in float64.

    ``factor``: (C,), feature by feature, or a matrix (outputs, C); ``offset``: one number, or (outputs,). Data are like
    ``centre + spread z`` with ``z`` of unit variance, for each of ``spreads``: (C, K), and in the end (C,).
    """

    mean: Tensor
    mean_low: Tensor
    factor: Tensor
    offset: float | Tensor
    centre: Tensor
    spreads: tuple[Tensor, ...]

    @classmethod
    def of_features(
        cls, mean: Tensor, mean_low: Tensor, factor: Tensor, offset: float, centre: Tensor, spread: Tensor
    ) -> LinearMap:
        """The map of a scaler. A constant feature is taken to vary as little as the least of the others."""
        unit = factor.abs() * spread
        varying = unit[unit > 0]
        least = varying.min() if varying.numel() else torch.ones((), dtype=torch.float64)
        return cls(mean, mean_low, factor, offset, centre, (torch.where(unit > 0, spread, least / factor.abs()),))

    def __call__(self, x: Tensor) -> Tensor:
        """y of x (N, C, *), float64."""
        along = (1, -1) + (1,) * (x.ndim - 2)
        centred = (x - self.mean.view(along)) - self.mean_low.view(along)
        offset = self.offset.view(along) if isinstance(self.offset, Tensor) else self.offset
        if self.factor.ndim == 1:
            return centred * self.factor.view(along) + offset
        return torch.tensordot(self.factor, centred, dims=([1], [1])).movedim(0, 1) + offset

    def draw(self, spread: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Data (rows, C, *) for a ``size`` of (rows, *)."""
        z = torch.randn((size[0], spread.shape[-1], *size[1:]), generator=generator, dtype=torch.float64)
        along = (1, -1) + (1,) * (z.ndim - 2)
        if spread.ndim == 1:
            return z * spread.view(along) + self.centre.view(along)
        return torch.tensordot(spread, z, dims=([1], [1])).movedim(0, 1) + self.centre.view(along)


def fold(name: str, affine: LinearMap, channel_axis: int | None, layer: Any, tolerance: float | None) -> Any:
    """A new layer that does to x what ``layer`` does to ``affine(x)``; see ``Normalizer.fold_into``.

    ``name``: the estimator's, for messages. ``channel_axis``: the estimator's.
    """
    if tolerance is not None and not (isinstance(tolerance, Real) and 0 <= float(tolerance) < math.inf):
        raise InputError(f"tolerance must be None or a finite number and not negative, got {tolerance!r}")
    kind = _check_layer(layer)
    _check_axis(name, channel_axis, layer)
    outputs = affine.factor.shape[0]
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if outputs != width:
        raise ShapeError(f"{name} gives {outputs} features, but {kind} is expecting {width}")
    unknown = (~torch.isfinite(affine.mean) | ~torch.isfinite(affine.centre)).nonzero().flatten().tolist()
    if unknown:
        raise InputError(f"{name} saw only NaN in feature {', '.join(map(str, unknown))}: drop it before folding")
    groups = getattr(layer, "groups", 1)
    if affine.factor.ndim == 2 and groups > 1:
        raise InputError(f"{name} mixes all features, but {kind} has groups={groups}: keep to_module() in front")
    folded = _folded(affine, layer, kind)
    _check_accuracy(affine, layer, folded, tolerance)
    return folded


def _check_layer(layer: Any) -> str:
    """The layer's name for messages, once it is known to compute what its weight and bias say."""
    kind = type(layer).__name__
    base = next((base for base in _METHODS if isinstance(layer, base)), None)
    if base is None:
        raise DtypeError(f"expected a Linear, Conv or ConvTranspose layer of torch.nn to fold into, got {kind}")
    if parametrize.is_parametrized(layer):
        raise InputError(
            f"{kind} is parametrized: first torch.nn.utils.parametrize.remove_parametrizations(layer, ...)"
        )
    if nn.parameter.is_lazy(layer.weight):
        raise InputError(f"{kind} has no weight yet: run a batch through it first")
    changed = [m for m in _METHODS[base] if getattr(type(layer), m) is not getattr(base, m) or m in vars(layer)]
    if changed:
        raise DtypeError(f"{kind} has a {changed[0]} of its own, so that its algebra is unknown: fold by hand")
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise InputError(f"{kind} has forward hooks, which would see other numbers: remove them first")
    for tensor in (layer.weight, layer.bias):
        if tensor is None:
            continue
        if not isinstance(tensor, nn.Parameter) or type(tensor.data) is not Tensor or tensor.dtype not in _DTYPES:
            raise DtypeError(
                f"expected {kind} to have plain parameters of a floating dtype, got {type(tensor.data).__name__} "
                f"of {tensor.dtype}: fold before quantizing or sharding"
            )
        if tensor.is_meta:
            raise InputError(f"{kind} is on the meta device, without numbers: load its weights first")
    return kind


def _check_axis(name: str, channel_axis: int | None, layer: Layer) -> None:
    kind, shown = type(layer).__name__, f"the {name} has channel_axis={channel_axis}"
    if isinstance(layer, nn.Linear):
        if channel_axis not in (None, -1):
            raise InputError(
                f"{kind} reads the last axis, but {shown}: fit it with channel_axis=-1, or None for 2-D data"
            )
    elif channel_axis not in (1, -layer.weight.ndim + 1):
        raise InputError(f"{kind} reads channels along axis 1, but {shown}: fit it with channel_axis=1")


def _shift_reaches_every_output(layer: Layer) -> bool:
    """Whether a constant in front of the layer is a constant behind it, at the borders too."""
    if isinstance(layer, nn.Linear):
        return True
    reach = [dilation * (taps - 1) for dilation, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding: Any = layer.padding
    if layer.transposed:
        # The outputs that fewer taps reach are cut off.
        borders = zip(padding, layer.output_padding, reach, strict=True)
        return all(step == 1 for step in layer.stride) and all(cut - added >= r for cut, added, r in borders)
    if layer.padding_mode != "zeros" or padding == "valid":
        return True
    return not any(reach if padding == "same" else padding)


def _folded(affine: LinearMap, layer: Layer, kind: str) -> Layer:
    weight = _by_groups(layer, layer.weight.detach().cpu().to(torch.float64))
    groups, _, inputs, _ = weight.shape
    if affine.factor.ndim == 1:
        scaled = weight * affine.factor.view(groups, 1, inputs, 1)
    else:
        scaled = torch.einsum("goik,if->gofk", weight, affine.factor)
    folded = copy.deepcopy(layer)
    rounded = _from_groups(layer, scaled).to(layer.weight.dtype)
    new = torch.empty_like(layer.weight) if rounded.shape == layer.weight.shape else rounded.to(layer.weight.device)
    folded.weight = nn.Parameter(new.copy_(rounded), requires_grad=layer.weight.requires_grad)
    if isinstance(folded, nn.Linear):
        folded.in_features = scaled.shape[2]
    else:
        folded.in_channels = scaled.shape[2] * groups

    shift = affine(torch.zeros(1, affine.mean.shape[0], dtype=torch.float64))
    if bool((shift == 0).all()):
        return folded
    if not _shift_reaches_every_output(layer):
        border = "a transposed convolution's borders get fewer taps" if layer.transposed else "its padding adds zeros"
        raise InputError(
            f"{kind} cannot take up a shift, {border} after normalization: keep to_module() in front"
            + ("" if layer.transposed else ", or train with padding_mode='reflect', 'replicate' or 'circular'")
        )
    bias = (weight * shift.view(groups, 1, inputs, 1)).sum((2, 3)).flatten()
    if layer.bias is not None:
        bias += layer.bias.detach().cpu().to(torch.float64)
    trained = layer.weight if layer.bias is None else layer.bias
    folded.bias = nn.Parameter(bias.to(trained.device, trained.dtype), requires_grad=trained.requires_grad)
    return folded


def _by_groups(layer: Layer, weight: Tensor) -> Tensor:
    """A weight as (groups, outputs of one, inputs of one, taps)."""
    groups = getattr(layer, "groups", 1)
    if getattr(layer, "transposed", False):
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _from_groups(layer: Layer, weight: Tensor) -> Tensor:
    """The weight of :func:`_by_groups`, which may have other inputs now, in the layer's own shape."""
    groups, outputs, inputs, _ = weight.shape
    if getattr(layer, "transposed", False):
        return weight.transpose(1, 2).reshape(groups * inputs, outputs, *layer.weight.shape[2:])
    return weight.reshape(groups * outputs, inputs, *layer.weight.shape[2:])


def _check_accuracy(affine: LinearMap, layer: Layer, folded: Layer, tolerance: float | None) -> None:
    """Compare the folded layer with the two in float64, on data like those that the estimator was fitted on."""
    dtype = layer.weight.dtype
    allowed = math.sqrt(torch.finfo(dtype).eps) if tolerance is None else float(tolerance)
    exact, folded = copy.deepcopy(layer).cpu().double(), copy.deepcopy(folded).cpu()
    generator, size = torch.Generator().manual_seed(0), _size(layer)
    error = 0.0
    with torch.no_grad():
        for spread in affine.spreads:
            x = affine.draw(spread, size, generator).to(dtype)
            expected = _per_output(exact, exact(affine(x.to(torch.float64))))
            difference = (_per_output(folded, folded(x).to(torch.float64)) - expected).abs().amax(1)
            scale = expected.abs().amax(1)
            scale = scale.clamp(min=_SMALLEST * float(scale.max()))
            relative = torch.where(difference == 0, 0.0, difference / scale)
            error = max(error, float(relative.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    if error > allowed:
        deviation = affine.spreads[-1]  # feature by feature
        ratio = float(torch.where(deviation > 0, affine.centre.abs() / deviation, 0.0).max())
        raise InputError(
            f"folding loses accuracy: the new {type(layer).__name__} would be off by {error:.2g} of its largest output "
            f"in {dtype}, more than the tolerance of {allowed:.2g}, as the data lie up to {ratio:.2g} deviations from "
            "zero: keep to_module() in front, fold a float64 layer, or pass a larger tolerance"
        )


def _size(layer: Layer) -> tuple[int, ...]:
    """Rows and spatial size of a small input: more than one output, and no less than what the padding reflects."""
    if isinstance(layer, nn.Linear):
        return (_SAMPLES,)
    padding: Any = layer.padding
    sizes = []
    for axis, taps in enumerate(layer.kernel_size):
        reach = layer.dilation[axis] * (taps - 1)
        border = reach if isinstance(padding, str) else padding[axis]
        sizes.append(max(reach, 2 * border) + 1 + layer.stride[axis])
    return (_IMAGES, *sizes)


def _per_output(layer: Layer, y: Tensor) -> Tensor:
    """Outputs as (features or channels, samples)."""
    return y.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
