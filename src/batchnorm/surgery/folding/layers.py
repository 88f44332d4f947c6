"""The modules of a model as :class:`Taker`, and why some must not be changed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.nn.recognition import is_frozen
from batchnorm.surgery.folding.taking import Taker, scale_inputs, scale_outputs

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("__call__", "forward"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("__call__", "forward", "_conv_forward")),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ("__call__", "forward", "_output_padding")
    ),
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CLOSE = 1e-9


def can_take(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer or convolution of torch, or of a class derived from one."""
    return isinstance(module, tuple(_METHODS))


def tied(model: nn.Module) -> set[int]:
    """Ids of the parameters that the model holds at several places."""
    places = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {key for key, number in places.items() if number > 1}


def taker_of(name: str, module: nn.Module, shared: set[int]) -> Taker:
    """``module``, of which :func:`can_take` is true."""
    refusal, own_forward = _refusal(module, shared), bool(_changed_methods(module))
    if refusal is None and own_forward and not _is_linear(module):
        refusal = f"it has a {_changed_methods(module)[0]} of its own, which is not known to be linear"
    taker = _as_written(name, module)
    taker.refusal = refusal
    if own_forward and not isinstance(module, nn.Linear):
        taker.border = "what its own forward adds at the borders is not known"
    return taker


def norm_taker(name: str, module: nn.Module, rank: int, shared: set[int]) -> Taker:
    """A batch norm without activation, for input of this rank, as one that takes another up: gamma and beta do."""
    weight, bias, mean = (getattr(module, key, None) for key in ("weight", "bias", "running_mean"))
    assert isinstance(mean, Tensor)
    refusal = "it has hooks, which would see other numbers" if hooked([module]) else None
    if parametrize.is_parametrized(module) or any(id(tensor) in shared for tensor in (weight, bias)):
        refusal = "its gamma or beta is parametrized or shared"
    whole = weight if isinstance(weight, Tensor) else torch.ones_like(mean)

    def write(weight: Tensor, bias: Tensor | None) -> None:
        setattr(module, "affine", True)  # noqa: B010 - of a class that need not have it
        for key, new in (("weight", weight.flatten()), ("bias", bias)):
            if new is not None and is_frozen(module):
                module._parameters.pop(key, None)
                module.register_buffer(key, new)
            elif new is not None:
                setattr(module, key, nn.Parameter(new))

    kind = type(module).__name__
    beta = bias if isinstance(bias, Tensor) else None
    return Taker(name, kind, whole.unsqueeze(1), beta, len(whole), 1 - rank, None, refusal, write)


def border_of(layer: Any) -> str | None:
    """Why a constant in front of a convolution is no constant behind it; None where it is one.

    Args:
        layer: with kernel_size, stride, padding, dilation, transposed, and output_padding or padding_mode.
    """
    reach = [dilation * (taps - 1) for dilation, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = layer.padding
    if layer.transposed:
        # The outputs that fewer taps reach must be cut off.
        borders = zip(padding, layer.output_padding, reach, strict=True)
        whole = all(step == 1 for step in layer.stride) and all(cut - added >= r for cut, added, r in borders)
        return None if whole else "a transposed convolution's outputs are not all reached by the same taps"
    if layer.padding_mode != "zeros" or padding == "valid" or not any(reach if padding == "same" else padding):
        return None
    return "its padding adds zeros after the batch norm, which are other numbers before it"


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether one of ``modules`` has hooks, which would see other numbers."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for module in modules for kind in kinds)


def _refusal(module: nn.Module, shared: set[int]) -> str | None:
    if parametrize.is_parametrized(module):
        return "it is parametrized: first torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return (
            "its weight is made anew at each call: first torch.nn.utils.remove_weight_norm, remove_spectral_norm or "
            "prune.remove"
        )
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if id(parameter) in shared:
            return "it shares a parameter with another module"
        if type(parameter.data) is not Tensor or parameter.dtype not in _DTYPES:
            return f"its parameters are {type(parameter.data).__name__} of {parameter.dtype}"
    if hooked([module]):
        return "it has hooks, which would see other numbers"
    return None


def _changed_methods(module: nn.Module) -> list[str]:
    """Those methods by which a layer computes that are not torch's."""
    base = next(base for base in _METHODS if isinstance(module, base))
    return [m for m in _METHODS[base] if getattr(type(module), m) is not getattr(base, m) or m in vars(module)]


def _as_written(name: str, module: nn.Module) -> Taker:
    """``module`` as its attributes say it is."""
    assert isinstance(module, nn.Linear | Conv)
    weight, bias = module.weight, module.bias
    linear = isinstance(module, nn.Linear)

    def write(weight: Tensor, bias: Tensor | None) -> None:
        learns = module.weight.requires_grad
        module.weight = nn.Parameter(weight, learns)
        if bias is not None:
            module.bias = nn.Parameter(bias, learns if module.bias is None else module.bias.requires_grad)

    return Taker(
        name,
        type(module).__name__,
        weight if isinstance(weight, Tensor) else torch.empty(0, 0),  # such a one is refused: nobody reads it
        bias if isinstance(bias, Tensor) else None,
        getattr(module, "groups", 1),
        -1 if linear else 1 - module.weight.dim(),
        None if linear else border_of(module),
        None,
        write,
        transposed=bool(getattr(module, "transposed", False)),
    )


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a layer with a forward of its own, as timm's "same" convolutions have, still is ``W x + b``.

    A scale and a shift, drawn at random, are folded into copies of it, and the outputs compared.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    taker = _as_written("", module)
    reach = [
        d * (k - 1) for d, k in zip(getattr(module, "dilation", ()), getattr(module, "kernel_size", ()), strict=True)
    ]
    along = (-1, *(1 for _ in reach))
    try:
        x = draw(2, taker.inputs, *(2 * r + 8 for r in reach))
        before, behind, ahead = (copy.deepcopy(module).cpu().double() for _ in range(3))
        scale, shift = draw(taker.outputs), draw(taker.outputs)
        scale_outputs(_as_written("", behind), scale, shift)()
        error = _error(behind(x), before(x) * scale.view(along) + shift.view(along))
        scale = draw(taker.inputs)
        shift = draw(taker.inputs) if isinstance(module, nn.Linear) else torch.zeros_like(scale)
        scale_inputs(_as_written("", ahead), scale, shift)()
        return max(error, _error(ahead(x), before(x * scale.view(along) + shift.view(along)))) <= _CLOSE
    except Exception:  # noqa: BLE001 - a stranger's forward: any reason will do
        return False


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
