"""What one look shows of one layer: filled in by its hooks, kept as arrays, read as a dictionary."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from batchnorm.moments import bessel_factor
from batchnorm.ops.arguments import positions
from batchnorm.probes.movement import typical_unit
from batchnorm.probes.watching.kinds import PARAMETERS, Kind, unreadable
from batchnorm.probes.watching.layers import Ends, flat_ends, is_rectifier
from batchnorm.probes.watching.statistics import (
    LEVELS,
    Array,
    Taken,
    add_sample,
    channel_axis,
    flat_share,
    percentiles,
    settle,
    take,
)

# A share of eps below which the input of a batch norm does not count as varying: less than 1% of it comes out.
_CONSTANT = 1e-4
_TYPICAL = tuple(LEVELS.index(level) for level in (15.0, 50.0, 85.0))


class Sight:
    """One layer in one pass. The ``see_`` methods are called in the order of the pass, each at most once.

    They take what they need of the tensors; :func:`settle_all` makes numbers of it, for many layers at a time.

    Attributes:
        held: gamma, beta, running mean and running variance as they were before the pass; None for what is not there.
        follower: the activation that takes the layer's output.
    """

    def __init__(self, step: int, mode: str, kind: Kind) -> None:
        self.step, self.mode, self.kind = step, mode, kind
        self.input: Taken | None = None
        self.output: Taken | None = None
        self.gradient: Taken | None = None
        self.held: list[Any] = [None] * len(PARAMETERS)
        self.follower = kind.follower
        self.quantiles: Array | None = None
        self.saturated = math.nan
        self.unseen: str | None = None
        self._mask: Tensor | None = None
        self._pending: list[Taken] = []
        self._seen: weakref.ref[Tensor] | None = None

    def see_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int | None) -> None:
        """Before the layer runs: it may overwrite its input."""
        x = first_tensor((args, kwargs) if kwargs else args)
        self.unseen = unreadable(x)
        if self.unseen or x is None:
            return
        if kwargs and (kwargs.get("mask") is not None or kwargs.get("lengths") is not None):
            self._mask = positions(x, kwargs.get("mask"), kwargs.get("lengths"))
        self.input = take(x, channel_axis(self.kind.module, x), limit, self._mask)
        self._pending.append(self.input)

    def see_output(self, output: Any, limit: int | None) -> Tensor | None:
        """After the layer ran. Returns the tensor whose gradient will be seen, if it has one."""
        y = first_tensor(output)
        if self.unseen or y is None or unreadable(y):
            return None
        self.output = take(y, channel_axis(self.kind.module, y), limit, self._mask, self._flat_output is not None)
        self._pending.append(self.output)
        self._seen = weakref.ref(y)
        return y if y.requires_grad else None

    @property
    def _flat_output(self) -> Ends | None:
        return None if self.follower is None else flat_ends(self.follower)

    def see_follower(self, follower: nn.Module, x: Any) -> bool:
        """Whether the layer's output is what ``follower``, an activation, is about to take: then it is judged by it."""
        if self._seen is None or self.output is None or not isinstance(x, Tensor) or self._seen() is not x:
            return False
        self.follower = follower
        if self._flat_output:
            add_sample(self.output, x, channel_axis(follower, x), self._mask)
        return True

    def see_gradient(self, gradient: Tensor, limit: int | None) -> None:
        """In the backward pass: the gradient with respect to the output."""
        if self.gradient is None and not unreadable(gradient):
            self.gradient = take(gradient, channel_axis(self.kind.module, gradient), limit, self._mask, sampled=False)
            self._pending.append(self.gradient)
        self._mask = None

    def pending_bytes(self) -> int:
        """What waits for being settled."""
        return sum(taken.sample.nbytes for taken in self._pending if taken.sample is not None)

    def settle(self, quantiles: Array | None) -> None:
        """Read the samples, whose moments are there by now; ``quantiles`` of an input that had none yet."""
        if quantiles is not None:
            self.quantiles = quantiles
        for taken in self._pending:
            ends = self.kind.flat_input if taken is self.input else self._flat_output
            if ends and taken is not self.gradient:
                self.saturated = flat_share(taken.sample, ends)
            if taken is self.output and taken.high is None and taken.count and self._rectified():
                assert taken.sample is not None
                taken.high = taken.sample.max(0)
            taken.sample = None
        self._pending = []

    def _rectified(self) -> bool:
        return self.follower is not None and is_rectifier(self.follower)

    @property
    def dead(self) -> float:
        """The share of dead units, as docs/watch.md defines them; NaN where the layer's kind has none."""
        mean, std = moments_of(self.output)
        deviation = moments_of(self.input)[1]
        if self.output is None or not self.output.count or mean is None or std is None or deviation is None:
            return math.nan
        if self.kind.ends_in_zeros:
            return float(((mean == 0) & (std == 0)).mean())
        constant = deviation**2 < _CONSTANT * self.kind.eps if self.kind.normalizes else None
        if self._rectified() and self.output.high is not None:
            never = self.output.high <= 0
            return float((never if constant is None else never | constant).mean())
        return math.nan if constant is None else float(constant.mean())

    def hold(self, parameters: list[Any]) -> None:
        """The layer's parameters, of which those count that are one number a channel of the input."""
        if self.input is not None:
            step, size = self.input.step, (self.input.channels,)
            # Copies: a view would keep the parameters of all layers.
            self.held = [
                each[::step].copy() if each is not None and each.shape == size else None for each in parameters
            ]

    def parameter(self, name: str) -> Array | None:
        """One of :data:`PARAMETERS` at the units."""
        return self.held[PARAMETERS.index(name)]

    def gaps(self) -> tuple[Array | None, Array | None]:
        """``mean_gap`` and ``var_ratio`` of a record."""
        mean, std = moments_of(self.input)
        running_mean, running_var = self.parameter("running_mean"), self.parameter("running_var")
        if self.input is None or mean is None or std is None or running_mean is None or running_var is None:
            return None, None
        running_var = running_var.astype(np.float64)
        with np.errstate(all="ignore"):
            gap = (mean - running_mean) / np.sqrt(running_var + self.kind.eps)
            ratio = std**2 * bessel_factor(self.input.count, self.kind.ddof) / running_var
        return gap, ratio

    def gradient_norm(self) -> Array | None:
        """The Euclidean norm of each unit's gradient over all its values."""
        mean, std = moments_of(self.gradient)
        if self.gradient is None or mean is None or std is None:
            return None
        with np.errstate(all="ignore"):
            norm: Array = np.sqrt(self.gradient.count * (mean**2 + std**2))
        return norm

    def typical(self) -> list[float | None] | None:
        """Percentiles 15, 50 and 85 of the median unit, out of the units that have them."""
        if self.quantiles is None:
            return None
        chosen = self.quantiles[:, _TYPICAL]
        chosen = chosen[np.isfinite(chosen).all(axis=1)]
        return list(typical_unit(chosen.tolist())) if len(chosen) else None

    def record(self) -> dict[str, Any]:
        """The look as a dictionary that JSON can hold: what is not finite, or does not apply, is None."""
        gap, ratio = self.gaps()
        of_input = self.input
        assert of_input is not None
        mean, std = moments_of(of_input)
        output_mean, output_std = moments_of(self.output)
        grad_mean, grad_std = moments_of(self.gradient)
        return {
            "step": self.step,
            "layer": self.kind.name,
            "type": type(self.kind.module).__name__,
            "mode": self.mode,
            "count": of_input.count,
            "channels": of_input.channels,
            "units": list(range(0, of_input.channels, of_input.step)),
            "mean": plain(mean),
            "std": plain(std),
            "levels": list(LEVELS),
            "quantiles": plain(self.quantiles),
            "typical": self.typical(),
            "output_mean": plain(output_mean),
            "output_std": plain(output_std),
            "dead": plain(self.dead),
            "saturated": plain(self.saturated),
            "grad_mean": plain(grad_mean),
            "grad_std": plain(grad_std),
            "grad_norm": plain(self.gradient_norm()),
            "weight": plain(self.parameter("weight")),
            "bias": plain(self.parameter("bias")),
            "running_mean": plain(self.parameter("running_mean")),
            "running_var": plain(self.parameter("running_var")),
            "mean_gap": plain(gap),
            "var_ratio": plain(ratio),
        }


def settle_all(sights: Iterable[Sight]) -> None:
    """Make numbers of what was taken since the last time. Layers of one shape are settled together."""
    waiting = [sight for sight in sights if sight._pending]
    if not waiting:
        return
    settle([taken for sight in waiting for taken in sight._pending])
    new = [sight for sight in waiting if sight.quantiles is None]
    found = percentiles(
        [sight.input.sample for sight in new if sight.input is not None and sight.input.sample is not None]
    )
    quantiles = dict(zip(new, found, strict=True))
    for sight in waiting:
        sight.settle(quantiles.get(sight))


def moments_of(taken: Taken | None) -> tuple[Array | None, Array | None]:
    """Mean and std."""
    return (None, None) if taken is None or taken.moments is None else taken.moments


def plain(values: Array | float | None) -> Any:
    """Numbers as JSON has them: lists, with None for what is not finite."""
    if values is None:
        return None
    if isinstance(values, float):
        return float(values) if math.isfinite(values) else None
    if np.isfinite(values).all():
        return values.tolist()
    listed = values.astype(object)
    listed[~np.isfinite(values)] = None
    return listed.tolist()


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in what a layer takes or gives: itself, or within tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    for item in value:
        found = first_tensor(item)
        if found is not None:
            return found
    return None
