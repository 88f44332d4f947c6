"""Look at the layers of a model now and then while it trains, and change nothing."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from batchnorm.probes.watching.handle import Every, Record, Watch
from batchnorm.probes.watching.layers import Layers
from batchnorm.probes.watching.out import load_records

__all__ = ["Record", "Watch", "load_records", "watch"]


def watch(
    model: nn.Module,
    every: Every = 20,
    layers: Layers = None,
    *,
    units: int | None = 32,
    max_records: int = 128,
    modes: tuple[str, ...] = ("train",),
    on_look: Callable[[Watch], object] | None = None,
    manual: bool = False,
) -> Watch:
    """Look at layers of ``model`` at some of its training passes.

    >>> with bn.watch(model, every=20) as watch:                 # doctest: +SKIP
    ...     train(model)
    >>> watch.records                                            # doctest: +SKIP

    The hooks are on at once; the end of the block, or :meth:`Watch.remove`, takes them off. Outputs, gradients, running
    statistics and random numbers are the same as without, bit for bit; except that what ``torch.compile`` compiled runs
    in eager at the passes that are looked at, which rounds differently (and draws other random numbers for dropout).

    A pass is a call of ``model`` itself; step n is the n-th in training mode, from 0, whatever the optimizer does: with
    accumulated gradients, set ``watch.step``. Of a layer that is called several times in a pass the first call is
    recorded. What ``torch.utils.checkpoint`` computes again is not recorded again; with ``use_reentrant=True`` such
    layers have no gradients in their records.

    Args:
        model: any module; one in ``torch.compile``, DistributedDataParallel or DataParallel is watched from outside.
        every: look at each pass whose step it divides, or where a function of the step says so.
        layers: None for all batch norms (torch's, ours, frozen ones); or names, glob patterns, types, modules,
            predicates ``(name, module) -> bool``, or a list of such.
        units: how many channels of a layer are looked at, spread evenly; None for all.
        max_records: looks that are kept; with more, every second goes, again and again. One takes about 10 KB a layer.
        modes: which passes: "train", "eval" or both. The first is what ``step`` counts. Passes of the other are counted
            by themselves, and recorded under the step of their time.
        on_look: called with the watch when a look is complete: after its backward pass, or, where that does not
            reach every layer, before the next look.
        manual: have :meth:`Watch.begin_step` and :meth:`Watch.end_step` called by the training loop, where a pass is
            not a call of ``model`` (several models, Lightning).

    Raises:
        InputError: an argument makes no sense; ``layers`` fits nothing; there is no batch norm and ``layers`` is None;
            the model was compiled in place, or scripted.
    """
    return Watch(model, every, layers, units, max_records, modes, on_look, manual)
