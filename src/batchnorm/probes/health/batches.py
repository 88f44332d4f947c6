"""BN303 to BN305: batches that batch norm cannot learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist, median
from typing import TYPE_CHECKING

from torch import distributed, nn

from batchnorm.nn import SyncBatchNorm
from batchnorm.nn.ghost import _GhostBatchNormLayer
from batchnorm.nn.renorm import _BatchRenormLayer
from batchnorm.probes.health.measured import Grouped
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.seen import Padding

if TYPE_CHECKING:
    from batchnorm.probes.health.observed import Observed
    from batchnorm.probes.health.subject import Subject
    from batchnorm.probes.health.survey import Survey

FEW = 16
"""Samples (or real values per channel) below which a batch is small."""
ALIKE = 0.1
"""Share of the variance between samples that lies between batches, from which on batches are unlike one another."""
LEVEL = 1e-4
"""Of the test that goes with it."""
PADDED = 0.05
"""Share of padded positions that matters."""


@rule("BN303", "small-batch", "warning", needs="batches")
def small_batch(subject: Subject) -> Iterator[Sign]:
    """Statistics are taken from too few samples.

    Finds layers in train mode that see less than 16 samples of a process, or less than 16 real values per channel (a
    mask leaves fewer), in the median batch. Synchronised layers count the samples of all processes, if there are any;
    ghost batches are what they are cut into; batch renormalization is made for this and left out. One finding names the
    layer with the fewest values, and the relative error of its variance: sqrt(2 / (n - 1)) for n normal values, or what
    the samples show, where that is more (positions of one image are alike).

    Each batch is normalized with its own noise, and eval mode with none: at 2 images a process a ResNet-50 on ImageNet
    is 10.6 points behind the same network with group norm, at 32 level with it (Wu & He 2018, "Group Normalization").
    A batch with one value per channel is an error in training.

    Remedy: larger batches; ``bn.convert(model, to="sync")`` over processes; ``bn.convert(model, to="renorm")`` or
    ``to="group"``, trained anew.

    False alarms: the batches that were given are smaller than those of training, or the model is no longer trained.
    """
    survey = subject.survey
    judged = [seen for seen in survey.layers if seen.learns and not isinstance(seen.module, _BatchRenormLayer)]
    small: list[tuple[float, float, Observed]] = []
    for seen in judged:
        samples, values = _effective(seen, [size for size in survey.sizes if size])
        if min(samples, values) < FEW:
            small.append((values, samples, seen))
    if small:
        values, samples, seen = min(small, key=lambda case: case[:2])
        error = _relative_error(seen, values)
        what = f"{samples:.0f} sample{'s' if samples != 1 else ''} a batch"
        more = f" ({values:.0f} values per channel)" if values != samples else ""
        # Of one value there is no variance.
        off = f": the variance is off by {error:.0%}" if math.isfinite(error) else ""
        yield Sign(
            seen.name,
            f"{len(small)} of {len(judged)} batch norms learn from less than {FEW} samples at once; "
            f"{seen.name} has {what}{more}{off}",
            'use larger batches; bn.convert(model, to="sync") over processes; or to="renorm" or "group" and train anew',
            {"samples": samples, "values": values, "relative_error": error, "layers": len(small)},
        )
    single = [seen for seen in judged if 1 in seen.evaluated.counts and seen.name not in {s.name for *_, s in small}]
    if single:
        at = single[0].evaluated.counts.index(1)
        yield Sign(
            single[0].name,
            f"batch {at} has one value per channel, which has no variance: training on it raises an error",
            "leave a ragged last batch out (DataLoader(..., drop_last=True)), or bn.nn layers with on_single_value=",
            {"batch": at},
        )


def _effective(seen: Observed, sizes: list[int]) -> tuple[float, float]:
    """Samples and values per channel of the median batch, as far as one set of statistics is shared."""
    values = float(median(seen.evaluated.counts))
    samples = float(median(sizes)) if sizes else values
    module = seen.module
    if isinstance(module, _GhostBatchNormLayer) and samples > module.virtual_batch_size:
        values, samples = values * module.virtual_batch_size / samples, float(module.virtual_batch_size)
    if isinstance(module, nn.SyncBatchNorm | SyncBatchNorm):
        # Without processes nobody knows how many there will be.
        peers = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else FEW
        values, samples = values * peers, samples * peers
    return samples, values


def _relative_error(seen: Observed, values: float) -> float:
    """The standard error of a batch's variance, relative to it."""
    normal = math.sqrt(2 / (values - 1)) if values > 1 else math.inf
    squares = seen.evaluated.squares
    assert squares is not None
    if squares.freedom < 8:
        return normal
    relative = squares.var_of_batch_mean().sqrt() / seen.evaluated.var()
    relative = relative[relative.isfinite()]
    return max(normal, float(relative.median())) if len(relative) else normal


