"""BN308: data that were never normalized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from batchnorm.probes.health.rule import Sign, rule

if TYPE_CHECKING:
    from batchnorm.probes.health.subject import Subject

LARGE = 10.0
"""Root mean square of a feature from which on it is large: of tabular data, and of whole numbers (image bytes)."""
LARGE_SIGNAL = 100.0
"""Likewise of other signals: decibels of a spectrogram stay below."""
OFF_CENTRE = 10.0
"""|mean| / std from which on half of the features are far from centred."""
TINY = 0.01
"""Standard deviation of the widest feature, below which data are tiny."""
RATIO = 100.0
"""Widest feature over the median one."""


@rule("BN308", "inputs-not-normalized", "warning", needs="batches")
def inputs_not_normalized(subject: Subject) -> Iterator[Sign]:
    """The first layer with weights is given data that are far from mean 0 and standard deviation 1.

    Looks at what the first layer with parameters is given, after anything that the model does to its input, if it is a
    linear, convolutional or recurrent layer (behind a batch norm, another norm or an embedding there is nothing to
    find). Features are columns, or channels of a convolution; constant ones are left out. A finding is one of: (a) a
    feature with a root mean square above 10, or above 100 in a convolution unless all values are whole numbers from 0
    on, as bytes are; (b) a mean of more than 10 standard deviations, in half of the features or more; (c) no feature
    with a standard deviation of .01 or more; (d) in tables, one that is 100 times as wide as the median feature.

    Gradients of the first layer are proportional to its input, and one learning rate cannot fit them all: raw
    ``breast_cancer`` features leave a sigmoid MLP at the majority class at every rate, standardized ones do not.

    Remedy: ``bn.preprocessing.StandardScaler().fit(data).to_module()`` in front of the model.

    False alarms: images in [0, 1], zero to 16 and the like are let pass; models whose weights were made for raw data.
    Not judged: integers that go into an embedding, one-hot and other binary input.
    """
    found = subject.survey.input
    if found.moments is None or found.module is None:
        return
    moments = found.moments
    std = moments.std()
    varying = std.isfinite() & (std > 0)
    if not bool(varying.any()) or (found.whole and found.low >= 0 and found.high <= 1):
        return
    mean, std = moments.mean[varying].abs(), std[varying]
    rms = (mean.square() + std.square()).sqrt()
    bytes_ = found.whole and found.low >= 0
    large = rms > (LARGE if bytes_ or not found.image else LARGE_SIGNAL)
    what = "channels" if found.image else "features"
    reasons = []
    if bool(large.any()):
        reasons.append(
            f"{int(large.sum())} of {len(rms)} {what} are large (root mean square up to {float(rms.max()):.4g})"
        )
    off = mean / std > OFF_CENTRE
    if float(off.double().mean()) >= 0.5:
        reasons.append(f"{int(off.sum())} of {len(off)} {what} have means of more than {OFF_CENTRE:.0f} deviations")
    if float(std.max()) < TINY:
        reasons.append(f"the widest of {len(std)} {what} has a standard deviation of {float(std.max()):.2g}")
    ratio = float(std.max() / std.median())
    if not found.image and ratio > RATIO:
        reasons.append(f"the widest of {len(std)} {what} is {ratio:.3g} times as wide as the median")
    if not reasons:
        return
    name = next((path for path, module in subject.model.named_modules() if module is found.module), "")
    yield Sign(
        subject.prefix + name,
        f"the first layer is given data that are not normalized: {'; '.join(reasons)}",
        "put bn.preprocessing.StandardScaler().fit(data).to_module() in front of the model"
        + (" (StandardScaler(channel_axis=1) for images)" if found.image else ""),
        {
            "largest_rms": float(rms.max()),
            "largest_std": float(std.max()),
            "median_std": float(std.median()),
            "smallest_std": float(std.min()),
            "largest_mean_over_std": float(torch.max(mean / std)),
        },
    )
