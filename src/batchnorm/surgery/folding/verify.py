"""The folded model beside the one that it was made of, on the example and on one with noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm._errors import SurgeryError
from batchnorm.probes.feeding import ForwardFn, device_of, feed, on_device, undisturbed
from batchnorm.probes.wiring import is_atomic, tensors

_NOISE = 0.1
RTOL = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What outputs may differ by, relative to the largest, where a model has half precision numbers; else 1e-4."""


def default_rtol(values: Iterator[Tensor]) -> float:
    """1e-4, or the tolerance of the coarsest dtype among ``values``."""
    return max((RTOL.get(tensor.dtype, 1e-4) for tensor in values), default=1e-4)


def perturbed(example: Any, generator: torch.Generator) -> Any:
    """``example`` with noise of a tenth of each floating tensor's deviation."""

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        values = tensor.detach().double()
        deviation = values.std() if tensor.numel() > 1 else values.abs().max()
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return (values + _NOISE * deviation * noise).to(tensor.dtype)

    return pytree.tree_map_only(Tensor, noisy, example)


class Reference:
    """What a model gave before it was folded.

    Raises:
        SurgeryError: it does not run, gives no tensors, or gives others when it is run again.
    """

    def __init__(self, model: nn.Module, example: Any, forward_fn: ForwardFn | None, rtol: float) -> None:
        self.forward_fn, self.rtol = forward_fn, rtol
        generator = torch.Generator().manual_seed(0)
        self.batches = [("the example", example), ("the example with noise", perturbed(example, generator))]
        try:
            self.outputs = [run(model, example, forward_fn, seed=0)]
        except Exception as error:
            raise SurgeryError(
                f"expected an example that the model takes, got {type(error).__name__}: {error}: give another, or a "
                "forward_fn"
            ) from error
        if not self.outputs[0]:
            raise SurgeryError("expected a model that gives tensors, got none to compare: give a forward_fn that does")
        if not difference(self.outputs[0], self.outputs[0]) <= 0:
            raise SurgeryError("expected finite outputs on the example, got a tensor of NaN or infinities alone")
        again = run(model, example, forward_fn, seed=1)
        if not difference(self.outputs[0], again) <= 0.1 * rtol:
            raise SurgeryError(
                "expected a forward that gives the same twice, got another result, by "
                f"{difference(self.outputs[0], again):.2g} of the largest output: it is random (a dropout in training "
                "mode?), call model.eval()"
            )
        try:
            self.outputs.append(run(model, self.batches[1][1], forward_fn, seed=0))
        except Exception:  # noqa: BLE001 - a model may refuse what is not of its range
            del self.batches[1]

    def check(self, folded: nn.Module, explain: Callable[[Any], str]) -> float:
        """The largest difference from ``folded``, relative to the largest output.

        Args:
            folded: the model.
            explain: says of a batch at which layer the models part, and the like.

        Raises:
            SurgeryError: it is more than rtol.
        """
        worst = 0.0
        for (name, batch), expected in zip(self.batches, self.outputs, strict=True):
            try:
                found = run(folded, batch, self.forward_fn, seed=0)
            except Exception as error:
                raise SurgeryError(
                    f"the folded model does not run, {type(error).__name__}: {error}: its forward uses the batch norms "
                    "in ways of its own"
                ) from error
            gap = difference(expected, found)
            if not gap <= self.rtol:
                raise SurgeryError(
                    f"folding changes the model: on {name} outputs differ by {gap:.2g} of the largest, more than "
                    f"rtol={self.rtol:.2g}, {explain(batch)}: the model is as it was"
                )
            worst = max(worst, gap)
        return worst


def run(model: nn.Module, batch: Any, forward_fn: ForwardFn | None, seed: int) -> list[Tensor]:
    """The tensors that a model gives, which is left as it was."""
    with undisturbed(model):
        torch.manual_seed(seed)
        result = feed(model, batch, forward_fn)
        return [tensor.detach().clone() for tensor in tensors(result)]


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference of two lists of tensors: of floats relative to the largest, of others the share.

    NaN and infinities must be in the same places; a tensor of nothing else cannot be compared, which is infinity.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.inf
    return max((_difference(*two) for two in zip(expected, found, strict=True)), default=0.0)


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((expected != found).double().mean())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), found.to(wide)
    finite = torch.isfinite(a)
    if not torch.equal(torch.where(finite, 0, a).nan_to_num(3, 1, 2), torch.where(finite, 0, b).nan_to_num(3, 1, 2)):
        return math.inf
    if not bool(finite.any()) or not bool(torch.isfinite(b[finite]).all()):
        return math.inf
    gap, largest = float((a - b)[finite].abs().max()), float(a[finite].abs().max())
    return 0.0 if gap == 0 else gap / largest if largest else math.inf


def where_they_part(
    model: nn.Module, folded: nn.Module, changed: set[str], batch: Any, forward_fn: ForwardFn | None, rtol: float
) -> str:
    """The first layer of equal name whose outputs differ; ``changed`` are those whose outputs are meant to.

    And how much of that is in the model as it was: how far its outputs are from those in float64.
    """
    known = _outputs(model, batch, forward_fn)
    found = _outputs(folded, batch, forward_fn)
    parting = (n for n in known if n in found and n not in changed and not difference(known[n], found[n]) <= rtol)
    place = f"first at {next(parting, '') or 'the output'}"
    try:
        plain = run(model, batch, forward_fn, seed=0)
        exact = run(copy.deepcopy(model).double(), _double(batch), forward_fn, seed=0)
        own = difference(exact, plain)
    except Exception:  # noqa: BLE001 - not every model has a float64 of its own
        return place
    if own <= 0.1 * rtol:
        return place
    return f"{place} (of the model as it was, rounding makes {own:.2g}; pass a larger rtol if that is fine)"


def _double(batch: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)


def _outputs(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> dict[str, list[Tensor]]:
    """What the layers of a model gave, by name, in the order of execution."""
    kept: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, result: kept.setdefault(name, []).extend(t.clone() for t in tensors(result))

    with ExitStack() as stack, undisturbed(model):
        for name, module in model.named_modules():
            if is_atomic(module):
                stack.callback(module.register_forward_hook(hook(name)).remove)
        feed(model, on_device(batch, device_of(model)), forward_fn)
    return kept
