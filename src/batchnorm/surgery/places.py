"""Where batch norm can be inserted: after linear layers whose output goes to a non-linearity and nowhere else."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.nn.recognition import is_batch_norm, is_frozen
from batchnorm.probes.wiring import Step, Wiring, function_name

_CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
LINEAR = (nn.Linear, *(kind for kinds in _CONVOLUTIONS.values() for kind in kinds))
"""The layers after which batch norm can be inserted."""
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
_NONLINEAR = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink),
    *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
_NONLINEAR_FUNCTIONS = {kind.__name__.lower() for kind in _NONLINEAR} | {"leaky_relu", "log_sigmoid"}
_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)
_SHAPE_FUNCTIONS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "to", "float", "double", "half"}


def unfit(wiring: Wiring, layer: nn.Module) -> str:
    """Why nothing can be inserted after ``layer``; empty where something can."""
    calls = wiring.of(layer)
    if len(calls) != 1:
        return f"called {len(calls)} times on the example" if calls else "not called by itself on the example"
    (step,) = calls
    user = reader(wiring, step)
    if user is None:
        readers = [other.label for other in wiring.users(step)]
        if step.index in wiring.outputs:
            readers.append("the model's result")
        return f"its output goes to {' and '.join(readers) or 'nobody'}"
    norm = user.module
    if norm is not None and (is_batch_norm(norm) or is_frozen(norm) or isinstance(norm, _NORMS)):
        return f"normalized by {user.label} already"
    if not _is_nonlinear(user):
        return f"followed by {user.label}, which is no non-linearity"
    if _is_result(wiring, user):
        return f"the result of the model is {user.label} of it"
    shape = step.output_shape or ()
    spatial = next((n for n, kinds in _CONVOLUTIONS.items() if isinstance(layer, kinds)), 0)
    if len(shape) != spatial + 2:
        where = "its channels are last" if not spatial and len(shape) > 2 else "it has no dimension of samples"
        return f"{where} in an output of shape {list(shape)}"
    if is_parametrized(layer, "bias"):
        return "its bias is parametrized"
    return ""


def reader(wiring: Wiring, step: Step) -> Step | None:
    """The only reader of ``step``, behind what passes it on as it is: an identity, a dropout."""
    user = wiring.sole_user(step)
    while user is not None and user.passes:
        user = wiring.sole_user(user)
    return user


def _is_nonlinear(step: Step) -> bool:
    if step.module is not None:
        return isinstance(step.module, _NONLINEAR) or _acts_as_one(step.module, step.output_shape)
    return function_name(step.function).removesuffix("_") in _NONLINEAR_FUNCTIONS


def _acts_as_one(module: nn.Module, shape: tuple[int, ...] | None) -> bool:
    """Whether a layer of somebody's own (a swish, timm's GELUTanh) is a function of each element, and not affine.

    Tried on random numbers: of another element nothing else changes, and on equal steps it does not take equal ones.
    """
    if type(module).__module__.startswith("torch.nn.") or not shape or len(shape) < 2:
        return False
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(4, shape[1], *(2 for _ in shape[2:]), generator=generator)
    other = x.clone()
    other.view(-1)[0] += 1
    try:
        tried = copy.deepcopy(module).cpu().float().eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            y, elsewhere, twice, thrice = (tried.forward(value.clone()) for value in (x, other, x + 1, x + 2))
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape or not torch.equal(y.flatten()[1:], elsewhere.flatten()[1:]):
        return False
    bend, scale = (thrice - 2 * twice + y).abs().max(), y.abs().max()
    return bool(bend > 1e-4 * scale)


def _is_result(wiring: Wiring, step: Step) -> bool:
    """Whether the model returns the output of ``step``, perhaps in another shape."""
    if step.index in wiring.outputs:
        return True
    return any(_reshapes(user) and _is_result(wiring, user) for user in wiring.users(step))


def _reshapes(step: Step) -> bool:
    if step.passes:
        return True
    if step.module is not None:
        return isinstance(step.module, _SHAPES)
    return function_name(step.function) in _SHAPE_FUNCTIONS
