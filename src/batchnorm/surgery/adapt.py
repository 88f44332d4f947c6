"""Adapt a model to the data that it meets at test time, by its batch norms alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, SurgeryError
from batchnorm.nn.recognition import Layer, unwrapped
from batchnorm.probes.feeding import ForwardFn, check_batches
from batchnorm.surgery.adapted import Adapted, OnSorted
from batchnorm.surgery.changes import Change, remember
from batchnorm.surgery.selection import Layers, select
from batchnorm.surgery.streaming import Statistics
from batchnorm.surgery.tent import Entropy, LogitsOf, OptimizerOf
from batchnorm.surgery.transaction import unchanged_on_error

Method = Literal["adabn", "tent"]


def adapt(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    method: Method = "adabn",
    *,
    forward_fn: ForwardFn | None = None,
    layers: Layers | None = None,
    num_batches: int | None = None,
    prior: float = 0.0,
    lr: float = 1e-3,
    steps: int = 1,
    optimizer: OptimizerOf | None = None,
    logits: LogitsOf | None = None,
    episodic: bool = False,
    on_sorted: OnSorted = "warn",
) -> Adapted:
    r"""Adapt ``model`` to another domain without labels: by ``batches`` of it, or by each batch that it is called with.

    - "adabn" replaces the statistics of the source by the target's. With a ``prior`` of N samples they are mixed,

      .. math::
          \mu = \frac{N}{N + n} \mu_s + \frac{n}{N + n} \mu_t, \qquad
          \sigma^2 = \frac{N}{N + n} \sigma_s^2 + \frac{n}{N + n} \sigma_t^2

      with n the samples that have been seen of the target. With ``batches`` these are population statistics, found by
      :func:`batchnorm.recalibrate`. Without, they are those of all batches since the last :meth:`Adapted.reset`, the
      present one included, merged exactly (biased variance, as a training batch is normalized).
    - "tent" normalizes with each batch's own statistics and, having answered, takes ``steps`` steps that lower the mean
      entropy of the predictions, over gamma and beta alone. With ``batches`` it does so on each of them once, and then
      sets the statistics to the population's, so that afterwards a single sample can be asked for too.

    Everything but the normalization is in eval mode while the adapted model runs: dropout drops nothing (the authors'
    TENT leaves the whole model in train mode). Modes and what requires a gradient are given back after each call.

    Each process of a distributed job adapts by itself and waits for no other; :func:`batchnorm.recalibrate` pools over
    processes.

    A batch with NaN or infinity teaches nothing: it is normalized with what was known, for "tent" its own statistics.

    Batches sorted by class destroy either method, since a batch's statistics then are its class's. It is looked for in
    what the model predicted before it was adapted, where its outputs are logits (N, K): a second forward, without
    gradients, for each batch. A first batch by itself cannot be told.

    Args:
        model: its batch norms are altered in place, as the adaptation goes on. Inside torch.compile and the parallel
            wrappers, the module that they hold is what runs.
        batches: of the target domain; see :func:`batchnorm.recalibrate`. For "tent" they are read twice.
        method: "adabn" or "tent".
        forward_fn: ``forward_fn(model, batch)``; the result is then called with a batch.
        layers: which batch norms, see :func:`batchnorm.surgery.select`; None for all.
        num_batches: how many to use at most.
        prior: N, in samples, 0 for the target alone. For "adabn".
        lr: of Adam, which has no weight decay here.
        steps: of the optimizer for each batch.
        optimizer: a function of the list of parameters that makes another one, such as
            ``lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9)``.
        logits: a function that finds logits (N, K, *) in what the model returns, where that is not a tensor, a mapping
            with "logits" or an object with such an attribute.
        episodic: without ``batches``, forget after each batch: :meth:`Adapted.reset` comes before each call.
        on_sorted: what is done about sorted batches: "warn" once with a :class:`SortedBatchesWarning`, "raise" a
            SurgeryError before the batch is adapted to, "ignore" and save the second forward.

    Returns:
        A module that is called as ``model`` is, with :meth:`Adapted.reset`. ``bn.changes(model)`` tells what was done.

    Raises:
        InputError: (ValueError) an option out of range, or one that does not go with the others.
        SurgeryError: (ValueError, RuntimeError) there is no layer to adapt, one that "adabn" cannot (those without a
            running variance), or batches are sorted and were not to be. The model is as it was.

    Sources: Li, Wang, Shi, Liu, Hou (2016), "Revisiting Batch Normalization For Practical Domain Adaptation";
    Schneider, Rusak, Eck, Bringmann, Brendel, Bethge (2020), "Improving robustness against common corruptions by
    covariate shift adaptation", equation 2; Wang, Shelhamer, Liu, Olshausen, Darrell (2021), "Tent: Fully Test-Time
    Adaptation by Entropy Minimization", section 3.
    """
    check_choice("method", method, ("adabn", "tent"))
    check_choice("on_sorted", on_sorted, ("warn", "raise", "ignore"))
    if not 0 <= prior < float("inf") or (prior and method == "tent"):
        raise InputError(f'expected a prior of 0 or more samples, for method="adabn" alone, got {prior} for {method!r}')
    if not lr > 0:
        raise InputError(f"expected lr above 0, got {lr}")
    if steps < 1:
        raise InputError(f"expected steps of 1 or more, got {steps}")
    if isinstance(batches, Tensor | Mapping):
        raise InputError(f"expected batches, got one {type(batches).__name__}: give a list of it, or call the result")
    if batches is not None:
        check_batches(batches)
    if batches is None and num_batches is not None:
        raise InputError(f"expected num_batches together with batches, got {num_batches} without")
    if batches is not None and episodic:
        raise InputError("expected episodic=True without batches: there is nothing to forget between them")
    if method == "tent" and batches is not None and iter(batches) is batches:
        raise InputError("expected batches that can be read twice, got an iterator: give a list or a DataLoader")
    found = _chosen(model, layers, method)
    way: Statistics | Entropy = Statistics(prior)
    if method == "tent":
        way = Entropy(steps, optimizer or partial(torch.optim.Adam, lr=lr), logits)
    adapted = Adapted(
        model, found, way, forward_fn, logits=logits, episodic=episodic, online=batches is None, on_sorted=on_sorted
    )
    if batches is not None:
        with unchanged_on_error(model, parameters=True):
            told = adapted.adapt_to(batches, num_batches)
    elif method == "adabn":
        told = f"normalizes with the statistics of what it is called with, and a prior of {prior:g} samples"
    else:
        told = f"gamma and beta learn from what it is called with, {steps} step{'s' * (steps > 1)} a batch"
    lost = str(adapted.sortedness) if adapted.sortedness.is_sorted else ""
    remember(model, "adapt", [Change(layer.name, told, lost) for layer in found])
    return adapted


def _chosen(model: nn.Module, layers: Layers | None, method: Method) -> list[Layer]:
    """The layers to adapt; without running statistics a layer normalizes with its batch as it is."""
    found = []
    for layer in select(unwrapped(model)[0], layers):
        buffers = layer.module._buffers
        if buffers.get("running_mean") is None and method == "adabn":
            continue
        if buffers.get("running_var") is None and method == "adabn":
            raise SurgeryError(
                f"{layer.name}: expected a layer with a running variance, got {type(layer.module).__name__}: "
                "leave it out with layers=, or recalibrate the model"
            )
        found.append(layer)
    if not found:
        raise SurgeryError(f"expected a batch norm to adapt, got {type(model).__name__} without")
    if method == "tent" and not any(layer.module._parameters.get("weight") is not None for layer in found):
        raise SurgeryError(f"{found[0].name}: expected a batch norm with gamma and beta to learn, got affine=False")
    return found
