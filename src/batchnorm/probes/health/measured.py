"""What a survey keeps of a layer: per-channel statistics and samples of a bounded size, whatever went through it."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from batchnorm.moments import Moments

CHUNK = 2**22
"""Values that are deviated from their mean in float64 at a time."""
SAMPLED = 2**14
"""Values of an output that are kept of a batch, to compare two passes."""


class Grouped:
    """Values of samples, (N, C) a batch, and how their spread divides into that within and that between batches."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.total = Moments.empty(channels, device)
        self.within = torch.zeros(channels, dtype=torch.float64, device=device)
        self.sizes: list[int] = []

    def add(self, values: Tensor) -> None:
        """Count the samples of one batch."""
        if values.size(0) == 0:
            return
        moments = Moments.from_batch(values)
        self.total = self.total.merge(moments)
        self.within += moments.m2
        self.sizes.append(values.size(0))

    @property
    def freedom(self) -> int:
        """Degrees of freedom within batches: n - K."""
        return sum(self.sizes) - len(self.sizes)

    @property
    def batch_size(self) -> float:
        """Samples per batch, as unequal ones count in an analysis of variance: (n - sum n_k^2 / n) / (K - 1)."""
        n, groups = sum(self.sizes), len(self.sizes)
        return (n - sum(size**2 for size in self.sizes) / n) / (groups - 1) if groups > 1 else float(n)

    def var_within(self) -> Tensor:
        """The variance of samples within batches, (C,); NaN without degrees of freedom."""
        return self.within / self.freedom if self.freedom > 0 else torch.full_like(self.within, torch.nan)

    def ratios(self) -> Tensor:
        """F of each channel: the spread of batch means over what the samples within batches explain; 1 if iid."""
        between = (self.total.m2 - self.within).clamp(min=0) / max(len(self.sizes) - 1, 1)
        return between / self.var_within()

    def ratio(self) -> float:
        """F pooled over the channels that vary; 1 where it cannot be known."""
        if len(self.sizes) < 2 or self.freedom < 1:
            return 1.0
        ratios = self.ratios()
        ratios = ratios[ratios.isfinite()]
        return float(ratios.mean()) if len(ratios) else 1.0

    def var_of_batch_mean(self) -> Tensor:
        """The variance of the mean of one batch, (C,), allowing for samples of a batch that are alike."""
        size = sum(self.sizes) / max(len(self.sizes), 1)
        return self.var_within() * max(self.ratio(), 1.0) / max(size, 1.0)


class Population:
    """The inputs of a layer over all batches: moments of the values, and of the samples that they come in."""

    def __init__(self, channels: int, device: torch.device, *, samples: bool) -> None:
        self.moments = Moments.empty(channels, device)
        self.counts: list[int] = []
        self.means = Grouped(channels, device) if samples else None
        self.squares = Grouped(channels, device) if samples else None
        self.low = torch.full((channels,), torch.inf, dtype=torch.float64, device=device)
        self.high = -self.low

    def add(self, x: Tensor, real: Tensor | None, samples: int | None) -> None:
        """Count a batch (N, C, *) with the mask ``real``; its rows belong to ``samples`` samples, in their order."""
        moments = Moments.from_batch(x, mask=real)
        self.moments = self.moments.merge(moments)
        self.counts.append(int(moments.count[0]) if len(moments.count) else 0)
        if self.means is None or self.squares is None or x.numel() == 0:
            return
        low, high = extremes(x, real)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        sums, squares, counts = _by_row(x, real, moments.mean)
        if samples and x.size(0) % samples == 0:
            sums, squares = (part.view(samples, -1, part.size(1)).sum(1) for part in (sums, squares))
            counts = counts.view(samples, -1).sum(1)
        kept = counts > 0
        each = counts[kept].unsqueeze(1)
        self.means.add(sums[kept] / each + moments.mean)
        self.squares.add(squares[kept] / each)

    def var(self) -> Tensor:
        """The biased variance over everything, (C,)."""
        return self.moments.var()


