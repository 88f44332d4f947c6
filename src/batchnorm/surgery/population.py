"""The statistics of what goes into batch norms, over any number of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import SurgeryError
from batchnorm.moments import bessel_factor
from batchnorm.nn.batch_norm import _BatchNormLayer
from batchnorm.nn.recognition import Layer
from batchnorm.ops import jagged
from batchnorm.ops.arguments import positions
from batchnorm.ops.averages import in_backward
from batchnorm.surgery.forms import Statistics, form_of, pool

# Calls of a layer that are pooled at once: pooling takes a dozen small operations, a call none.
_TOGETHER = 16


@dataclass(eq=False)
class Collected:
    """What one layer was given.

    Attributes:
        first, second: the layer's buffers: running mean, and variance or covariance.
        calls: how often it was called with any value.
        total: of all calls; None before the first.
        within: the sums of products of deviations from the means of their own calls.
    """

    layer: Layer
    calls: int = 0
    total: Statistics | None = None
    within: Tensor | None = None
    waiting: list[tuple[int, Statistics]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Learn what the layer keeps."""
        self.form = form_of(self.layer)
        buffers = self.layer.module._buffers
        first, second = buffers["running_mean"], buffers[self.form.buffer]
        assert first is not None
        assert second is not None
        self.first, self.second = first, second

    @property
    def reached(self) -> bool:
        """Whether there was any value."""
        return self.calls > 0

    def use(self, statistics: Statistics) -> None:
        """Have the layer normalize with these, in eval mode."""
        number, mean, products = statistics
        self.first.copy_(mean.view(self.first.shape))
        self.second.copy_((products / number.clamp(min=1)).view(self.second.shape))

    def pool(self) -> int | None:
        """Take in what waits. The number of the first call that has NaN or infinity, or None."""
        if not self.waiting:
            return None
        numbers, means, products = (torch.stack(parts) for parts in zip(*(f for _, f in self.waiting), strict=True))
        sound = (torch.isfinite(means).all(1) & torch.isfinite(products).all(1)).tolist()
        if not all(sound):
            return self.waiting[sound.index(False)][0]
        self.calls += int((numbers > 0).sum())
        inner = products.sum(0)
        self.within = inner if self.within is None else self.within + inner
        sets = [Statistics(numbers, means, products)]
        if self.total is not None:
            sets.append(Statistics(*(each.unsqueeze(0) for each in self.total)))
        self.total = pool(sets, self.form)
        self.waiting.clear()
        return None

    def noise(self) -> float:
        """The largest standard error of a channel's mean, from the spread of the calls' means; in deviations."""
        if self.total is None or self.within is None or self.calls < 2:
            return float("inf")
        number, _, products = self.total
        between = self.form.squares(products - self.within).clamp(min=0)
        error = (between / ((self.calls - 1) * number)).sqrt()
        return float((error / self.deviations(products / number)).max())

    def deviations(self, moments: Tensor) -> Tensor:
        """What the layer divides by, sqrt(var + eps), for flat second moments."""
        eps: float = getattr(self.layer.module, "eps", 0.0)
        return (self.form.squares(moments).clamp(min=0) + eps).sqrt()


