"""Batch norm folded into the linear layers and convolutions around it: the same function with fewer steps."""

from __future__ import annotations

import copy
from typing import Any, overload

import torch
from torch import nn
from torch.export import ExportedProgram

from batchnorm._checks import check_not_negative
from batchnorm._errors import InputError, SurgeryError
from batchnorm.nn.recognition import unwrapped
from batchnorm.probes.feeding import ForwardFn, of_no_inference
from batchnorm.probes.wiring import trace
from batchnorm.surgery.changes import Change, remember
from batchnorm.surgery.folding import modules, program
from batchnorm.surgery.folding.norms import check_norms
from batchnorm.surgery.folding.plan import Norm, Plan
from batchnorm.surgery.folding.verify import Reference, default_rtol, where_they_part


@overload
def fold(
    model: nn.Module,
    example: Any,
    *,
    forward_fn: ForwardFn | None = None,
    rtol: float | None = None,
    strict: bool = False,
) -> nn.Module: ...
@overload
def fold(
    model: ExportedProgram,
    example: Any = None,
    *,
    forward_fn: None = None,
    rtol: float | None = None,
    strict: bool = False,
) -> ExportedProgram: ...
@torch.inference_mode(False)  # tensors that are made in it can be neither trained nor loaded into
def fold(
    model: nn.Module | ExportedProgram,
    example: Any = None,
    *,
    forward_fn: ForwardFn | None = None,
    rtol: float | None = None,
    strict: bool = False,
) -> nn.Module | ExportedProgram:
    r"""A copy of ``model`` for inference in which batch norms are a part of the layers around them.

    In eval a batch norm is ``s x + t`` with ``s = gamma / sqrt(var + eps)``, ``t = beta - s mean``, so that

    .. math::
        s (W x + b) + t = (s W) x + (s b + t), \qquad W (s x + t) + b = (W s) x + (b + W t)

    computed in float64 and rounded once to the weight's dtype. The Python of the model's forward stays as it is, with
    any control flow: weights change, and an ``Identity``, or the activation that was a part of the batch norm, takes
    its place. That nothing else reads what lies between is proven by what ran on the example
    (:func:`batchnorm.probes.wiring.trace`), and the folded model must then give what the model gave.

    - Into the layer *before*: Linear, Conv, ConvTranspose of any dimension, groups, dilation and padding, with or
      without bias; also through views, transpositions, concatenations and averages that keep channels apart, and into
      several layers at once. ``DecorrelatedBatchNorm`` and ``IterNorm`` where no groups of channels are in the way.
    - Else into the layer *behind*, where no activation is between and its padding does not add zeros (or t is 0).
    - Else into a batch norm before it.

    The others stay, for a reason that :func:`batchnorm.changes` tells of the result, beside what was folded into what.

    Args:
        model: in eval mode; it is not touched. Inside torch.compile or a parallel wrapper: the model in there, and so
            is the result. A program of :func:`torch.export.export` gives a new program.
        example: a batch (see :func:`batchnorm.probes.feeding.feed`). What it does not lead through is left. A program
            has one of its own.
        forward_fn: how the model takes the example: ``forward_fn(model, batch)``.
        rtol: how far an output may be off, relative to the largest of its tensor, on the example and on the example
            with noise. None is 1e-4, and for a model with float16 numbers 2e-2, with bfloat16 1e-1.
        strict: refuse where a batch norm would be left.

    Returns:
        A new model, of the same modes, dtypes and devices. New biases learn if the weight does.

    Raises:
        SurgeryError: a batch norm is in training mode, has no running statistics, or statistics that are NaN, infinite
            or negative; the model has no numbers yet (meta device, lazy layers), cannot be copied, does not take the
            example, or is random; the folded model differs by more than ``rtol`` (the message says at which layer);
            with ``strict``, a batch norm is left.
        InputError: ``rtol`` is negative; the model is a ScriptModule.
    """
    example = of_no_inference(example)
    if rtol is not None:
        check_not_negative("rtol", rtol)
    if isinstance(model, ExportedProgram):
        return _fold_program(model, example, rtol, strict)
    inner, prefix = unwrapped(model)
    _check_ready(inner)
    check_norms(inner)
    twin, done = _copied(inner)
    if prefix:
        kinds = " and ".join(_wrappers(model))
        done.append(Change("", f"is the model inside {kinds}, which it is not in: wrap it again"))
    if example is None:
        raise SurgeryError("expected an example to fold a model, got None: give a batch that it takes")
    tolerance = default_rtol(inner.parameters()) if rtol is None else float(rtol)
    reference = Reference(twin, example, forward_fn, tolerance)
    plan = modules.plan_of(twin, trace(twin, example, forward_fn))
    done += _carried_out(plan, strict)
    changed = {taker.name for taker in plan.takers.values()} | {norm.name for norm in plan.norms if norm.forward}
    reference.check(
        twin, lambda batch: where_they_part(copy.deepcopy(inner), twin, changed, batch, forward_fn, tolerance)
    )
    remember(twin, "fold", done, before=model)
    return twin


