"""What a survey sees besides the layers: the model's input, padding, and where numbers stop being finite."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.probes.feeding import arguments
from batchnorm.probes.wiring import is_atomic
from batchnorm.probes.wiring.steps import tensors


class Input:
    """What the first layer with parameters is given: the data, after whatever the model does to them before it.

    Attributes:
        module: that layer; None before a batch.
        moments: of each feature of its input; None where the layer is none that multiplies its input by weights (a
            linear, convolutional or recurrent one), or the input is no real number.
        low, high: the extremes, over all features.
        whole: whether all values are integers.
        image: whether features are channels of positions.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.moments: Moments | None = None
        self.low, self.high = float("inf"), float("-inf")
        self.whole = True
        self.image = False

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count a call of ``module``, where it is the first one that a forward pass makes."""
        if self.module is None:
            self.module = module
        x = next(iter(tensors((args, kwargs))), None)
        if module is not self.module or x is None or not _multiplies(module):
            return
        if not x.is_floating_point() or x.is_nested or x.dim() < 2 or x.numel() == 0:
            return
        x = x.detach()
        self.image = isinstance(module, nn.modules.conv._ConvNd)
        axis = 1 if self.image and x.dim() == module.weight.dim() else x.dim() - 1  # type: ignore[operator]
        moments = Moments.from_batch(x, channel_axis=axis)
        if self.moments is None:
            self.moments = moments
        elif moments.num_features == self.moments.num_features:
            self.moments = self.moments.merge(moments)
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.whole = self.whole and bool((x == x.round()).all())


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.RNNBase)


class Padding:
    """Constant ends of the sequences (N, C, L) that a layer is given: vectors that are the same up to the end.

    Attributes:
        positions, padded: how many positions there were, and how many of them belong to a constant end.
        sequences, ended: how many sequences there were, and how many have a constant end.
        agreeing: how many of those end with the same vector.
        shortest, longest: of the ends, as shares of L.
        leading: positions that belong to a constant beginning.
    """

    EDGE = 4
    """Positions at the very end that may differ: zero padding of convolutions reaches into them."""

    def __init__(self) -> None:
        self.positions = self.padded = self.sequences = self.ended = self.agreeing = self.leading = 0
        self.shortest, self.longest = 1.0, 0.0
        self._vector: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count a batch."""
        if x.dim() != 3 or x.size(2) < 8:
            return
        n, _, length = x.shape
        scale = x.abs().amax((0, 2)).unsqueeze(1)
        # Kernels may sum the same products in another order at other positions.
        same = ((x[:, :, 1:] - x[:, :, :-1]).abs() <= 1e-6 * scale).all(1)
        ends, edges = _run(same.flip(1), self.EDGE)
        begins, _ = _run(same, self.EDGE)
        self.positions += n * length
        self.sequences += n
        self.padded += int(ends.sum())
        self.leading += int(begins.sum())
        shares = ends.double() / length
        self.shortest, self.longest = min(self.shortest, float(shares.min())), max(self.longest, float(shares.max()))
        ended = ends > 0
        self.ended += int(ended.sum())
        if not bool(ended.any()):
            return
        at = length - 1 - edges[ended]
        vectors = x[ended].gather(2, at.view(-1, 1, 1).expand(-1, x.size(1), 1)).squeeze(2)
        if self._vector is None:
            self._vector = vectors.median(0).values
        self.agreeing += int(((vectors - self._vector).abs() <= 1e-5 * scale.squeeze(1)).all(1).sum())


def _run(same: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """For each row, the positions in its first run of equal neighbours, and how many come before; 0 without a run.

    A run has three equal vectors or more and begins within the first ``edge`` positions.
    """
    first = same.int().argmax(1)
    begun = same.any(1) & (first <= edge)
    skipped = torch.arange(same.size(1), device=same.device) < first.unsqueeze(1)
    run = (same | skipped).int().cumprod(1).sum(1) - first
    begun &= run >= 2
    return torch.where(begun, run + 1 + first, 0), torch.where(begun, first, 0)


def claimed_padding(model: nn.Module, batch: Any, custom: bool) -> dict[str, tuple[float, int]]:
    """The share of padded positions by the masks and lengths in ``batch``, and L, by their names.

    A mask is (N, L), of two values, and changes at most once along a row; lengths are integers (N,), and padding is
    what they leave of the longest. Names are the keys of a mapping, or those of the forward's parameters; for a
    ``custom`` way of feeding the keys alone.
    """
    named = _named(model, batch, custom)
    found: dict[str, tuple[float, int]] = {}
    for name, value in named.items():
        low = name.lower()
        if not isinstance(value, Tensor) or value.numel() == 0:
            continue
        if "mask" in low and value.dim() == 2 and value.size(1) > 1:
            marked = value != 0
            if not bool(((value == 0) | (value == 1)).all()):
                continue
            if bool((marked.int().diff(dim=1).abs().sum(1) > 1).any()):
                continue
            padded = marked if "pad" in low else ~marked
            share, length = float(padded.double().mean()), value.size(1)
        elif low.rstrip("s").endswith(("length", "len")) and value.dim() == 1 and not value.is_floating_point():
            length = int(value.max())
            share = 1 - float(value.double().mean()) / max(length, 1)
        else:
            continue
        found[name] = share, length
    return found


def _named(model: nn.Module, batch: Any, custom: bool) -> Mapping[str, Any]:
    if custom:
        first = batch[0] if isinstance(batch, tuple | list) and batch else batch
        inner = batch if isinstance(batch, Mapping) else first
        return {str(key): value for key, value in inner.items()} if isinstance(inner, Mapping) else {}
    positional, named = arguments(batch)
    try:
        return inspect.signature(model.forward).bind_partial(*positional, **named).arguments | named
    except (TypeError, ValueError):
        return named


@dataclass(frozen=True)
class NotFinite:
    """Where NaN or infinity appeared first.

    Attributes:
        layer: the first module whose inputs are finite and whose output is not; ``""`` where that is not known.
        kind: the class of that module.
        batch: the number of the batch.
        data: how many values of the batch itself were not finite; ``of`` how many.
        values: how many values of the output are not finite.
    """

    layer: str
    kind: str
    batch: int
    data: int
    values: int
    of: int

    @classmethod
    def find(cls, model: nn.Module, prefix: str, number: int, batch: Any, run: Callable[[], Any]) -> NotFinite:
        """Run once more, and look at every step."""
        found: list[NotFinite] = []
        given = [leaf for leaf in tensors(batch) if leaf.is_floating_point()]
        data, of = sum(_nonsense(leaf) for leaf in given), sum(leaf.numel() for leaf in given)

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
                if found or any(_nonsense(tensor) for tensor in tensors((args, kwargs))):
                    return
                bad = sum(_nonsense(tensor) for tensor in tensors(result))
                if bad:
                    size = sum(tensor.numel() for tensor in tensors(result))
                    found.append(cls(prefix + name, type(module).__name__, number, data, bad, size))

            return hook

        if data:
            return cls("", "", number, data, data, of)
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if hookable(module):
                    stack.callback(module.register_forward_hook(after(name), with_kwargs=True).remove)
            run()
        return found[0] if found else cls("", "", number, 0, 0, 0)


def hookable(module: nn.Module) -> bool:
    """Whether ``module`` is one step that can be watched: a ScriptModule takes no hooks."""
    return not isinstance(module, torch.jit.ScriptModule) and is_atomic(module)


def _nonsense(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_nested or tensor.is_quantized:
        return 0
    return int((~tensor.isfinite()).sum())
