"""Running statistics that are those of the population, of whatever weights a model has now."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, SurgeryError
from batchnorm.nn.recognition import RECALIBRATED, Layer, batch_norms, frozen_parts, is_frozen, unwrapped
from batchnorm.probes.feeding import ForwardFn, call, check_batches, device_of, on_device, undisturbed
from batchnorm.surgery.changes import Change, remember
from batchnorm.surgery.convergence import Convergence
from batchnorm.surgery.population import Collected, Population, buffers_of, movement
from batchnorm.surgery.ranks import alone, first_known, pool_over_ranks
from batchnorm.surgery.schedule import groups
from batchnorm.surgery.selection import Layers, select
from batchnorm.surgery.transaction import unchanged_on_error

Progress = Callable[[int, int | None], Any]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    method: Literal["batch", "sequential"] = "batch",
    num_batches: int | None = None,
    until: float | None = None,
    layers: Layers | None = None,
    progress: Progress | None = None,
    process_group: Any = None,
) -> nn.Module:
    r"""Replace the running statistics of batch norms by those of ``batches`` under the weights of now, in place.

    .. math::
        \mathrm{running\_mean} = \frac{1}{n} \sum_i x_i, \qquad
        \mathrm{running\_var} = \frac{1}{n - \mathrm{ddof}} \sum_i (x_i - \mathrm{running\_mean})^2

    over all n values that a channel of the layer's input has in all batches, merged exactly in float64: a ragged last
    batch counts by its size, what a mask or lengths hide does not count, and a layer that is called several times has
    the values of all its calls. ``ddof`` is the layer's, 1 for torch's. Covariances, of complex and whitening layers,
    likewise.

    This is the variance of all values, with the spread between the means of batches, which is what a value at
    inference deviates by. Algorithm 2 of Ioffe & Szegedy (2015) writes ``m / (m - 1) E[Var_B]``, the mean over batches
    of m values of their unbiased variances, as ``torch.optim.swa_utils.update_bn`` computes: the same in expectation
    for independent values, and smaller for batches whose values are alike.

    While it runs, everything is in eval mode and without gradients, so that dropout drops nothing. Parallel wrappers
    and ``torch.compile`` are left out, and ``forward_fn`` is given the module that they hold.

    Args:
        model: any module.
        batches: whatever the model takes: a tensor is ``model(batch)``, a mapping ``model(**batch)``, of a tuple or
            list, which in torch is (inputs, targets), the first. Any iterable; a generator for ``method="batch"`` only.
        forward_fn: ``forward_fn(model, batch)`` in the place of this.
        method: "batch": one pass in which each chosen layer normalizes with its batch, as in training, which is what
            layers behind it see (precise BN). "sequential": a layer is measured when those before it have their new
            statistics, so that they are exactly those of its input at inference. It takes as many passes as batch norms
            are chained, and batches that are the same at each (random state is: shuffling loaders are). What is exact
            ends at a layer that feeds itself.
        num_batches: how many to use at most, of each pass; None for all.
        until: stop when converged to this, a tolerance in standard deviations such as .01: at 8, 16, 32, ... batches,
            when since half of them no channel's mean has moved by more, no deviation by more than this share, and no
            mean has a larger standard error, judged by the spread between batches. A warning where that is not reached.
        layers: which batch norms, see :func:`batchnorm.surgery.select`; None for all. The others stay as they are.
        progress: called with the number of batches done and of all, or None where that is not known.
        process_group: where torch.distributed runs, the ranks whose batches are pooled, all of which must call; None
            for all ranks, False for this one alone. Each may have any number of batches, or none, and all end with
            the same bits.

    Returns:
        ``model``. ``bn.changes(model)`` says what was done to each layer. ``num_batches_tracked`` is the number of
        calls that were pooled, of all ranks; momentum, modes and random state are as they were. Layers that keep no
        running statistics or have been told not to move them are left alone, and so are those that no batch reached,
        with a warning.

    Raises:
        InputError: (ValueError) there is no batch or no batch norm; one batch in the place of several; an argument out
            of range.
        SurgeryError: (ValueError, RuntimeError) a layer is given NaN or infinity, or a single value a channel; the
            batch norms are in a ScriptModule.
        SynchronizationError: (RuntimeError) another rank failed or has another model.
        Whatever is raised, here or in the model or the loader, the model is as it was.

    Source: Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3 and appendix, for what eval should use.
    """
    check_choice("method", method, ("batch", "sequential"))
    check_batches(batches)
    if progress is not None and not callable(progress):
        raise InputError(f"expected progress to be a function of the batches done and of all, got {progress!r}")
    if num_batches is not None and num_batches < 1:
        raise InputError(f"expected num_batches of 1 or more, got {num_batches}")
    if until is not None and not 0 < until < math.inf:
        raise InputError(f"expected until, a tolerance in standard deviations, above 0, got {until}")
    if method == "sequential" and isinstance(batches, Iterator):
        raise InputError("expected batches that can be read several times for method='sequential', got an iterator")
    kept, left = _chosen(model, layers)
    run = _Run(model, batches, forward_fn, num_batches, until, progress, process_group)
    with unchanged_on_error(model):
        collected = run.once(kept) if method == "batch" else run.in_turn(kept)
        done = [each for each in collected if each.reached]
        values: dict[Tensor, Tensor] = {}
        for each in done:
            values.update(buffers_of(each))
        told = [Change("", run.summary(len(done), len(kept)))]
        told += [_told(each) for each in collected]
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)
    missed = [each.layer.name for each in collected if not each.reached]
    if missed:
        warnings.warn(
            f"no batch reached {', '.join(map(repr, missed[:5]))}{' and others' if len(missed) > 5 else ''}: running "
            "statistics left as they were",
            RuntimeWarning,
            stacklevel=2,
        )
    if run.unsettled:
        warnings.warn(run.unsettled, RuntimeWarning, stacklevel=2)
    _note_averages(model, {each.layer.module for each in collected if each.reached})
    remember(model, "recalibrate", told + left)
    return model


def _note_averages(model: nn.Module, done: set[nn.Module]) -> None:
    for module in model.modules():
        if isinstance(module, AveragedModel) and {layer.module for layer in batch_norms(module)} <= done:
            module.__dict__[RECALIBRATED] = int(module.n_averaged)


def _chosen(model: nn.Module, layers: Layers | None) -> tuple[list[Layer], list[Change]]:
    """The layers to recalibrate, and what is said of the others."""
    kept: list[Layer] = []
    left: list[Change] = []
    for layer in select(model, layers):
        buffers = layer.module._buffers
        tensors = [tensor for tensor in buffers.values() if tensor is not None]
        if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
            raise SurgeryError(
                f"{layer.name!r}: expected a layer with values, got one without yet (lazy, or on the meta device): run "
                "the model on a batch first"
            )
        if any(tensor.is_inference() for tensor in tensors) and not torch.is_inference_mode_enabled():
            raise SurgeryError(
                f"{layer.name!r}: expected a layer made outside of inference mode, got one made in it, which cannot be "
                "written to: make it anew"
            )
        if buffers.get("running_mean") is None:
            left.append(Change(layer.name, "left as it was: it keeps no running statistics"))
        elif not layer.module.track_running_stats:
            left.append(Change(layer.name, "left as it was: its running statistics are not to move"))
        else:
            kept.append(layer)
    if not kept:
        got = f"{len(left)} without" if left or _held(model) else "none"
        raise InputError(f"expected batch norms whose running statistics move, got {got}{_held(model)}")
    return kept, left


def _held(model: nn.Module) -> str:
    """What would let the statistics of frozen layers move, if there are such."""
    found = [layer.module for layer in batch_norms(model, frozen=True)]
    frozen, constant = sum("update" in frozen_parts(module) for module in found), sum(map(is_frozen, found))
    told = [f"{frozen} frozen: bn.unfreeze(model) lets them move"] if frozen else []
    if constant:
        told.append(
            f'{constant} constant by their class: bn.convert(model, to="torch", layers="*") makes others of them'
        )
    return f" ({'; '.join(told)})" if told else ""


class _Run:
    """The passes over the batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward_fn: ForwardFn | None,
        num_batches: int | None,
        until: float | None,
        progress: Progress | None,
        group: Any,
    ) -> None:
        self.model, self.inner = model, unwrapped(model)[0]
        self.batches, self.forward_fn = batches, forward_fn
        self.num_batches, self.until, self.progress = num_batches, until, progress
        self.group, self.alone = group, alone(group)
        self.passes = 1
        self.done = 0  # batches, of all passes
        self.used = 0  # batches of the latest pass, of all ranks
        self.reached = ""
        self.unsettled = ""

    def once(self, layers: list[Layer], given: dict[Tensor, Tensor] | None = None) -> list[Collected]:
        """One pass; ``given`` are buffers' values meanwhile."""
        population = Population(layers)
        error: Exception | None = None
        try:
            self._pass(population, given or {})
        except Exception as caught:
            if self.alone:
                raise
            error = caught
        if not self.alone:
            pool_over_ranks(population, error, self.group)
        if population.batches == 0:
            raise InputError("expected at least one batch, got none")
        self.used = population.batches
        return list(population.collected.values())

    def in_turn(self, layers: list[Layer]) -> list[Collected]:
        """A pass for each group of layers that do not feed each other, those nearest to the input first."""
        order = self._order(layers)
        by_name = {layer.name: layer for layer in layers}
        known = {name for group in order for name in group}
        # What the first batch does not reach may be reached by others, and then has its turn at the end.
        unseen = [layer for layer in layers if layer.name not in known]
        self.passes = len(order)
        given: dict[Tensor, Tensor] = {}
        found: dict[str, Collected] = {}
        for number, names in enumerate(order):
            group = [by_name[name] for name in names]
            for each in self.once(group + unseen if number == 0 else group, given):
                found[each.layer.name] = each
                if each.layer.name in known and each.reached:
                    given.update(buffers_of(each))
        late = [layer for layer in unseen if found[layer.name].reached]
        if late:
            self.passes += 1
            found.update({each.layer.name: each for each in self.once(late, given)})
        return [found[layer.name] for layer in layers]

    def summary(self, done: int, of: int) -> str:
        """What was done, in words."""
        batches = "1 batch" if self.used == 1 else f"{self.used} batches"
        passes = f" in each of {self.passes} passes" if self.passes > 1 else ""
        return f"{done} of {of} batch norms have the statistics of {batches}{passes}{self.reached}"

    def _order(self, layers: list[Layer]) -> list[list[str]]:
        mine: list[list[str]] | None = None
        error: Exception | None = None
        try:
            with undisturbed(self.model), _eagerly():
                for example in islice(iter(self.batches), 1):
                    mine = groups(self.inner, example, self.forward_fn, layers)
        except Exception as caught:
            if self.alone:
                raise
            error = caught
        if not self.alone:
            pool_over_ranks(Population([]), error, self.group)
            mine = first_known(mine, self.group)
        if mine is None:
            raise InputError("expected at least one batch, got none")
        return mine or [[]]

    def _pass(self, population: Population, given: dict[Tensor, Tensor]) -> None:
        convergence = None if self.until is None else Convergence(self.until)
        total = self._total()
        with undisturbed(self.model, training=False), _eagerly(), population.watching():
            for buffer, value in given.items():
                buffer.copy_(value)
            device = device_of(self.inner)
            for batch in islice(iter(self.batches), self.num_batches):
                call(self.inner, on_device(batch, device), self.forward_fn)
                population.batches += 1
                self.done += 1
                if self.progress is not None:
                    self.progress(self.done, total)
                if convergence is not None and convergence.reached(population):
                    break
            population.pool()
        if convergence is not None:
            self.reached = f", {convergence.told}"
            self.unsettled = self.unsettled or ("" if convergence.settled else f"not converged: {convergence.told}")

    def _total(self) -> int | None:
        if self.until is not None:
            return None
        try:
            size = len(self.batches) if isinstance(self.batches, Sized) else None
        except TypeError:  # a DataLoader of an iterable dataset has a length that is an error
            size = None
        known = [number for number in (size, self.num_batches) if number is not None]
        return None if size is None and self.num_batches is None else min(known) * self.passes


def _eagerly() -> AbstractContextManager[Any]:
    """Nothing compiled runs: its code has no place for hooks. Compiling it anew would cost more than it brings."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; to ask would import it
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _told(each: Collected) -> Change:
    if each.total is None or not each.reached:
        return Change(each.layer.name, "left as it was: no batch reached it")
    shift, ratio = movement(each, each.first.flatten(), each.second.flatten())
    calls = "1 call" if each.calls == 1 else f"{each.calls} calls"
    moved = f"means moved by up to {shift:.2g} deviations, deviations by a factor of up to {math.exp(ratio):.3g}"
    if not math.isfinite(shift + ratio):
        moved = "they were not finite before"
    return Change(each.layer.name, f"statistics of {float(each.total.number):.0f} values a channel ({calls}): {moved}")
