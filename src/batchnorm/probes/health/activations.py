"""BN306, BN307, BN309: units that carry nothing, channels that dwarf the others, and numbers that are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm._errors import InputError
from batchnorm.nn.recognition import is_batch_norm, is_frozen
from batchnorm.probes.health.layer_state import held
from batchnorm.probes.health.measured import channels
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.wiring import Wiring, function_name

if TYPE_CHECKING:
    from batchnorm.probes.health.observed import Observed
    from batchnorm.probes.health.subject import Subject

COLLAPSED = 0.01
"""A channel is collapsed where its variance is below this part of eps: its deviation leaves as a tenth or less of 1."""
SHARE = 0.25
"""Share of a layer's units from which on it is a finding."""
SATURATED = 0.95
"""Share of its values beyond the bend that saturates a unit."""
SAMPLES = 64
"""Fewer say nothing about a unit that is seldom active."""
ABOVE = 100.0
"""How many times the layer's median an outlier is."""
LARGEST_HALF = 65504.0
DOMINATED = 0.5
"""Share of a channel's variance that a single value has."""

_KINDS: dict[str, str] = {
    "relu": "relu",
    "relu_": "relu",
    "relu6": "relu",
    "hardtanh": "tanh",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "hardsigmoid": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}
_BENDS = {"sigmoid": 4.0, "tanh": 2.0}


@rule("BN306", "collapsed-or-saturated", "warning", needs="batches")
def collapsed_or_saturated(subject: Subject) -> Iterator[Sign]:
    """Many units of a layer carry nothing: constant inputs, dead or saturated outputs.

    Finds layers where a quarter of the channels or more (a) have inputs whose variance over all batches is below a
    hundredth of eps, so that normalization leaves a tenth of a standard deviation or less; (b) never are positive
    before the ReLU that follows, on 64 samples or more; (c) are beyond 4 before a sigmoid or 2 before a tanh, where
    the slope is below .018 and .071, in 95% of their values. All in eval mode.

    Such units learn nothing and cost as much as others. A healthy network with batch norm has few, because gamma and
    beta hold each unit around its bend: none in the trained ones of the tests.

    Remedy: where running statistics are stale, ``bn.recalibrate(model, batches)`` first; else a smaller learning rate
    or weight decay on gamma, or prune the units.

    False alarms: data that exercise a part of the model only; layers that were pruned on purpose. Not judged: layers
    that still have the statistics that they were made with.
    """
    survey = subject.survey
    try:
        wiring = subject.wiring if survey.layers else None
    except InputError:  # a part is a ScriptModule
        wiring = None
    enough = sum(survey.sizes) >= SAMPLES
    for seen in survey.layers:
        for what, bad, why in _idle(seen, wiring, enough):
            share = float(bad.double().mean())
            if share >= SHARE:
                yield Sign(
                    seen.name,
                    f"{channels(bad)} {why}",
                    "where statistics are stale, bn.recalibrate(model, batches); else train with a smaller learning "
                    "rate, or prune these units",
                    {"kind": what, "channels": int(bad.sum()), "of": len(bad), "share": share},
                )


def _idle(seen: Observed, wiring: Wiring | None, enough: bool) -> Iterator[tuple[str, Tensor, str]]:
    eps = float(getattr(seen.module, "eps", 0.0))
    if seen.fresh:
        return  # what such statistics make of the inputs says nothing about the units
    if sum(seen.evaluated.counts) > 1:
        var = seen.evaluated.var()
        yield "collapsed", var <= COLLAPSED * eps, "have constant inputs (variance under a hundredth of eps)"
    kind = _activation_after(seen.module, wiring)
    units = seen.units
    if not enough or not units.count:
        return
    if kind == "relu":
        yield "dead", units.high <= 0, "are never positive before the ReLU"
    elif kind in _BENDS:
        bad = units.beyond_bend(_BENDS[kind]) >= SATURATED
        yield "saturated", bad, f"are saturated before the {kind}"


def _activation_after(module: nn.Module, wiring: Wiring | None) -> str | None:
    """What kind of activation alone reads the output of a layer; its own counts too."""
    own = getattr(module, "activation", None) or getattr(module, "act", None)
    if own is not None and not isinstance(own, nn.Identity):
        # Of a fused one only the output is seen: enough for ReLU, which is zero where it is dead.
        return "relu" if _kind(own) == "relu" else None
    kinds: set[str | None] = set()
    for step in wiring.of(module) if wiring is not None else ():
        user = wiring.sole_user(step) if wiring is not None else None
        kinds.add(None if user is None else _kind(user.module if user.module is not None else user.function))
    return kinds.pop() if len(kinds) == 1 else None


def _kind(activation: Any) -> str | None:
    if isinstance(activation, nn.Module):
        name = type(activation).__name__
    else:
        name = activation if isinstance(activation, str) else function_name(activation)
    return _KINDS.get(name.lower())