class Population:
    """Collects the statistics of layers while their model runs, in eval mode.

    Each call of such a layer normalizes with its own batch's statistics, as in training: they are in the layer's
    buffers when it runs, where eval looks. So they are computed once, no layer talks to other processes or moves an
    average, and whoever holds :func:`batchnorm.probes.feeding.undisturbed` has the buffers back.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.collected = {layer.module: Collected(layer) for layer in layers}
        self.calls: list[int] = []  # the batch of each call
        self.batches = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The hooks, which come after those that the layers have."""
        handles = [module.register_forward_pre_hook(self._take, with_kwargs=True) for module in self.collected]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def pool(self) -> None:
        """Take in all that waits. Raises SurgeryError where a layer was given NaN or infinity."""
        found = [(call, module) for module, each in self.collected.items() if (call := each.pool()) is not None]
        if found:
            call, module = min(found, key=lambda pair: pair[0])
            raise SurgeryError(
                f"{self.collected[module].layer.name!r}: expected finite values, got NaN or infinity in batch "
                f"{self.calls[call]} (from 0): nothing was recalibrated"
            )

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return  # a recomputation of what was taken before
        collected = self.collected[module]
        with torch.no_grad():
            found = self._statistics(collected, args, kwargs)
            collected.waiting.append((len(self.calls), found))
            self.calls.append(self.batches)
            # A layer whose turn comes before another's has as many calls waiting: the first to be full is the first.
            if len(collected.waiting) >= _TOGETHER:
                self.pool()
            collected.use(self._enough(collected, found))

    def _statistics(self, collected: Collected, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Statistics:
        module, name = collected.layer.module, collected.layer.name
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if not isinstance(x, Tensor):
            raise SurgeryError(f"{name!r}: expected a tensor to be normalized, got {type(x).__name__}")
        mask: Tensor | None = None
        if isinstance(module, _BatchNormLayer):
            if x.is_nested:
                packed = jagged.Packed(x, by_row=False)
                x, mask = packed.x, packed.mask
            else:
                mask = positions(x, kwargs.get("mask"), kwargs.get("lengths"))
        if x.dim() < 2 or x.size(1) != len(collected.first):
            raise SurgeryError(
                f"{name!r}: expected an input of shape (N, {len(collected.first)}, *), got {list(x.shape)}: leave "
                "it out by layers="
            )
        return collected.form.of_batch(x.detach(), mask)

    def _enough(self, collected: Collected, found: Statistics) -> Statistics:
        """What to normalize this call with: its own statistics, or all so far where it is a single value a channel."""
        if found.number.device.type != "cpu" or float(found.number) != 1:
            return found
        self.pool()
        total = collected.total
        assert total is not None
        if float(total.number) < 2:
            raise SurgeryError(
                f"{collected.layer.name!r}: expected more than one value a channel in the first batch, got 1: put a "
                "larger batch first"
            )
        return total


def buffers_of(collected: Collected) -> dict[Tensor, Tensor]:
    """The values that the layer's buffers are to have: mean, second moment with the layer's ``ddof``, calls.

    Raises SurgeryError where there is no variance, or where it does not fit the buffer's dtype.
    """
    module, name = collected.layer.module, collected.layer.name
    assert collected.total is not None
    number, mean, products = collected.total
    ddof = getattr(module, "ddof", 1)  # torch's running variance is unbiased
    if float(number) < 2:
        raise SurgeryError(f"{name!r}: expected more than one value a channel in all batches, got {float(number):g}")
    moments = products / number * bessel_factor(number, ddof)
    first, second = collected.first, collected.second
    values = {
        first: mean.view(first.shape).to(first.dtype),
        second: moments.view(second.shape).to(second.dtype),
    }
    for buffer, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise SurgeryError(
                f"{name!r}: expected statistics within the range of {buffer.dtype}, got up to "
                f"{float(max(mean.abs().max(), moments.abs().max())):.3g}: keep its buffers in float32"
            )
    counter = module._buffers.get("num_batches_tracked")
    if isinstance(counter, Tensor):
        values[counter] = torch.tensor(collected.calls, dtype=counter.dtype)
    return values


def movement(collected: Collected, mean: Tensor, moments: Tensor) -> tuple[float, float]:
    """How far from ``mean`` and ``moments``, flat, the statistics are: the largest of all channels.

    Of the mean in deviations; of the deviation as |log| of the ratio. A deviation is what the layer divides by.
    """
    assert collected.total is not None
    number, now, products = collected.total
    deviation = collected.deviations(products / number)
    shift = ((now - mean.to(now)).abs() / deviation).max()
    return float(shift), float((deviation / collected.deviations(moments.to(now))).log().abs().max())
