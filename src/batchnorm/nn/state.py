"""A batch norm's state from other frameworks, and to them: names, momentum, eps and the kind of variance.

What differs (the numbers are the frameworks' defaults):

======  ==============================  ======================  ========  ======================
        arrays                          weight of the old value eps       running variance
======  ==============================  ======================  ========  ======================
torch   weight, bias, running_mean,     1 - momentum, .9        1e-5      unbiased (``ddof=1``)
        running_var
Keras   gamma, beta, moving_mean,       momentum, .99           1e-3      biased
        moving_variance
Flax    params: scale, bias;            momentum, .99           1e-5      biased
        batch_stats: mean, var
ONNX    scale, B, input_mean,           momentum, .9            1e-5      biased
        input_var
======  ==============================  ======================  ========  ======================

Each ``from_`` gives a ``state_dict`` and the options of the layer that it belongs to::

    state, options = bn.nn.state.from_keras({v.name: v.numpy() for v in layer.weights}, layer.momentum, layer.epsilon)
    ours = bn.nn.BatchNorm2d(64, **options)
    ours.load_state_dict(state)

and each ``to_`` the arrays and the settings of the other framework's layer. Both are exact for inference: the variance
goes over as it is, with ``ddof=0`` where it was biased. (pytorch #3122 and #19902 are about ports that mixed the two
kinds; ONNX's operator set 14 settled on the biased one, onnx #3402.) Where ``n`` is given, the number of values a
channel in a training batch (N times the positions), the variance is instead made what the other framework would have,
by Bessel's correction. That changes the outputs, as it does between the frameworks, and is exact once the averages have
forgotten the 1 that they started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchnorm._errors import InputError, ShapeError
from batchnorm.moments import bessel_factor

Array = npt.NDArray[Any]


class LayerState(NamedTuple):
    """A layer of this package or torch's.

    Attributes:
        state: its ``state_dict``.
        options: arguments of its constructor: eps, momentum, affine, bias, ddof. torch's own layers know no ddof.
    """

    state: dict[str, Tensor]
    options: dict[str, Any]


class ForeignState(NamedTuple):
    """A layer of another framework.

    Attributes:
        arrays: its arrays by their names there.
        settings: its settings by their names there.
    """

    arrays: dict[str, Any]
    settings: dict[str, Any]


def from_keras(
    weights: Mapping[str, Any], momentum: float = 0.99, epsilon: float = 1e-3, *, n: int | None = None
) -> LayerState:
    """The state of a ``keras.layers.BatchNormalization``.

    Args:
        weights: gamma, beta (each absent with ``scale=False`` or ``center=False``), moving_mean, moving_variance. beta
            without gamma becomes a layer whose gamma is 1 and would be learned.
        momentum: Keras's, the weight of the old value.
        epsilon: added to the variance.
        n: values a channel in a training batch, to make the variance unbiased.

    Raises:
        InputError: (ValueError) an array is missing or unknown; momentum or n is out of range.
        ShapeError: (ValueError, RuntimeError) the arrays are not all (C,).
    """
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    return _read(weights, names, momentum, epsilon, n)


def to_keras(
    state: Mapping[str, Tensor],
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    ddof: int = 1,
    *,
    n: int | None = None,
) -> ForeignState:
    """Arrays in the order of Keras's ``set_weights``, and the settings momentum, epsilon, scale and center.

    Args:
        state: a ``state_dict`` with running statistics.
        eps: the layer's.
        momentum: the layer's, the weight of the new value.
        ddof: the layer's: 1 where running_var is unbiased.
        n: values a channel in a training batch, to make an unbiased variance biased.

    Raises:
        InputError: (ValueError) the state has no running statistics or an unknown key, momentum is None (a cumulative
            average, which Keras has not), or n is out of range.
        ShapeError: (ValueError, RuntimeError) the arrays are not all (C,).
    """
    arrays, decay = _write(state, momentum, ddof, n)
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    settings = {"momentum": decay, "epsilon": eps, "scale": "weight" in arrays, "center": "bias" in arrays}
    return ForeignState({names[name]: array for name, array in arrays.items()}, settings)


def from_flax(
    variables: Mapping[str, Mapping[str, Any]], momentum: float = 0.99, epsilon: float = 1e-5, *, n: int | None = None
) -> LayerState:
    """The state of a ``flax.linen.BatchNorm``: ``{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}``.

    ``params`` lacks what ``use_scale=False`` or ``use_bias=False`` leave out. Otherwise as :func:`from_keras`.
    """
    unknown = set(variables) - {"params", "batch_stats"}
    if unknown or "batch_stats" not in variables:
        raise InputError(
            f"expected the collections 'params' and 'batch_stats' of one BatchNorm, got {_quoted(variables)}"
        )
    flat = {f"{group}/{name}": array for group, arrays in variables.items() for name, array in arrays.items()}
    return _read(flat, _FLAX, momentum, epsilon, n)


def to_flax(
    state: Mapping[str, Tensor],
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    ddof: int = 1,
    *,
    n: int | None = None,
) -> ForeignState:
    """Variables of a ``flax.linen.BatchNorm``, and momentum, epsilon, use_scale and use_bias. As :func:`to_keras`."""
    arrays, decay = _write(state, momentum, ddof, n)
    variables: dict[str, dict[str, Array]] = {"params": {}, "batch_stats": {}}
    for name, array in arrays.items():
        group, key = _FLAX[name].split("/")
        variables[group][key] = array
    settings = {"momentum": decay, "epsilon": eps, "use_scale": "weight" in arrays, "use_bias": "bias" in arrays}
    return ForeignState(variables, settings)


def from_onnx(
    inputs: Mapping[str, Any], momentum: float = 0.9, epsilon: float = 1e-5, *, n: int | None = None
) -> LayerState:
    """The state of an ONNX ``BatchNormalization`` node: its inputs scale, B, input_mean and input_var, all required.

    Otherwise as :func:`from_keras`. The two states that a node in training mode returns are ``input_mean`` and
    ``input_var`` of the next step.
    """
    return _read(inputs, _ONNX, momentum, epsilon, n, required=tuple(_ONNX.values()))


def to_onnx(
    state: Mapping[str, Tensor],
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    ddof: int = 1,
    *,
    n: int | None = None,
) -> ForeignState:
    """Inputs of an ONNX ``BatchNormalization`` node and its attributes. As :func:`to_keras`.

    A node has a scale and a B always: 1 and 0 for a layer without.
    """
    arrays, decay = _write(state, momentum, ddof, n)
    mean = arrays["running_mean"]
    whole = {"weight": np.ones_like(mean), "bias": np.zeros_like(mean), **arrays}
    return ForeignState({key: whole[name] for name, key in _ONNX.items()}, {"momentum": decay, "epsilon": eps})


_KEYS = ("weight", "bias", "running_mean", "running_var")
_FLAX = dict(zip(_KEYS, ("params/scale", "params/bias", "batch_stats/mean", "batch_stats/var"), strict=True))
_ONNX = dict(zip(_KEYS, ("scale", "B", "input_mean", "input_var"), strict=True))


def _read(
    arrays: Mapping[str, Any],
    names: Mapping[str, str],
    decay: float,
    epsilon: float,
    n: int | None,
    required: tuple[str, ...] = (),
) -> LayerState:
    required = required or (names["running_mean"], names["running_var"])
    missing, unknown = [name for name in required if name not in arrays], set(arrays) - set(names.values())
    if missing or unknown:
        raise InputError(f"expected {_quoted(names.values())}, got {_quoted(arrays)}")
    if not 0 <= decay <= 1:
        raise InputError(f"expected momentum, the weight of the old value, between 0 and 1, got {decay}")
    found = {key: _tensor(arrays[name]) for key, name in names.items() if name in arrays}
    _check_shapes(found)
    if "bias" in found and "weight" not in found:
        found = {"weight": torch.ones_like(found["bias"]), **found}
    if n is not None:
        found["running_var"] = found["running_var"] * _correction(n)
    options = {
        "eps": epsilon,
        # Not 1 - 0.99, which is 0.010000000000000009.
        "momentum": round(1 - decay, 15),
        "affine": "weight" in found,
        "bias": "bias" in found,
        "ddof": 0 if n is None else 1,
    }
    return LayerState({**found, "num_batches_tracked": torch.tensor(0)}, options)


def _write(
    state: Mapping[str, Tensor], momentum: float | None, ddof: int, n: int | None
) -> tuple[dict[str, Array], float]:
    if momentum is None:
        raise InputError("expected a momentum, got None: the other frameworks have no cumulative average, choose one")
    if not 0 <= momentum <= 1:
        raise InputError(f"expected momentum, the weight of the new value, between 0 and 1, got {momentum}")
    wanted, allowed = _KEYS[2:], {*_KEYS, "num_batches_tracked"}
    if any(key not in state for key in wanted) or set(state) - allowed:
        raise InputError(f"expected a batch norm's state with {_quoted(wanted)}, got {_quoted(state)}")
    found = {key: _tensor(state[key]) for key in _KEYS if key in state}
    _check_shapes(found)
    if n is not None and ddof == 1:
        found["running_var"] = found["running_var"] / _correction(n)
    return {key: tensor.numpy() for key, tensor in found.items()}, round(1 - momentum, 15)


def _tensor(array: Any) -> Tensor:
    """A copy, in the array's own type where NumPy has it."""
    if isinstance(array, Tensor):
        array = array.detach().cpu().clone()
        return array.float() if array.dtype == torch.bfloat16 else array
    return torch.from_numpy(np.array(array))


def _check_shapes(tensors: Mapping[str, Tensor]) -> None:
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1 or tensors["running_mean"].dim() != 1:
        raise ShapeError(f"expected arrays of one shape (C,), got {shapes}")


def _correction(n: int) -> float:
    if n < 2:
        raise InputError(f"expected n, the values a channel in a training batch, of 2 or more, got {n}")
    return bessel_factor(n)


def _quoted(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
