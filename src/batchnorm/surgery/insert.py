"""Put batch norm into a model that has none: after the linear layers, before their non-linearities."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, SurgeryError
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.recognition import Layer, unwrapped
from batchnorm.ops import functional
from batchnorm.probes.feeding import ForwardFn, feed, of_no_inference, undisturbed
from batchnorm.probes.wiring import trace
from batchnorm.surgery.changes import Change, remember
from batchnorm.surgery.places import LINEAR, reader, unfit
from batchnorm.surgery.selection import Layers, select
from batchnorm.surgery.transaction import unchanged_on_error

Kind = Literal["ours", "torch"]
Moments = tuple[Tensor, Tensor, Tensor]
_KINDS: dict[str, tuple[type[Any], type[Any], type[Any]]] = {
    "ours": (BatchNorm1d, BatchNorm2d, BatchNorm3d),
    "torch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
}


class Normalized(nn.Sequential):
    """A linear layer (``layer``) and the batch norm after it (``norm``), in the place that the layer had.

    The layer's own attributes can be asked for as before, as in ``model.fc.weight`` or ``model.fc.out_features``.
    """

    def __getattr__(self, name: str) -> Any:
        """What the pair has, or else the layer."""
        modules = self.__dict__.get("_modules", {})
        if name not in modules and "layer" in modules:
            return getattr(modules["layer"], name)
        return super().__getattr__(name)


@torch.inference_mode(False)  # tensors that are made in it cannot be trained
def insert(
    model: nn.Module,
    example: Any,
    *,
    preserve: bool = False,
    kind: Kind = "ours",
    layers: Layers | None = None,
    forward_fn: ForwardFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> nn.Module:
    r"""Insert batch norm where the paper has it, in place: z = g(W u + b) becomes z = g(BN(W u)).

    Places are found by running the model on the example, so that any Python in its forward will do: linear layers and
    (transposed) convolutions that are called once and whose output goes to a non-linearity and nowhere else, be that a
    module, a function or a method. The bias b is removed: beta takes its part. A layer ``fc`` becomes a
    :class:`Normalized`, a Sequential of ``layer`` and ``norm``: the keys of its state are then ``fc.layer.weight`` and
    ``fc.norm.weight``, ``.bias``, ``.running_mean``, ``.running_var`` and ``.num_batches_tracked``; all others stay.

    With ``preserve`` the outputs on the example do not change. With mean and (biased) var of W u + b over the example,

    .. math::
        \gamma = \sqrt{\mathrm{var} + \epsilon}, \qquad \beta = \mathrm{mean}, \qquad
        \mathrm{running\_mean} = \mathrm{mean} - b, \qquad \mathrm{running\_var} = \mathrm{var}

    which makes each batch norm the identity, on the example in training, where nothing else is random or normalizes by
    the batch, and on any input in eval. Without, gamma is 1, beta 0, and the running statistics 0 and 1 until the model
    has been trained (or recalibrated).

    Args:
        model: any module; in which mode it is does not matter, places are looked for in eval.
        example: a batch, see :func:`batchnorm.probes.feeding.feed`; for ``preserve`` as many samples as can be had.
        preserve: set gamma, beta and running statistics so that the function stays.
        kind: "ours" (:class:`batchnorm.nn.BatchNorm2d`) or "torch"; :func:`batchnorm.convert` makes others of them.
        layers: after which, see :func:`batchnorm.surgery.select`; None for all that are fit.
        forward_fn: how the model takes the example.
        optimizer: is told: gamma and beta join the group of the layer's weight, the bias leaves its own.
        eps, momentum: of the batch norms.

    Returns:
        ``model``. ``bn.changes(model)`` says where something was inserted, and why not elsewhere.

    Raises:
        SurgeryError: (ValueError, RuntimeError) there is no place (the reasons are told); a place has only one value a
            channel in the example, for ``preserve``; the model is inside DistributedDataParallel, has layers that have
            not seen a batch, or would not run, or for ``preserve`` compute the same, on the example. It is as it was.
        InputError: (ValueError) an option out of range.

    Source: Ioffe & Szegedy (2015), section 3.2; for ``preserve`` the end of section 3.
    """
    check_choice("kind", kind, ("ours", "torch"))
    if not 0 < eps < float("inf"):
        raise InputError(f"expected eps above 0, got {eps}")
    inner, example = unwrapped(model)[0], of_no_inference(example)
    _check(model)
    chosen = select(inner, layers, among=lambda module: isinstance(module, LINEAR))
    wiring = trace(inner, example, forward_fn)
    why = {layer.module: unfit(wiring, layer.module) for layer in chosen}
    places = [layer for layer in chosen if not why[layer.module]]
    left = [Change(layer.name, f"left as it is: {reason}") for layer in chosen if (reason := why[layer.module])]
    if not places:
        told = "; ".join(f"{layer.name!r}: {why[layer.module]}" for layer in chosen[:5])
        more = f"; and {len(chosen) - 5} more" if len(chosen) > 5 else ""
        raise SurgeryError(
            f"expected a linear layer or convolution before a non-linearity, got none ({told or 'no such layer'}{more})"
        )
    found: list[Change] = []
    with unchanged_on_error(model, parameters=preserve):
        moments, before = _run(inner, example, forward_fn, places) if preserve else ({}, [])
        pairs: list[tuple[nn.Module, Any, nn.Module]] = []
        for layer in places:
            (step,) = wiring.of(layer.module)
            norm = _norm(layer.module, len(step.output_shape or ()), kind, eps, momentum)
            user = reader(wiring, step)
            assert user is not None
            bias = layer.module.bias
            if preserve:
                _preserve(layer, norm, moments[layer.module])
            layer.module.register_parameter("bias", None)
            _put(inner, layer, norm)
            pairs.append((layer.module, bias, norm))
            what = f"{type(norm).__name__}({norm.num_features}) between it and {user.label}"
            lost = "" if bias is None else "its bias"
            found.append(Change(layer.name, what, "" if preserve else lost))
        try:
            after = _run(inner, example, forward_fn, [])[1]
        except Exception as error:
            raise SurgeryError(
                f"expected a model that runs without its biases, got {type(error).__name__}: {error}: "
                "leave out the layers that need them"
            ) from error
        if preserve:
            _compare(before, after)
    if optimizer is not None:
        _tell(optimizer, pairs)
    remember(model, "insert", found + left)
    return model


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise SurgeryError(
                f"{name or 'the model'}: expected a model outside of DistributedDataParallel, which knows its "
                "parameters already: insert before you wrap it"
            )
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise SurgeryError(f"{name}: expected layers that know their width, got a lazy one: run a batch first")


def _norm(layer: nn.Module, rank: int, kind: Kind, eps: float, momentum: float | None) -> Any:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    features: Any = getattr(layer, "out_features", None) or layer.out_channels
    made = _KINDS[kind][max(1, rank - 2) - 1](features, eps, momentum, device=weight.device, dtype=weight.dtype)
    return made.train(layer.training)


def _put(model: nn.Module, layer: Layer, norm: nn.Module) -> None:
    pair = Normalized(OrderedDict(layer=layer.module, norm=norm))
    pair.training = layer.module.training
    for name in layer.names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = pair


def _run(
    model: nn.Module, example: Any, forward_fn: ForwardFn | None, layers: list[Layer]
) -> tuple[dict[nn.Module, Moments], list[Tensor]]:
    """Count, mean and m2 of what each layer gives on the example, and what the model gives, in eval mode."""
    found: dict[nn.Module, Moments] = {}

    def see(module: nn.Module, _args: Any, output: Tensor) -> None:
        found[module] = functional.operators().stats(output, None)

    handles = [layer.module.register_forward_hook(see) for layer in layers]
    try:
        with undisturbed(model, training=False):
            result = feed(model, example, forward_fn)
    finally:
        for handle in handles:
            handle.remove()
    return found, [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _preserve(layer: Layer, norm: Any, moments: Moments) -> None:
    count, mean, m2 = moments
    if count <= 1:
        raise SurgeryError(f"{layer.name}: expected more than 1 value per channel in the example, got {int(count)}")
    if not (mean.isfinite().all() and m2.isfinite().all()):
        raise SurgeryError(f"{layer.name}: expected a finite output on the example, got inf or NaN")
    var = m2 / count
    bias: Any = layer.module.bias
    norm.weight.copy_((var + norm.eps).sqrt())
    norm.bias.copy_(mean)
    norm.running_mean.copy_(mean if bias is None else mean - bias)
    norm.running_var.copy_(var)
    norm.num_batches_tracked.fill_(1)


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point():
            continue
        scale = float(old.abs().nan_to_num(0, 0, 0).amax()) if old.numel() else 0.0
        off = float((old.double() - new.double()).abs().nan_to_num(0).amax()) if old.numel() else 0.0
        allowed = 1e-4 if old.dtype.itemsize >= 4 else 5e-2
        if off > allowed * max(scale, torch.finfo(old.dtype).tiny):
            raise SurgeryError(
                f"expected the same outputs on the example, got a difference of {off:.2g} at a size of {scale:.2g}: "
                "the forward reads its layers otherwise than by calling them"
            )


def _tell(optimizer: torch.optim.Optimizer, pairs: list[tuple[nn.Module, Any, nn.Module]]) -> None:
    """gamma and beta join the group of the layer's weight, the bias leaves."""
    for layer, bias, norm in pairs:
        weights = {id(parameter) for parameter in layer.parameters()}
        for group in optimizer.param_groups:
            joins = any(id(parameter) in weights for parameter in group["params"])
            group["params"] = [parameter for parameter in group["params"] if parameter is not bias]
            if joins:
                group["params"] += list(norm.parameters())
                weights = set()
        if bias is not None:
            optimizer.state.pop(bias, None)
