"""From the user's model to the model of a variant: its factory is asked, or surgery does it; weights begin alike."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from batchnorm._errors import BatchnormError, InputError
from batchnorm.nn.batch_norm import _BatchNormLayer
from batchnorm.nn.recognition import batch_norms
from batchnorm.ops.activations import activation_layer
from batchnorm.probes.feeding import ForwardFn
from batchnorm.study.comparison import norms
from batchnorm.study.comparison.variants import Variant
from batchnorm.surgery.convert import convert
from batchnorm.surgery.insert import insert

NAMES = ("norm", "norm_layer", "normalization", "norm_fn", "make_norm")
"""Names of the argument by which a factory takes the normalization."""


@dataclass(frozen=True)
class Deferred:
    """Something that is made where it is needed: in this process, and anew in each worker.

    ``load()`` gives it; both ``load`` and what it needs must be picklable. ``label`` is what it is called.
    """

    load: Callable[[], Any]
    label: str


class Builder:
    """Makes the models of a comparison.

    Args:
        source: a factory of one argument (the normalization, a function of the number of features) or with an argument
            called ``norm``, ``norm_layer`` or the like; a factory without; or a module.
        example: inputs of a batch as the model takes them, for surgery to find its way.
        forward_fn: how the model takes ``example``, where that is not by calling it.

    Raises:
        InputError: the source is none of these.
    """

    def __init__(self, source: Any, example: Any, forward_fn: ForwardFn | None = None) -> None:
        self.source, self.example, self.forward_fn = source, example, forward_fn
        self.label = label(source)
        self.keyword: str | None = None
        self.style = "given" if isinstance(source, nn.Module) else self._style(source)

    def _style(self, source: Any) -> str:
        if not callable(source):
            raise InputError(f"expected a model or a function that makes one, got {type(source).__name__}")
        try:
            parameters = list(inspect.signature(source).parameters.values())
        except (TypeError, ValueError):
            return "fresh"
        for parameter in parameters:
            if parameter.name in NAMES and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
                self.keyword = parameter.name
        required = [
            parameter.name
            for parameter in parameters
            if parameter.default is inspect.Parameter.empty
            and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        ]
        rest = [name for name in required if name != self.keyword]
        if self.keyword is None and len(rest) == 1:
            return "argument"
        if rest:
            raise InputError(
                f"expected {self.label} to take the normalization alone, or nothing, got a function of "
                f"{', '.join(required)}: bind the others with functools.partial"
            )
        return "fresh" if self.keyword is None else "argument"

    def build(self, variant: Variant, seed: int) -> nn.Module:
        """The model of ``variant``, its weights drawn by ``seed``.

        Raises:
            InputError: the factory fails, gives no module, or never asks for its normalization.
            SurgeryError: the model has no place for a batch norm.
        """
        seeded(seed)
        if self.style == "argument":
            return self._by_factory(variant)
        model = copy.deepcopy(self.source) if self.style == "given" else self._called()
        return normalized(model, variant, self.example, self.forward_fn)

    def begin_alike(self, model: nn.Module, reference: nn.Module) -> tuple[int, int]:
        """Give ``model`` the initial parameters of ``reference`` that have a place in it: same name, same shape.

        Returns:
            How many values are the same now, of how many that ``reference`` has.
        """
        theirs = dict(reference.named_parameters())
        same = 0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # What was inserted after a layer moved it one level down.
                other = theirs.get(name, theirs.get(name.replace(".layer.", ".") if ".layer." in name else ""))
                if other is not None and other.shape == parameter.shape and not _is_lazy(other):
                    parameter.copy_(other)
                    same += parameter.numel()
        return same, sum(parameter.numel() for parameter in theirs.values())

    def _by_factory(self, variant: Variant) -> nn.Module:
        asked = 0

        def norm(num_features: int) -> nn.Module:
            nonlocal asked
            asked += 1
            return variant(num_features)

        model = self._called(**{self.keyword: norm}) if self.keyword else self._called(norm)
        if not asked:
            raise InputError(
                f"expected {self.label} to call its argument {self.keyword or ''} with numbers of features, it never "
                "did: put norm(num_features) where a normalization belongs, or drop the argument"
            )
        return model

    def _called(self, *args: Any, **kwargs: Any) -> nn.Module:
        try:
            model = self.source(*args, **kwargs)
        except BatchnormError:
            raise
        except Exception as error:
            raise InputError(f"{self.label} fails: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if not isinstance(model, nn.Module):
            raise InputError(f"expected {self.label} to give a torch.nn.Module, got {type(model).__name__}")
        if self.style != "argument" and model is self.source:
            raise InputError(f"expected {self.label} to make a new model each time, got the same one again")
        return model

    def note(self) -> str:
        """How variants are made of this source, in a sentence."""
        if self.style == "argument":
            return f"{self.label} takes the normalization as an argument; each variant is its own call."
        found = list(batch_norms(self.source if self.style == "given" else self._called()))
        how = (
            f"its {len(found)} batch norms are replaced by each variant's layer; without normalization their beta stays"
            if found
            else "it has no batch norms: each variant's layer is put between a linear layer and its non-linearity, "
            "where its bias goes; without normalization it stays as it is, whatever other normalization it has"
        )
        start = "; every seed starts from the weights that it has, only orders differ" if self.style == "given" else ""
        return f"{self.label}: {how}{start}."


def normalized(model: nn.Module, variant: Variant, example: Any, forward_fn: ForwardFn | None = None) -> nn.Module:
    """``model`` with the layers of ``variant`` in the place of its batch norms, or inserted where it has none.

    gamma and beta stay where the new layer has such, and so does a fused activation. Without normalization beta stays,
    as the bias that a layer before a batch norm does not have.

    Raises:
        SurgeryError: the model cannot be altered so, or has no place for a batch norm.
    """
    if next(batch_norms(model), None) is None:
        if variant.kind == "none":
            return model
        model = insert(model, example, forward_fn=forward_fn)
    if variant.kind == "torch":
        return convert(model, "torch", unknown="skip")
    model = convert(model, "ours", unknown="skip")
    if variant.kind == "batch":
        return model
    return convert(model, lambda _, layer: _replacement(layer, variant))


def _replacement(layer: nn.Module, variant: Variant) -> nn.Module:
    features: Any = layer.num_features
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if variant.kind == "none":
        made: nn.Module = norms.Nothing(bias)
    else:
        like = weight if weight is not None else layer._buffers.get("running_mean")
        made = norms.device_and_dtype(variant(features), like)
        norms.takes_tensors(made, weight, bias)
    after = [getattr(layer, name) for name in ("drop", "act") if isinstance(getattr(layer, name, None), nn.Module)]
    if isinstance(layer, _BatchNormLayer) and layer.activation is not None:
        after.append(activation_layer(layer.activation))
    return nn.Sequential(made, *after) if after else made


def seeded(seed: int) -> None:
    """Seed everything that a factory may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a user's factory may use it


def label(thing: Any) -> str:
    """What a model or factory is called."""
    if isinstance(thing, Deferred):
        return thing.label
    if isinstance(thing, nn.Module):
        return type(thing).__name__
    inner = getattr(thing, "func", thing)
    return str(getattr(inner, "__name__", type(inner).__name__))


def as_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with: a tensor, a tuple of them, or a mapping of names."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}


def _is_lazy(parameter: Any) -> bool:
    return bool(torch.nn.parameter.is_lazy(parameter))
