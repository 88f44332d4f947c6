"""Rules about what a model has learned as a whole: statistics that are missing, broken or another model's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.nn.recognition import RECALIBRATED, Layer, frozen_parts, is_frozen
from batchnorm.probes.health.layer_state import (
    counted,
    held,
    initial,
    listed,
    statistics,
    values,
)
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.subject import Subject


@rule("BN201", "never-updated", "warning")
def never_updated(subject: Subject) -> Iterator[Sign]:
    """The running statistics are those of a new layer: mean 0, variance 1, no batch counted.

    - In eval mode, while others of the model were updated, or while the layers have learned (betas that differ between
      channels, and not as draws of an initialisation would): a warning for each. A branch never ran, a checkpoint was
      loaded without its buffers (``strict=False``), or weights were averaged without them. Eval normalizes nothing.
    - In train mode, while others were updated: an info for each. It is a branch that never ran, or a new one.
    - In eval mode, of all layers of a model that has not learned either: one info for the model.
    - In train mode, of all layers: nothing, as training begins so.

    Statistics that are not 0 and 1 are never reported, whatever the counter says: states that were ported from Caffe,
    TensorFlow or Keras have none. Layers that are constant by their class are not reported: a folded layer has 0 and 1.

    Remedy: load the whole state; else ``bn.recalibrate(model, batches)``.

    False alarms: a model in eval mode whose layers are there as channelwise gamma and beta only.
    """
    layers = [layer for layer in subject.trained if statistics(layer.module) is not None or initial(layer.module)]
    fresh = [layer for layer in layers if initial(layer.module)]
    updated, learned = len(layers) - len(fresh), _have_learned(layers)
    remedy = "load the state with its buffers (strict=True says what is missing), or bn.recalibrate(model, batches)"
    numbers = {"never_updated": len(fresh), "updated": updated}
    asleep = [layer for layer in fresh if not layer.module.training]
    if asleep and not updated and not learned:
        yield Sign(
            "",
            f"no batch has been seen by {len(asleep)} of {len(layers)} batch norms in eval mode: they normalize "
            "with the mean 0 and the variance 1 that they start with",
            "train, load a state, or bn.recalibrate(model, batches)",
            numbers,
            severity="info",
        )
        return
    for layer in fresh:
        training = layer.module.training
        if training and not updated:
            continue
        reason = f"while {updated} of {len(layers)} in the model were updated" if updated else "but beta was learned"
        yield Sign(
            layer.name,
            f"the running statistics were never updated, {reason}"
            + ("" if training else ": eval normalizes with mean 0 and variance 1"),
            remedy,
            numbers,
            severity="info" if training else "warning",
        )


def _have_learned(layers: list[Layer]) -> bool:
    """Whether betas differ between channels, other than draws from one distribution around 0 do.

    Some models start with random betas (RepVGG). What was learned differs from layer to layer in mean and deviation;
    draws do by less than 4 standard errors, s / sqrt(C) and s / sqrt(2 C). Fewer than three layers do not tell.
    """
    betas = [beta for layer in layers if (beta := values(layer.module, "bias")) is not None and beta.numel() > 1]
    if all((beta == beta.flatten()[0]).all() for beta in betas):
        return False
    everything = torch.cat([beta.flatten() for beta in betas])
    s = everything.std()
    drawn = all(
        abs(beta.mean()) < 4 * s / beta.numel() ** 0.5 and abs(beta.std() - s) < 4 * s / (2 * beta.numel()) ** 0.5
        for beta in betas
    )
    return len(betas) < 3 or not drawn


@rule("BN204", "not-finite", "error")
def not_finite(subject: Subject) -> Iterator[Sign]:
    """NaN or infinity in the running statistics, gamma or beta.

    A single batch with one puts it into the running statistics for good: a NaN stays in the average whatever comes
    after. In training, where batches are normalized by themselves, nothing shows; in eval the channel is lost, and with
    it the output. float16 statistics become infinite above 65504.

    Remedy: find the batch; then ``bn.recalibrate(model, batches)`` for statistics. gamma and beta need an earlier
    checkpoint.

    False alarms: none known.
    """
    for layer in subject.layers:
        tensors = {key: held(layer.module, key) for key in (*layer.module._parameters, *layer.module._buffers)}
        for key, tensor in tensors.items():
            if tensor is None or not tensor.dtype.is_floating_point or tensor.isfinite().all():
                continue
            nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            where = torch.nonzero((~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite())
            what = " and ".join(text for n, text in ((nans, f"{nans} NaN"), (infinities, f"{infinities} inf")) if n)
            learned = key in layer.module._parameters
            yield Sign(
                layer.name,
                f"{key} has {what} among {tensor.numel()} values"
                + (f" ({listed(where.flatten().tolist())})" if tensor.dim() else ""),
                "load an earlier checkpoint"
                if learned
                else "look for the batch that brought it, then bn.recalibrate(model, batches)",
                {"tensor": key, "nan": nans, "inf": infinities},
            )


@rule("BN206", "foreign-statistics", "warning")
def foreign_statistics(subject: Subject) -> Iterator[Sign]:
    """Averaged weights with running statistics that are not theirs.

    The statistics of averaged weights are none of the statistics that any of the models had (Izmailov et al. 2018,
    section 3.2; ignite #2590, timm #102). Found, as far as the model alone tells:

    - ``torch.optim.swa_utils.AveragedModel`` that has averaged: by default its buffers are copies of those of the model
      that came last. Not where they were computed anew: ``bn.recalibrate`` has been over it since, or the layers have
      counted fewer batches than weights were averaged. With ``use_buffers=True`` and equal weights they are averages
      over all models (info, as the counter is averaged too and tells nothing); moving averages (``avg_fn``) of buffers
      follow the weights closely enough.
    - two parts of the same structure (a model and its moving average) whose statistics agree bit for bit in every
      layer, two or more, while gamma or beta differ: one has the other's.
    - ``num_batches_tracked`` that is no whole number: the buffers were averaged with the weights.

    Remedy: ``bn.recalibrate(averaged, batches)``. A state of averaged weights without any buffers is BN201.

    False alarms: an AveragedModel whose statistics were computed over at least as many batches as weights were
    averaged, by ``update_bn`` or before it was saved: nothing in it says so. Two copies of one model that were trained
    on with frozen statistics.
    """
    remedy = "bn.recalibrate(model, batches)"
    for name, module in subject.root.named_modules():
        if isinstance(module, AveragedModel):
            models = held(module, "n_averaged")
            averaged = 0 if models is None else int(models)
            below = name + "." if name else ""
            inside = [layer for layer in subject.trained if layer.name.startswith(below)]
            foreign = [layer for layer in inside if statistics(layer.module) is not None and not initial(layer.module)]
            # Of batchnorm.surgery.averaged_model, which averages statistics and copies counters.
            mixed = module.use_buffers or getattr(module, "buffer_policy", "copy") == "average"
            moving = mixed and not (module.avg_fn is None and module.multi_avg_fn is None)
            anew = not module.use_buffers and any(counted(layer.module) < averaged for layer in foreign)
            anew = anew or module.__dict__.get(RECALIBRATED) == averaged
            if not averaged or moving or not foreign or anew:
                continue
            whose = "averages over the models" if mixed else "those of the model that came last"
            yield Sign(
                name,
                f"averaged weights ({averaged} models), but the running statistics of {len(foreign)} batch norms are "
                f"{whose}, unless they were computed anew since",
                remedy,
                {"averaged": averaged, "layers": len(foreign)},
                severity="info" if mixed else "warning",
            )
    for first, second, number in _copies([layer for layer in subject.trained if not frozen_parts(layer.module)]):
        yield Sign(
            second,
            f"all {number} batch norms have the running statistics of those in {first or 'the model'}, bit for bit, "
            "but other gammas and betas",
            remedy,
            {"layers": number, "same_as": first},
        )
    for layer in subject.layers:
        batches = counted(layer.module)
        if not math.isfinite(batches) or batches != int(batches) or batches < 0:
            yield Sign(
                layer.name,
                f"num_batches_tracked is {batches:g}: the buffers were averaged with the weights",
                f"{remedy}, which counts anew",
                {"num_batches_tracked": batches},
            )


def _copies(layers: list[Layer]) -> Iterator[tuple[str, str, int]]:
    """Pairs of paths below which all layers agree in their statistics but not in gamma and beta, and their number."""
    same: dict[bytes, list[Layer]] = defaultdict(list)
    for layer in layers:
        known = statistics(layer.module)
        if known is not None and not initial(layer.module) and not is_frozen(layer.module):
            same[torch.cat(known).numpy().tobytes()].append(layer)
    pairs: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for group in same.values():
        for index, one in enumerate(group):
            for other in group[index + 1 :]:
                heads = _heads(one.name, other.name)
                if heads is not None:
                    pairs[heads].append(_affine(one.module) != _affine(other.module))
    for (first, second), differ in pairs.items():
        counts = [sum(layer.name.startswith(head + ".") for layer in layers) for head in (first, second)]
        if len(differ) >= 2 and counts == [len(differ)] * 2 and any(differ):
            yield first, second, len(differ)


def _heads(one: str, other: str) -> tuple[str, str] | None:
    """The paths without the end that they share; None where they share none, or one is all of it."""
    a, b = one.split("."), other.split(".")
    shared = 0
    while shared < min(len(a), len(b)) and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    if shared in (0, len(a), len(b)):
        return None
    return ".".join(a[: len(a) - shared]), ".".join(b[: len(b) - shared])


def _affine(module: nn.Module) -> list[bytes]:
    tensors = [held(module, key) for key in ("weight", "bias")]
    return [b"" if tensor is None else tensor.cpu().double().numpy().tobytes() for tensor in tensors]
