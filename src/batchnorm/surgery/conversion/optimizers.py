"""Parameter groups of optimizers, when a model's parameters come and go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from batchnorm._errors import InputError, SurgeryError

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer]


@dataclass
class _Known:
    """What an optimizer had: the order of each group's parameters, and of those taken out their group and state."""

    orders: dict[int, list[nn.Parameter]] = field(default_factory=dict)
    removed: dict[nn.Parameter, tuple[int, dict[str, Any] | None]] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[Optimizer, _Known] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Exchange:
    """Parameters that go and come with one layer.

    Attributes:
        name: the layer, for messages.
        gone: those that no module of the model has any longer.
        come: those that none had before.
    """

    name: str
    gone: tuple[nn.Parameter, ...]
    come: tuple[nn.Parameter, ...]


def several(optimizer: Optimizers | None) -> tuple[Optimizer, ...]:
    """The optimizers that were given.

    Raises:
        InputError: (ValueError) one has no parameter groups.
    """
    given: Any = () if optimizer is None else optimizer
    found = tuple(given) if isinstance(given, list | tuple) else (given,)
    for each in found:
        if not isinstance(getattr(each, "param_groups", None), list) or not hasattr(each, "state"):
            raise InputError(f"expected an optimizer with param_groups, or several, got {type(each).__name__}")
    return found


def mend(optimizers: Sequence[Optimizer], exchanges: Iterable[Exchange]) -> None:
    """Take out of the optimizers what is gone, with its state; put in what has come.

    What comes back goes to the group and the place that it was taken from, with the state that it had; what is new to
    the place of what went with the same layer, or to the only group there is.

    Raises:
        SurgeryError: parameters come, and nothing tells to which group. Nothing is done then.
    """
    homes: list[tuple[Exchange, nn.Parameter, Optimizer, int]] = []
    for exchange in exchanges if optimizers else ():
        for parameter in exchange.come:
            if any(_group_of(each, parameter) is not None for each in optimizers):
                continue
            home = _home(optimizers, parameter, exchange)
            if home is None:
                raise SurgeryError(
                    f"expected an optimizer that tells to which group the parameters of {exchange.name!r} belong, got "
                    "one that never had them: leave out optimizer=, and add them to a group"
                )
            homes.append((exchange, parameter, *home))
    for exchange, parameter, optimizer, index in homes:
        _put(optimizer, index, parameter, exchange)
    for exchange in exchanges:
        for optimizer in optimizers:
            for parameter in exchange.gone:
                _take(optimizer, parameter)


def _home(optimizers: Sequence[Optimizer], parameter: nn.Parameter, exchange: Exchange) -> tuple[Optimizer, int] | None:
    for optimizer in optimizers:
        known = _known.get(optimizer)
        if known is not None and parameter in known.removed:
            return optimizer, known.removed[parameter][0]
    for optimizer in optimizers:
        for gone in exchange.gone:
            index = _group_of(optimizer, gone)
            if index is not None:
                return optimizer, index
    if len(optimizers) == 1 and len(optimizers[0].param_groups) == 1:
        return optimizers[0], 0
    return None


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> int | None:
    groups = enumerate(optimizer.param_groups)
    return next((index for index, group in groups if _position(group["params"], parameter) is not None), None)


def _position(parameters: Sequence[nn.Parameter], parameter: nn.Parameter) -> int | None:
    return next((place for place, found in enumerate(parameters) if found is parameter), None)  # == is elementwise


def _take(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    index = _group_of(optimizer, parameter)
    if index is None:
        return
    parameters = optimizer.param_groups[index]["params"]
    known = _known.setdefault(optimizer, _Known())
    if not set(parameters) <= set(known.orders.get(index, ())):
        known.orders[index] = list(parameters)
    known.removed[parameter] = (index, optimizer.state.pop(parameter, None))
    del parameters[_position(parameters, parameter)]


def _put(optimizer: Optimizer, index: int, parameter: nn.Parameter, exchange: Exchange) -> None:
    parameters = optimizer.param_groups[index]["params"]
    known = _known.setdefault(optimizer, _Known())
    order = known.orders.get(index, [])
    at = _position(order, parameter)
    if at is not None:
        before = (_position(parameters, earlier) for earlier in reversed(order[:at]))
        place = next((found + 1 for found in before if found is not None), 0)
    else:
        beside = (_position(parameters, gone) for gone in exchange.gone)
        place = next((found for found in beside if found is not None), len(parameters))
    parameters.insert(place, parameter)
    _, state = known.removed.pop(parameter, (index, None))
    if state is not None:
        optimizer.state[parameter] = state
