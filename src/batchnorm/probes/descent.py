"""Walk in the space of a model's parameters, measure, and come back as if nothing had been."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import InputError
from batchnorm.probes.feeding import ForwardFn, buffers_kept, device_of, feed, on_device, undisturbed


@dataclass(frozen=True)
class Group:
    """A layer, and which of the parameters are its own, by their place among all.

    Attributes:
        layer: path of the module.
        members: places of its parameters.
        wide: whether one of them is a weight of two dimensions or more.
    """

    layer: str
    members: tuple[int, ...]
    wide: bool


class Passes:
    """Runs a model on one batch, always from the same buffers and the same random state, and counts.

    Attributes:
        groups: the layers in the order of their first calls, known after :meth:`first`.
        forwards: passes so far.
        backwards: passes so far.
    """

    def __init__(
        self, model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor], forward_fn: ForwardFn | None
    ) -> None:
        batch = on_device(batch, device_of(model))
        is_pair = isinstance(batch, tuple | list) and not hasattr(batch, "_fields") and len(batch) == 2
        self._targets = batch[1] if is_pair else batch
        self._output = lambda: feed(model, batch, forward_fn)
        self._loss_fn = loss_fn
        self._model = model
        learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not learned:
            raise InputError("expected a model with parameters that require a gradient, got none: is all of it frozen?")
        self._names = [name for name, _ in learned]
        self._theta = [parameter for _, parameter in learned]
        self._start = [parameter.detach().clone() for parameter in self._theta]
        self._restored = [buffers_kept(model), *_random_state(self._theta)]
        self.groups: list[Group] = []
        self.forwards = 0
        self.backwards = 0

    def first(self) -> tuple[float, list[Tensor]]:
        """As :meth:`run`, and see which layer is called when."""
        with _order_of_calls(self._model) as called:
            found = self.run()
        self.groups = _groups(self._names, self._theta, list(called))
        return found

    def run(self, members: Sequence[int] | None = None) -> tuple[float, list[Tensor]]:
        """The loss and its gradient, by all parameters or by those at ``members``."""
        for restore in self._restored:
            restore()
        wanted = self._theta if members is None else [self._theta[index] for index in members]
        self.forwards += 1
        loss = self._loss_fn(self._output(), self._targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"expected loss_fn to give a scalar tensor, got {got}")
        if not loss.requires_grad:
            raise InputError("expected a loss that depends on the model's parameters, got one without a gradient")
        self.backwards += 1
        # Not loss.backward(): what stands in .grad is the training's.
        found = torch.autograd.grad(loss.reshape(()), wanted, allow_unused=True)
        gradient = [
            torch.zeros_like(parameter) if part is None else part.detach()
            for parameter, part in zip(wanted, found, strict=True)
        ]
        return float(loss.detach()), [part.to_dense() if part.is_sparse else part for part in gradient]

    def step(self, gradient: Sequence[Tensor], eta: float, chosen: Sequence[int]) -> float:
        """Put the ``chosen`` parameters at ``start - eta * gradient``, all others at the start; the length of the way.

        Written through ``.data``: in place, so that memory which others share stays shared, and without counting as a
        change for a graph that waits for its backward pass.
        """
        moving = set(chosen)
        for index, parameter in enumerate(self._theta):
            parameter.data.copy_(self._start[index])
            if index in moving:
                parameter.data.add_(gradient[index], alpha=-eta)
        return distance([self._theta[index].data for index in chosen], [self._start[index] for index in chosen])

    def back(self) -> None:
        """The parameters as they were."""
        for parameter, before in zip(self._theta, self._start, strict=True):
            parameter.data.copy_(before)


@contextmanager
def explored(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor], forward_fn: ForwardFn | None
) -> Iterator[Passes]:
    """:class:`Passes` of ``model`` inside the block; afterwards everything is as it was, come what may."""
    with undisturbed(model), torch.enable_grad():
        passes = Passes(model, batch, loss_fn, forward_fn)
        try:
            yield passes
        finally:
            passes.back()


def distance(here: Sequence[Tensor], there: Sequence[Tensor]) -> float:
    """``||here - there||`` over all parts."""
    return norm([_real(a) - _real(b) for a, b in zip(here, there, strict=True)])


def norm(parts: Sequence[Tensor]) -> float:
    """Euclidean, summed in float64: a model has more parameters than float32 can add up. NaN becomes infinite."""
    total = math.hypot(*(float(torch.linalg.vector_norm(_real(part), dtype=torch.float64)) for part in parts))
    return total if math.isfinite(total) else math.inf


def product(here: Sequence[Tensor], there: Sequence[Tensor]) -> float:
    """The scalar product over all parts."""
    return sum(float((_real(a).double() * _real(b).double()).sum()) for a, b in zip(here, there, strict=True))


def _real(part: Tensor) -> Tensor:
    """As real numbers of float32 at least."""
    part = torch.view_as_real(part) if part.is_complex() else part
    return part.float() if part.element_size() < 4 else part


def _random_state(theta: Sequence[Tensor]) -> list[Callable[[], None]]:
    state = torch.get_rng_state()
    found = [lambda: torch.set_rng_state(state)]
    for device in {parameter.device for parameter in theta if parameter.device.type == "cuda"}:
        there = torch.cuda.get_rng_state(device)
        found.append(lambda there=there, device=device: torch.cuda.set_rng_state(there, device))  # type: ignore[misc]
    return found


@contextmanager
def _order_of_calls(model: nn.Module) -> Iterator[dict[str, None]]:
    """The names of the modules in the order of their first calls inside the block."""
    called: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in model.named_modules()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _groups(names: Sequence[str], theta: Sequence[Tensor], called: Sequence[str]) -> list[Group]:
    """Modules with parameters of their own, in the order of their first calls.

    What belongs to no module that was called (a weight that its parent reads) is the nearest called module's above it;
    what a parametrization holds is the parametrized module's.
    """
    members: dict[str, list[int]] = {name: [] for name in called}
    for index, name in enumerate(names):
        owner = re.split(r"(?:^|\.)parametrizations\.", name)[0] if "parametrizations." in name else name
        owner = owner if owner != name else name.rpartition(".")[0]
        while owner and owner not in members:
            owner = owner.rpartition(".")[0]
        members.setdefault(owner, []).append(index)
    return [
        Group(name, tuple(group), any(theta[index].dim() > 1 for index in group))
        for name, group in members.items()
        if group
    ]
