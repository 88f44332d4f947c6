"""BN301: running statistics that are not those of the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.probes.health.measured import Population, channels, quantile
from batchnorm.probes.health.rule import Sign, rule

if TYPE_CHECKING:
    from batchnorm.probes.health.observed import Observed
    from batchnorm.probes.health.subject import Subject
    from batchnorm.probes.health.survey import Survey

FAR_MEAN = 0.25
"""A channel's running mean is far off from here on, in standard deviations of its values."""
FAR_VAR = 1.5
"""A channel's running variance is far off at this ratio, or its inverse."""
SHARE = 0.1
"""A layer is stale where this share of its channels is far off."""
REMEDY = "estimate the statistics anew, on data like these: bn.recalibrate(model, batches)"


@dataclass(frozen=True)
class Gap:
    """Between running statistics and a population, (C,) each.

    Attributes:
        mean: |running_mean - mean| / sqrt(var + eps).
        log_var: log of (running_var + eps) / (var + eps).
    """

    mean: Tensor
    log_var: Tensor

    @classmethod
    def between(cls, module: nn.Module, population: Population) -> Gap | None:
        """None where the layer has no running mean and variance for each channel."""
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        moments = population.moments
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.shape != moments.mean.shape:
            return None
        eps = float(getattr(module, "eps", 0.0))
        scale = moments.var() + eps
        apart = (mean.double() - moments.mean).abs() / scale.sqrt()
        return cls(apart, ((var.double() + eps) / scale).log())

    def far(self, mean: Tensor | float = 0.0, log_var: Tensor | float = 0.0) -> Tensor:
        """Which channels are beyond the thresholds, and beyond these bounds too; NaN is not."""
        log_var = torch.as_tensor(log_var).clamp(min=math.log(FAR_VAR))
        return (self.mean > torch.as_tensor(mean).clamp(min=FAR_MEAN)) | (self.log_var.abs() > log_var)


def chance(seen: Observed) -> tuple[Tensor, Tensor]:
    """How large a gap chance explains, for the mean and for the log of the variance; infinite where nobody knows."""
    population = seen.evaluated
    means, squares = population.means, population.squares
    assert means is not None
    assert squares is not None
    if means.freedom < 2:
        endless = torch.full_like(means.within, torch.inf)
        return endless, endless
    momentum = getattr(seen.module, "momentum", 0.1)
    tracked = getattr(seen.module, "num_batches_tracked", None)
    if momentum is None:
        remembered = 1.0 / max(int(tracked) if isinstance(tracked, Tensor) else 1, 1)
    else:
        remembered = float(momentum) / (2 - float(momentum)) if 0 <= momentum <= 1 else 1.0
    share = 1 / len(means.sizes) + remembered
    t = quantile(2 * len(means.within), means.freedom)
    scale = population.var() + float(getattr(seen.module, "eps", 0.0))
    return (
        t * (means.var_of_batch_mean() * share / scale).sqrt(),
        t * (squares.var_of_batch_mean() * share).sqrt() / scale,
    )


def stale(seen: Observed) -> tuple[Tensor, Gap] | None:
    """The channels that are far off, and how far; None where the layer keeps no statistics or never will use its own.

    Both with the layers before it in eval mode, which is what it is given when the model is used, and in batch mode,
    which is what it learned from: a layer behind a stale one is not to blame for what it is given.
    """
    gap = Gap.between(seen.module, seen.evaluated)
    if gap is None or not seen.learns:
        return None
    far = gap.far(*chance(seen))
    own = Gap.between(seen.module, seen.trained) if seen.trained.counts else None
    return (far if own is None else far & own.far()), gap


def stale_layers(survey: Survey) -> dict[str, tuple[Tensor, Gap]]:
    """The stale layers by name, in the order of the forward pass."""
    found = {}
    for seen in survey.layers:
        judged = stale(seen)
        if judged is not None and judged[0].double().mean() >= SHARE:
            found[seen.name] = judged
    return found


@rule("BN301", "stale-statistics", "warning", needs="batches")
def stale_statistics(subject: Subject) -> Iterator[Sign]:
    """Running statistics are not those of the data.

    Finds layers where 10% of the channels or more have a running mean that is .25 standard deviations or more from the
    mean of their inputs over all batches, or a running variance that is off by a factor of 1.5 or more; with the layers
    before in eval mode, and in batch mode too, so that a layer is not blamed for a stale one before it. Each gap must
    also be larger than chance explains: a t-test at .001 over all channels of the layer (Bonferroni), whose standard
    error is that of means of samples, not of pixels, widened by the spread between batches, and includes the noise that
    a running average keeps, m / (2 - m) of a batch's. Layers with the statistics that they were made with (0 and 1) are
    one finding together.

    In eval mode such a layer does not normalize: what follows was trained on other inputs. It happens where the
    momentum is too small for the steps that were made, after the weights were averaged or loaded without buffers,
    behind dropout, where training batches were not like the data, and where the data have moved since.

    Remedy: ``bn.recalibrate(model, batches)``, on training data; for moved data ``bn.adapt``.

    False alarms: batches that are not like the data that the model is meant for (another preprocessing, augmentation
    switched off or on, noise); statistics that were kept of other data on purpose and are not marked so
    (``bn.freeze(model)``).
    """
    survey = subject.survey
    found = stale_layers(survey)
    fresh = [seen.name for seen in survey.layers if seen.fresh and seen.name in found]
    if fresh:
        worst = max(fresh, key=lambda name: _worst(found[name][1]))
        numbers = _numbers(*found[worst])
        untouched = sum(seen.fresh for seen in survey.layers)
        yield Sign(
            fresh[0] if untouched == 1 else "",
            f"{untouched} of {len(survey.layers)} batch norms still have mean 0 and variance 1, which no data gave; "
            f"furthest off is {worst}: {_described(numbers)}",
            "train first, or give them the statistics of data: bn.recalibrate(model, batches)",
            {"layers": untouched, "worst": worst, **numbers},
        )
    for name, (far, gap) in found.items():
        if name in fresh:
            continue
        numbers = _numbers(far, gap)
        yield Sign(
            name,
            f"running statistics are not those of the batches in {channels(far)}: {_described(numbers)}",
            REMEDY,
            {"channels": int(far.sum()), "of": len(far), "batches": len(survey.sizes), **numbers},
        )


def _worst(gap: Gap) -> float:
    return float(torch.maximum(gap.mean, gap.log_var.abs()).nan_to_num(0.0).max())


def _numbers(far: Tensor, gap: Gap) -> dict[str, float]:
    # A channel with NaN in one of the two is far off by the other; that NaN is there is BN204's to say.
    apart, log_var = gap.mean[far].nan_to_num(0.0), gap.log_var[far].nan_to_num(0.0)
    return {
        "largest_mean_gap": float(apart.max()),
        "median_var_ratio": float(log_var.median().exp()),
        "largest_var_ratio": float(log_var[log_var.abs().argmax()].exp()),
    }


def _described(numbers: dict[str, float]) -> str:
    return (
        f"means are up to {numbers['largest_mean_gap']:.2g} standard deviations off, variances "
        f"{numbers['median_var_ratio']:.2g} times theirs (median, at worst {numbers['largest_var_ratio']:.2g})"
    )
