"""Rules about single channels: their variance, and their gamma."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.nn.recognition import is_batch_norm
from batchnorm.probes.health.layer_state import counted, held, initial, of_channels, statistics, values
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.subject import Subject

VANISHING = 1e-3
LARGE_GAIN = 1e4
EXPLODING = 1e8
HALF_MAX = float(torch.finfo(torch.float16).max)
DEAD_GAMMA = 1e-6


@rule("BN202", "vanishing-variance", "info")
def vanishing_variance(subject: Subject) -> Iterator[Sign]:
    """Channels whose running variance is negative, or next to nothing beside eps.

    A variance below 0 (error) is none: somebody wrote it, or averaged with negative weights; with eps it may still be
    below 0, and then eval gives NaN. Below a thousandth of eps, eps alone is divided by, and a channel that varies as
    its variance says comes out with a deviation of gamma sqrt(var / eps), at most .03 gamma: a constant. It is dead
    (after a ReLU that never fires, behind pruned filters), which costs capacity and is harmless otherwise: an info, or
    a warning where half of the layer's channels or more are so.

    It is a warning too where an input that does differ would be multiplied by more than 1e4, |gamma| / sqrt(var + eps):
    1e-5 for eps allows 316.

    A variance below eps but not far below is common in trained models with eps=1e-3 and not reported.

    Remedy: ``bn.recalibrate(model, batches)`` where the statistics are wrong rather than the channel; else prune it.

    False alarms: as an info, pruned models.
    """
    for layer in subject.layers:
        known, eps = statistics(layer.module), getattr(layer.module, "eps", None)
        if known is None or initial(layer.module) or not isinstance(eps, int | float):
            continue
        var = known[1]
        negative, tiny = var < 0, (var >= 0) & (var < VANISHING * eps) | (var == 0)
        if negative.any():
            yield Sign(
                layer.name,
                f"running_var is negative in {of_channels(negative)}, down to {float(var[negative].min()):.3g}",
                "bn.recalibrate(model, batches), or load an earlier state",
                {"channels": int(negative.sum()), "least": float(var[negative].min())},
                severity="error",
            )
        if not tiny.any():
            continue
        gamma = values(layer.module, "weight")
        size = torch.ones_like(var) if gamma is None or gamma.shape != var.shape else gamma.abs()
        gain = float((size[tiny] / torch.sqrt(var[tiny] + eps)).max()) if eps > 0 else float("inf")
        count, largest = int(tiny.sum()), float(var[tiny].max())
        share, blown = count / tiny.numel(), gain > LARGE_GAIN
        yield Sign(
            layer.name,
            f"running_var is {f'at most {largest:.3g}' if largest else '0.0'} in {of_channels(tiny)}, beside eps "
            + f"{eps:g}: "
            + (f"what differs there is multiplied by {gain:.3g}" if blown else "constant outputs"),
            "if the statistics are wrong, bn.recalibrate(model, batches); if the channels are dead, prune them",
            {"channels": count, "largest": largest, "eps": float(eps), "gain": gain},
            severity="warning" if blown or share >= 0.5 else "info",
        )


@rule("BN203", "exploding-variance", "warning")
def exploding_variance(subject: Subject) -> Iterator[Sign]:
    """A running variance that float16 has no room for.

    Above 1e8: inputs 6.5 deviations from their mean, of which any large feature map has some, are beyond 65504, the
    largest number of float16, so that they are infinite under autocast; such a deviation, 1e4, is also what a training
    run that diverges looks like. Statistics that are float16 themselves: above 32752, half of what they can hold, past
    which they become infinite.

    float64 layers are not looked at.

    Remedy: normalize the model's inputs; a lower learning rate; float32 statistics; ``bn.recalibrate(model, batches)``
    where one wild batch brought it.

    False alarms: a batch norm that stands first, and normalizes raw data of large numbers in float32 as it should.
    """
    for layer in subject.layers:
        known, buffer = statistics(layer.module), held(layer.module, "running_var")
        if known is None or buffer is None or buffer.dtype == torch.float64:
            continue
        half = buffer.dtype == torch.float16
        limit = HALF_MAX / 2 if half else EXPLODING
        found = (known[1] > limit) & known[1].isfinite()
        if found.any():
            largest = float(known[1][found].max())
            yield Sign(
                layer.name,
                f"running_var is up to {largest:.3g} in {of_channels(found)}: "
                + ("float16 holds 65504 at most" if half else f"deviations of {largest**0.5:.2g}"),
                "keep the layer in float32, then bn.recalibrate(model, batches)"
                if half
                else "normalize the inputs or lower the learning rate; one wild batch: bn.recalibrate(model, batches)",
                {"channels": int(found.sum()), "largest": largest, "limit": limit},
            )


@rule("BN205", "dead-gamma", "info")
def dead_gamma(subject: Subject) -> Iterator[Sign]:
    """Channels whose gamma is next to 0: they come out as beta, whatever comes in.

    Below a millionth of the layer's median |gamma| (of those that are not 0): weight decay and pruning leave such. (Of
    gammas that are normal around 0, as they are while residual branches are young, one in 2000 is below a thousandth of
    the median at any time, and lives; one in two million is below a millionth.) The channel and its filter can be taken
    out, with beta carried on to the next layer. Where gamma is 0 in all of the layer while others of the model have
    learned (warning), the whole branch is switched off: it has no gradient, is not in the optimizer, or never had a
    chance.

    Not reported: a layer all of whose gammas are 0 where nothing has learned yet, which is how residual branches are
    started (Goyal et al. 2017, section 5.1), and layers whose running statistics are those of a new one.

    Remedy: prune the channels; for a whole layer, see that gamma requires a gradient and is in the optimizer.

    False alarms: as an info, models that were made sparse on purpose.
    """
    learned = any(
        (beta := values(layer.module, "bias")) is not None and beta.numel() > 1 and bool((beta != beta[0]).any())
        for layer in subject.layers
        if is_batch_norm(layer.module)
    )
    for layer in subject.layers:
        gamma = values(layer.module, "weight")
        if gamma is None or gamma.dim() != 1 or not gamma.isfinite().all() or initial(layer.module):
            continue
        size = gamma.abs()
        if not size.any():
            if learned and counted(layer.module) and gamma.numel():
                yield Sign(
                    layer.name,
                    f"gamma is 0 in all {size.numel()} channels, though the model has learned: it gives beta alone",
                    "see that gamma requires a gradient and that the optimizer holds it",
                    {"channels": size.numel(), "largest": 0.0, "median": 0.0},
                    severity="warning",
                )
            continue
        median = float(size[size > 0].median())
        dead = size < DEAD_GAMMA * median
        if dead.any():
            largest = float(size[dead].max())
            yield Sign(
                layer.name,
                f"gamma is {f'at most {largest:.3g}' if largest else '0.0'} in {of_channels(dead)}, beside a median of "
                f"{median:.3g}: constant outputs",
                "prune the channels, with beta carried on to the next layer",
                {"channels": int(dead.sum()), "largest": largest, "median": median},
            )
