"""The doctor: a linter for the normalization of a model."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn, optim

from batchnorm._errors import InputError
from batchnorm.nn.recognition import unwrapped
from batchnorm.probes.feeding import ForwardFn, check_batches
from batchnorm.probes.health.finding import SEVERITIES, Diagnosis, Finding
from batchnorm.probes.health.rule import Rule, selected
from batchnorm.probes.health.subject import Subject


def diagnose(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    example: Any = None,
    *,
    forward_fn: ForwardFn | None = None,
    optimizer: optim.Optimizer | Sequence[optim.Optimizer] | None = None,
    select: Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> Diagnosis:
    """Find what is wrong with the batch norms of ``model``, which is left exactly as it was.

    The model alone is enough for the rules of structure, settings and state (BN0xx to BN2xx); ``batches`` are needed
    for those about data (BN3xx). Each code has a page in ``docs/rules``.

    Args:
        model: any module.
        batches: data like those that it was trained on, in batches of the size that it is trained with; a list, a
            DataLoader or any iterable. A batch is what :func:`batchnorm.recalibrate` takes: a tensor, a mapping
            (``model(**batch)``), or (inputs, targets).
        example: one batch, to see how the layers are connected; without it the first of ``batches`` is taken, and
            without those torch.fx reads the forward as far as it can.
        forward_fn: ``forward_fn(model, batch)`` for batches of another kind.
        optimizer: that which trains the model, or several that do, to see how gamma and beta are treated.
        select: codes, names or patterns of the rules to apply (``["BN2", "never-updated"]``); None for all.
        ignore: those to leave out.

    Returns:
        The findings, the worst first.

    Raises:
        InputError: (ValueError) no such rule; no batch in ``batches``, or one batch in the place of several; a model
            that is no ``nn.Module``, or a ScriptModule; an optimizer that is none.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(unwrapped(model)[0], torch.jit.ScriptModule):
        raise InputError("expected a model in Python, got a ScriptModule: diagnose the model that it was made from")
    optimizers = [] if optimizer is None else optimizer if isinstance(optimizer, Sequence) else [optimizer]
    for each in optimizers:
        if not isinstance(getattr(each, "param_groups", None), list):
            raise InputError(f"expected optimizer= to be a torch.optim.Optimizer, got {type(each).__name__}")
    chosen = selected(select, ignore)
    if batches is not None:
        batches, first = _peeked(batches)
        example = first if example is None else example
    subject = Subject(model, batches, example, forward_fn=forward_fn, optimizers=optimizers or None)
    findings: list[Finding] = []
    checked: list[str] = []
    skipped: dict[str, str] = {}
    for candidate in chosen:
        missing = _missing(candidate, subject)
        if missing:
            skipped[candidate.code] = f"needs {missing}"
            continue
        findings += candidate.findings(subject)
        checked.append(candidate.code)
    # Stable: within a code the order is that of the layers.
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.code))
    return Diagnosis(tuple(findings), len(subject.layers), tuple(checked), skipped)


def _missing(candidate: Rule, subject: Subject) -> str:
    """What the rule cannot do without and does not have; empty where it has all."""
    match candidate.needs:
        case "optimizer":
            return "" if subject.groups is not None else "optimizer"
        case "batches":
            return "batches" if subject.batches is None else subject.cannot_run
        case "wiring":
            return subject.cannot_trace
        case _:
            return ""


def _peeked(batches: Iterable[Any]) -> tuple[Iterable[Any], Any]:
    """The same batches, and the first of them."""
    check_batches(batches)
    iterator = iter(batches)
    first = next(iterator, _NOTHING)
    if first is _NOTHING:
        raise InputError("expected at least one batch to look at, got none")
    # What is an iterator already cannot begin anew; anything else can, and may be read more than once.
    return (itertools.chain([first], iterator) if iterator is batches else batches), first


_NOTHING = object()