def _fold_program(given: ExportedProgram, example: Any, rtol: float | None, strict: bool) -> ExportedProgram:
    forward_fn: ForwardFn | None = None
    if example is None:
        example, forward_fn = given.example_inputs, lambda model, batch: model(*batch[0], **batch[1])
        if example is None:
            raise SurgeryError("expected an example to fold a program that has none of its own: give a batch")
    editor = program.ProgramEditor(given)
    tolerance = default_rtol(given.parameters()) if rtol is None else float(rtol)
    reference = Reference(given.module(), example, forward_fn, tolerance)
    done = _carried_out(program.plan_of(editor), strict)
    folded = editor.program()
    reference.check(folded.module(), lambda _: "in a program")
    remember(folded, "fold", done, before=given)
    return folded


def _carried_out(plan: Plan, strict: bool) -> list[Change]:
    plan.run()
    left = [norm for norm in plan.norms if norm.into is None]
    if strict and left:
        first = "; ".join(str(_change(norm)) for norm in left[:3])
        raise SurgeryError(f"expected to fold all {len(plan.norms)} batch norms, {len(left)} would be left: {first}")
    return [_change(norm) for norm in plan.norms] or [Change("", "has no batch norm: nothing to fold")]


def _check_ready(model: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InputError("expected a model in Python, got a ScriptModule: fold the model that it was made from")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise SurgeryError(
                f"expected a model with all its parameters, got {name} without: run a batch through first"
            )
        if tensor.is_inference():
            raise SurgeryError(f"expected a model made outside of inference mode, got {name} made in it: make it anew")
        if tensor.is_meta:
            raise SurgeryError(f"expected a model with numbers, got {name} on the meta device: load its weights first")


def _copied(model: nn.Module) -> tuple[nn.Module, list[Change]]:
    """A copy, without torch.compile inside; what that changed."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise SurgeryError(
            f"expected a model that can be copied, got {type(error).__name__}: {error}: remove weight norms, "
            "pruning and tensors with a gradient's history first"
        ) from error
    done = []
    for parent, module in list(twin.named_modules()):
        for key, child in list(module.named_children()):
            inner, _ = unwrapped(child)
            if inner is not child:
                setattr(module, key, inner)
                name = f"{parent}.{key}" if parent else key
                done.append(Change(name, f"is the module inside {type(child).__name__}, which is left off"))
    return twin, done


def _wrappers(model: nn.Module) -> list[str]:
    found = []
    while unwrapped(model)[1]:
        found.append(
            "torch.compile" if isinstance(getattr(model, "_orig_mod", None), nn.Module) else type(model).__name__
        )
        inner = getattr(model, "_orig_mod", None) or model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return found


def _change(norm: Norm) -> Change:
    if norm.into is None:
        return Change(norm.name, f"{norm.kind} left: {'; '.join(norm.reasons)}")
    return Change(norm.name, f"{norm.kind} folded into {', '.join(norm.into)}")