@rule("BN304", "non-iid-batches", "warning", needs="batches")
def non_iid_batches(subject: Subject) -> Iterator[Sign]:
    """Batches are unlike one another: sorted by class, by domain or in time.

    Compares, for the input of each layer in eval mode, the variance of samples between batches with that within
    (analysis of variance; a sample counts once, with the mean over its positions). A finding is a layer where batches
    explain 10% or more of the variance between samples, averaged over channels, and F is beyond its quantile at 1e-4,
    taken as if all channels were one. It takes three batches.

    In training each batch is then normalized by statistics that are not the population's: what tells the batches apart
    is taken away, and is back in eval mode. On digits, batches of one class each break batch norm altogether.

    Remedy: shuffle (``DataLoader(..., shuffle=True)``); where that cannot be, ``bn.convert(model, to="group")``. Each
    call of a layer counts as a batch: where a pass has several, as of a discriminator that is given real and generated
    images in turn, one call for all of them, or a layer for each.

    False alarms: batches that were put in order only for this; a stream in time that is trained in its order knowingly.
    """
    found = unlike(subject.survey)
    if found:
        share, ratio, seen = max(found, key=lambda case: case[0])
        layers = sum(seen.learns for seen in subject.survey.layers)
        remedy = 'shuffle the data (DataLoader(..., shuffle=True)); where that cannot be, bn.convert(model, to="group")'
        calls = len(seen.evaluated.counts) / len(subject.survey.sizes)
        if calls > 1:
            # What tells them apart may be the place of the call: real and generated images, two domains, time steps.
            remedy = f"it is called {calls:.3g} times a batch: one call, or a layer for each (BN004); else {remedy}"
        yield Sign(
            seen.name,
            f"batches are unlike one another at {len(found)} of {layers} batch norms; at {seen.name} they explain "
            f"{share:.0%} of the variance between samples, and their means vary {ratio:.3g} times as much as chance "
            "would have it",
            remedy,
            {"share": share, "variance_ratio": ratio, "layers": len(found), "batches": len(subject.survey.sizes)},
        )


def unlike(survey: Survey) -> list[tuple[float, float, Observed]]:
    """Layers at whose inputs batches are unlike one another: the share of the variance between batches, and F."""
    found = []
    for seen in survey.layers:
        means = seen.evaluated.means
        if not seen.learns or means is None or len(means.sizes) < 3 or means.freedom < 8:
            continue
        ratio = means.ratio()
        share = _between(means, ratio)
        if share >= ALIKE and ratio > _critical(len(means.sizes) - 1, means.freedom):
            found.append((share, ratio, seen))
    return found


def _between(means: Grouped, ratio: float) -> float:
    """The intraclass correlation: the share of the variance that lies between batches."""
    return (ratio - 1) / (ratio - 1 + means.batch_size) if ratio > 1 else 0.0


def _critical(between: int, within: int) -> float:
    """F's quantile, by Wilson and Hilferty's cube root of each chi-square."""
    z = NormalDist().inv_cdf(1 - LEVEL)
    top = (1 - 2 / (9 * between) + z * math.sqrt(2 / (9 * between))) ** 3
    return top * (1 + z * math.sqrt(2 / within))


@rule("BN305", "padding-in-statistics", "warning", needs="batches")
def padding_in_statistics(subject: Subject) -> Iterator[Sign]:
    """Padded positions take part in mean and variance.

    Two signs. (1) A batch has lengths or a mask of padding (an argument of the model or a key called so), and a layer
    is given all positions without being told which are real. (2) At the input (N, C, L) of a layer sequences end in
    vectors that are exactly equal up to the end; the ends are a twentieth of all positions or more, nine in ten
    are the same vector, at least a quarter of the sequences has one and their lengths differ; and sequences do not
    begin so as well, as an image with a border does.

    Mean and variance then depend on how long the longest sequence of the batch is, and in eval mode on the batches of
    training: the same sequence gives another output in other company.

    Remedy: ``bn.convert(model, to="ours")`` and ``lengths=`` or ``mask=`` in the layer's call.

    False alarms: signals that really end in a constant (digital silence, a sensor that was switched off). Not seen:
    padding in inputs (N, C, H, W) that no mask or length tells of.
    """
    survey = subject.survey
    layers = [seen for seen in survey.layers if seen.learns and not seen.masked]
    ending = [seen for seen in layers if padded(seen.padding)]
    told = {key: share / len(survey.sizes) for key, share in survey.claimed.items()}
    told = {key: share for key, share in told.items() if share >= PADDED}
    positioned = [seen for seen in layers if seen.positioned] if told else []
    if ending:
        seen = ending[0]
        share = seen.padding.padded / seen.padding.positions
        message = f"{share:.0%} of the positions are padding: sequences end in the same vector, at different lengths"
    elif positioned:
        seen = positioned[0]
        key, share = max(told.items(), key=lambda item: item[1])
        message = f"{share:.0%} of the positions are padding by {key!r}, and the layer is not told which"
    else:
        return
    count = max(len(ending), len(positioned))
    if count > 1:
        message += f"; so it is at {count} batch norms"
    yield Sign(
        seen.name,
        message,
        'tell the layer what is real: bn.convert(model, to="ours"), then norm(x, lengths=...) or norm(x, mask=...)',
        {"share": share, "layers": count, **({"told": sorted(told)} if told else {})},
    )


def padded(padding: Padding) -> bool:
    """Whether sequences end in padding."""
    if not padding.positions or padding.padded < PADDED * padding.positions:
        return False
    return (
        padding.ended >= padding.sequences / 4
        and padding.agreeing >= 0.9 * padding.ended
        and padding.shortest <= padding.longest / 2
        and padding.leading <= padding.padded / 4
    )