@rule("BN307", "outlier-channels", "info", needs="batches")
def outlier_channels(subject: Subject) -> Iterator[Sign]:
    """Channels or single values that dwarf the rest of their layer.

    Finds, in eval mode, (a) inputs of a layer beyond 65504, the largest number of float16: a warning; (b) channels
    whose outputs reach 100 times further than those of the median channel; (c) layers in which single values make half
    of the variance, or more, in a quarter of the channels, of 64 values or more each.

    Quantization with one scale for a tensor spends its levels on the outliers and rounds the other channels away;
    half precision overflows; and a running variance that one value made is not that of the data.

    Remedy: (a) bfloat16, or keep the layer in float32; (b) quantize per channel, or fold (``bn.fold``) before; (c) look
    for broken samples in the data.

    False alarms: units that are seldom active have variances of few values by nature; that is why a quarter of the
    channels must.
    """
    survey = subject.survey
    for seen in survey.layers:
        if seen.evaluated.counts and not seen.fresh:
            yield from _outliers(seen)


def _outliers(seen: Observed) -> Iterator[Sign]:
    population, units = seen.evaluated, seen.units
    reach = torch.maximum(population.low.abs(), population.high.abs())
    over = reach.isfinite() & (reach > LARGEST_HALF)
    if bool(over.any()):
        largest = float(reach[over].max())
        yield Sign(
            seen.name,
            f"inputs of {channels(over)} reach {largest:.3g}, beyond float16",
            "use bfloat16, or keep this layer and what feeds it in float32",
            {"largest": largest, "channels": int(over.sum()), "of": len(over)},
            "warning",
        )
    moments = population.moments
    furthest = torch.maximum(population.high - moments.mean, moments.mean - population.low)
    share = furthest.square() / moments.m2
    alone = (share >= DOMINATED) & (moments.count >= SAMPLES)
    if float(alone.double().mean()) < SHARE:
        alone = torch.zeros_like(alone)
    else:
        worst = float(share[alone].max())
        yield Sign(
            seen.name,
            f"single values make up to {worst:.0%} of the variance in {channels(alone)}",
            "look for broken samples in the data",
            {"share": worst, "channels": int(alone.sum()), "of": len(alone)},
        )
    reach = torch.maximum(units.low.abs(), units.high.abs())
    alive = reach[reach.isfinite() & (reach > 0)]
    if units.count and len(alive) >= 8:
        middle = float(alive.median())
        above = reach.isfinite() & (reach > ABOVE * middle) & ~alone
        if bool(above.any()):
            ratio = float(reach[above].max()) / middle
            yield Sign(
                seen.name,
                f"outputs of {channels(above)} reach up to {ratio:.3g} times as far as the median channel's",
                "quantize per channel; bn.fold(model, example) before",
                {"ratio": ratio, "channels": int(above.sum()), "of": len(above)},
            )


@rule("BN309", "not-finite-activations", "error", needs="batches")
def not_finite_activations(subject: Subject) -> Iterator[Sign]:
    """NaN or infinity in the data, or in what a layer makes of them.

    Finds the first batch on which, in eval mode, the input of a batch norm has NaN or infinity or the outputs have NaN,
    and in it the first module whose inputs are finite and whose output is not.

    In training one such value makes the running statistics of its channel NaN for good, and every output in eval mode.

    Remedy: clean the data; float32 or bfloat16 where float16 overflowed; a larger eps where a variance is nearly 0;
    then ``bn.recalibrate(model, batches)``.

    False alarms: none are known: missing values that the model itself replaces before its first batch norm are not
    judged, nor is infinity in outputs (masked scores).
    """
    found = subject.survey.not_finite
    if found is None:
        return
    numbers = {"batch": found.batch, "values": found.values, "of": found.of}
    if found.data:
        message = f"{found.data} of {found.of} values of batch {found.batch} are NaN or infinite"
        yield Sign("", message, "clean the data, or replace what is missing before the model", numbers)
        return
    if not found.layer:
        yield Sign(
            "",
            f"NaN or infinity appears on batch {found.batch}, between modules",
            "look at the functions that the forward calls between its modules",
            {"batch": found.batch},
        )
        return
    module = subject.model.get_submodule(found.layer.removeprefix(subject.prefix))
    known = [held(module, key) for key in ("running_mean", "running_var")]
    sick = (is_batch_norm(module) or is_frozen(module)) and not all(
        bool(tensor.isfinite().all()) for tensor in known if tensor is not None
    )
    negative = (is_batch_norm(module) or is_frozen(module)) and known[1] is not None and bool((known[1] < 0).any())
    remedy = (
        f"its running statistics are {'not finite' if sick else 'no variances (BN202)'}: bn.recalibrate(model, batches)"
        if sick or negative
        else "look at its parameters and the size of its inputs: float16 overflows at 65504, bfloat16 does not"
    )
    yield Sign(
        found.layer,
        f"of finite inputs this {found.kind} makes {found.values} of {found.of} outputs NaN or infinite, as the first "
        f"on batch {found.batch}",
        remedy,
        numbers,
    )
