"""One population from what the processes of a job have each seen of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, distributed

from batchnorm._errors import InputError, SynchronizationError
from batchnorm.surgery.forms import Statistics, pool
from batchnorm.surgery.population import Collected, Population

T = TypeVar("T")


@dataclass(frozen=True)
class _Account:
    """What a rank tells the others: its error, or the layers it has, and what of each."""

    error: str | None
    layers: tuple[tuple[str, int, int], ...]
    batches: int
    found: tuple[tuple[int, tuple[Tensor, ...]] | None, ...]


def alone(group: Any) -> bool:
    """Whether there is nobody to pool with. ``group``: a process group, None for all, False for this process alone."""
    if group is False or not distributed.is_available() or not distributed.is_initialized():
        return True
    size = distributed.get_world_size(group)
    if size < 1:
        raise InputError("expected a process group that this process belongs to, got one of other processes")
    return size == 1


def first_known(value: T | None, group: Any) -> T | None:
    """The value of the first rank that has one."""
    return next((each for each in _gathered(value, group) if each is not None), None)


def pool_over_ranks(population: Population, error: Exception | None, group: Any) -> None:
    """Make ``population`` that of all ranks, to the same bits on each, in one exchange.

    Which they call whatever happened: ``error`` is what kept this one from its statistics. It is raised here, and a
    SynchronizationError that tells of it on the other ranks; the same where they have different layers.
    """
    mine = list(population.collected.values())
    described = tuple((each.layer.name, each.first.numel(), each.second.numel()) for each in mine)
    text = None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"
    found = () if error is not None else tuple(_travelling(each) for each in mine)
    accounts = _gathered(_Account(text, described, population.batches, found), group)
    if error is not None:
        raise error
    for rank, account in enumerate(accounts):
        if account.error is not None:
            raise SynchronizationError(f"nothing was recalibrated, because rank {rank} failed: {account.error}")
    for rank, account in enumerate(accounts):
        if account.layers != accounts[0].layers:
            raise SynchronizationError(
                f"expected the same layers to recalibrate on all ranks, got {_short(accounts[0])} on rank 0 and "
                f"{_short(account)} on rank {rank}: give every rank the same model"
            )
    population.batches = sum(account.batches for account in accounts)
    for index, each in enumerate(mine):
        known = [here for account in accounts if (here := account.found[index]) is not None]
        each.calls = sum(calls for calls, _ in known)
        if known:
            sets = [Statistics(*(part.unsqueeze(0) for part in parts)) for _, parts in known]
            each.total = pool(sets, each.form)


def _travelling(each: Collected) -> tuple[int, tuple[Tensor, ...]] | None:
    return None if each.total is None else (each.calls, tuple(part.cpu() for part in each.total))


def _gathered(value: Any, group: Any) -> list[Any]:
    size = distributed.get_world_size(group)
    told: list[Any] = [None] * size
    try:
        distributed.all_gather_object(told, value, group=group)
    except RuntimeError as failed:
        cause = (str(failed) or type(failed).__name__).splitlines()[0]
        raise SynchronizationError(
            f"expected all {size} ranks to recalibrate together, got {cause!r}: call it on every rank, or with "
            "process_group=False on one alone"
        ) from failed
    return told


def _short(account: _Account) -> str:
    more = f" and {len(account.layers) - 3} more" if len(account.layers) > 3 else ""
    return ", ".join(f"{name} ({width})" for name, width, _ in account.layers[:3]) + more
