"""Running statistics that follow the batches which a model in evaluation is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import InputError
from batchnorm.ops import functional
from batchnorm.ops.arguments import positions
from batchnorm.ops.schema import statistics_dtype

Moments = tuple[Tensor, Tensor, Tensor]
"""Count, mean and sum of squared deviations."""


@dataclass
class _Seen:
    """A layer's source statistics, and what it has seen of the target."""

    source: tuple[Tensor, Tensor]
    samples: int = 0
    moments: Moments | None = None


class Statistics:
    """AdaBN: running = (N source + n target) / (N + n), with n samples of the target pooled exactly.

    Args:
        prior: N.
    """

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self._seen: list[_Seen] = []

    def start(self, layers: list[nn.Module]) -> None:
        """Nothing has been seen; what the layers have now is the source's."""
        self._seen = [_Seen((mean.clone(), var.clone())) for mean, var in map(_buffers, layers)]

    def __call__(self, model: nn.Module, layers: list[nn.Module], run: Callable[[], Any]) -> Any:
        """What ``run`` gives, each layer normalizing with statistics that know its input."""
        before = [(kept, kept.clone()) for layer in layers for kept in _buffers(layer)]
        known = [replace(seen) for seen in self._seen]
        try:
            with evaluating(model), ExitStack() as stack:
                for layer, seen in zip(layers, self._seen, strict=True):
                    handle = layer.register_forward_pre_hook(self._hook(seen), with_kwargs=True)
                    stack.callback(handle.remove)
                return run()
        except BaseException:
            self._seen = known
            with torch.no_grad():
                for kept, value in before:
                    kept.copy_(value)
            raise

    def mix(self, layers: list[nn.Module], samples: int) -> None:
        """The layers hold the target's statistics, of so many samples: mix those of the source in."""
        for layer, seen in zip(layers, self._seen, strict=True):
            mean, var = _buffers(layer)
            self._write(layer, seen, mean.clone(), var.clone(), samples)

    def _hook(self, seen: _Seen) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        @torch.no_grad()
        def meet(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            mask = positions(x, kwargs.get("mask"), kwargs.get("lengths"))
            if x.numel() == 0:
                return
            moments: Moments = functional.operators().stats(x, mask)
            if seen.moments is None and not self.prior and x.numel() == x.size(1):
                raise InputError(
                    f"expected more than 1 value per channel to adapt to, got {list(x.shape)}: give a prior, in samples"
                )
            if not all(bool(part.isfinite().all()) for part in moments):
                return  # an inf or NaN would be in the statistics for ever: it is normalized with what is known
            if seen.moments is not None:
                moments = _merged(seen.moments, moments)
            seen.moments = count, mean, m2 = moments
            seen.samples += x.size(0)
            self._write(layer, seen, mean, m2 / count.clamp(min=1), seen.samples)

        return meet

    @torch.no_grad()
    def _write(self, layer: nn.Module, seen: _Seen, mean: Tensor, var: Tensor, samples: int) -> None:
        weight = self.prior / (self.prior + samples)
        for kept, source, target in zip(_buffers(layer), seen.source, (mean, var), strict=True):
            wide = statistics_dtype(kept.device)
            target = target.to(wide)
            # With no weight the source must not even be looked at: it may be NaN, which is a reason to adapt.
            kept.copy_(target if weight == 0 else weight * source.to(kept.device, wide) + (1 - weight) * target)


@contextmanager
def evaluating(model: nn.Module, normalizing: list[nn.Module] | None = None) -> Iterator[None]:
    """All of ``model`` in eval mode, but for ``normalizing``, which normalize with their batch and move nothing."""
    modes = {module: module.training for module in model.modules()}
    tracked = [(layer, layer.__dict__.get("track_running_stats")) for layer in normalizing or []]
    try:
        model.eval()
        for layer, _ in tracked:
            layer.training = True  # not train(): a frozen layer has one that says no
            layer.__dict__["track_running_stats"] = False
        yield
    finally:
        for layer, before in tracked:
            layer.__dict__["track_running_stats"] = before
        for module, mode in modes.items():
            module.training = mode


def _buffers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
    assert mean is not None
    assert var is not None
    return mean, var


def _merged(first: Moments, second: Moments) -> Moments:
    """Chan's merge of counts, means and sums of squared deviations."""
    (n, mean, m2), (other_n, other_mean, other_m2) = (t.to(second[1].device) for t in first), second
    total, delta = (n + other_n).clamp(min=1), other_mean - mean
    return total, mean + delta * (other_n / total), m2 + other_m2 + delta * delta * (n * other_n / total)