def extremes(x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least and the largest real value of each channel, in float64; infinite, the wrong way, without any."""
    dims = [0, *range(2, x.dim())]
    if real is None:
        low, high = x.amin(dims), x.amax(dims)
    else:
        outside = ~real.unsqueeze(1)
        low, high = x.masked_fill(outside, torch.inf).amin(dims), x.masked_fill(outside, -torch.inf).amax(dims)
    return low.double(), high.double()


def _by_row(x: Tensor, real: Tensor | None, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of deviations from ``mean`` and of their squares for each row of ``x``, (N, C), and counts of values."""
    n, channels = x.shape[:2]
    sums, squares = (torch.empty(n, channels, dtype=torch.float64, device=x.device) for _ in range(2))
    counts = torch.empty(n, dtype=torch.float64, device=x.device)
    rows = max(1, CHUNK // max(1, x[0].numel()))
    for start in range(0, n, rows):
        piece = slice(start, start + rows)
        deviations = x[piece].double().flatten(2) if x.dim() > 2 else x[piece].double().unsqueeze(2)
        deviations = deviations - mean.unsqueeze(1)  # not in place: a float64 input is no copy
        if real is None:
            counts[piece] = deviations.size(2)
        else:
            inside = real[piece].reshape(deviations.size(0), 1, -1)
            deviations = torch.where(inside, deviations, 0.0)
            counts[piece] = inside.sum((1, 2)).double()
        sums[piece] = deviations.sum(2)
        squares[piece] = deviations.square().sum(2)
    return sums, squares, counts


class Units:
    """The outputs of a layer over all batches: how far its units reach, and how often beyond an activation's bend."""

    BENDS = (2.0, 4.0)

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.low = torch.full((channels,), torch.inf, dtype=torch.float64, device=device)
        self.high = -self.low
        self.beyond = {bend: torch.zeros(channels, dtype=torch.float64, device=device) for bend in self.BENDS}

    def add(self, y: Tensor, real: Tensor | None) -> None:
        """Count a batch of outputs."""
        low, high = extremes(y, real)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        dims = [0, *range(2, y.dim())]
        inside = torch.ones_like(y[:, :1], dtype=torch.bool) if real is None else real.unsqueeze(1)
        self.count += int(inside.sum())
        for bend in self.BENDS:
            self.beyond[bend] += ((y.abs() > bend) & inside).sum(dims).double()

    def beyond_bend(self, bend: float) -> Tensor:
        """The share of values with \\|y\\| above ``bend``, (C,)."""
        return self.beyond[bend] / max(self.count, 1)


class Parting:
    """How far the outputs of two passes are apart, in units of the deviation between samples.

    Attributes:
        apart: sum of squared differences between batch mode and eval mode.
        halves: likewise between a batch and its halves, both in batch mode: the noise of a batch.
        spread: sum of squared deviations between samples, in batch mode; that of the samples with halves apart.
    """

    def __init__(self) -> None:
        self.apart = self.halves = self.spread = self.spread_of_halved = 0.0

    def add(self, evaluated: Tensor, trained: Tensor, halved: Tensor | None) -> None:
        """Count a batch: outputs (N, F) of the same samples and units in both modes.

        ``halved``: those of its even samples by themselves, then of the odd ones.
        """
        spread = float((trained - trained.mean(0)).square().sum())
        apart = float((trained - evaluated).square().sum())
        if not (math.isfinite(spread) and math.isfinite(apart)):
            return
        self.apart += apart
        self.spread += spread
        if halved is not None:
            half = len(halved) // 2
            again = torch.cat([trained[0 : 2 * half : 2], trained[1 : 2 * half : 2]])
            noise = float((again - halved).square().sum())
            if math.isfinite(noise):
                self.halves += noise
                self.spread_of_halved += float((again - trained.mean(0)).square().sum())

    @property
    def distance(self) -> float:
        """Between batch mode and eval mode; NaN where it was not measured."""
        return math.sqrt(self.apart / self.spread) if self.spread else math.nan

    @property
    def noise(self) -> float:
        """Between a batch and its halves; NaN where it was not measured."""
        return math.sqrt(self.halves / self.spread_of_halved) if self.spread_of_halved else math.nan


def sampled(y: Tensor, samples: int | None, width: int) -> Tensor | None:
    """``width`` units of each sample, (N, F) in float64, the same in every pass; None where rows are not samples."""
    if samples is None or y.is_nested or y.layout != torch.strided or not y.is_floating_point():
        return None
    if y.dim() < 1 or y.size(0) != samples or y.numel() == 0:
        return None
    flat = y.reshape(samples, -1)
    if flat.size(1) > width:
        generator = torch.Generator().manual_seed(flat.size(1))
        kept = torch.randint(flat.size(1), (width,), generator=generator)
        flat = flat[:, kept.to(y.device)]
    return flat.to(torch.float64, copy=True)  # what comes next may overwrite y


def quantile(tests: int, freedom: float, level: float = 1e-3) -> float:
    """The two-sided t-quantile for ``tests`` simultaneous tests at ``level``: Bonferroni's, by Hill's expansion."""
    z = NormalDist().inv_cdf(1 - level / (2 * max(tests, 1)))
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def channels(far: Tensor) -> str:
    """``3 of 64 channels (0, 5, 17)`` for a boolean (C,); the first eight are named."""
    numbers = far.nonzero().flatten().tolist()
    named = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"{len(numbers)} of {len(far)} channel{'s' if len(far) != 1 else ''} ({named})"
