"""``fit`` inside a torch.distributed job: every rank reads its shard, and all end with the statistics of the whole.

The ranks meet twice. First through the group's store, where a rank that waits can see who is missing and say so before
any collective hangs. Then each tells the others what it has, so that a rank that failed, or has something else in hand,
is an error on every rank. Only then statistics travel: merged pairwise in a tree, in the order of the ranks, which
takes the memory of two of them whatever the number of ranks, and handed from rank 0 to all, so that all hold the same
bits.
"""

from __future__ import annotations

import io
import pickle
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from batchnorm._errors import InputError, SynchronizationError
from batchnorm.preprocessing.batch import NothingToLearnError

PATIENCE = 30.0  # seconds until a rank that waits says for whom

_alone: ContextVar[bool] = ContextVar("batchnorm_alone", default=False)
# How often the ranks of a group have met: the name of the next meeting, the same on all of them.
_meetings: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def active() -> bool:
    """Whether ``fit`` reduces over ranks: torch.distributed has several, and this is not under :func:`local`."""
    return (
        "torch.distributed" in sys.modules
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
        and not _alone.get()
    )


@contextmanager
def local() -> Iterator[None]:
    """``fit`` stays on its own rank in here: ``if rank == 0: with bn.preprocessing.local(): scaler.fit(X)``."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def learn_together(estimator: Any, learn: Callable[[], Any], group: Any = None) -> Any:
    """What ``learn()`` returns on all ranks together, the same bits on each; width and names go to ``estimator``.

    A rank whose shard is empty (NothingToLearnError) takes what the others have. Raises what ``learn`` raised, and on
    the other ranks a SynchronizationError that names it; the same for ranks that disagree or do not come.
    """
    size = distributed.get_world_size(group)
    if size < 1:
        raise InputError("expected a process group that this process belongs to, got one of other processes")
    if size == 1:
        return learn()
    meeting = _Meeting(group)
    meeting.announce("began")
    error: Exception | None = None
    stats: Any = None
    try:
        stats = learn()
    except Exception as caught:  # noqa: BLE001 -- raised below, when the others know
        error = caught
    except BaseException:
        meeting.withdraw()
        raise
    meeting.announce("done")
    meeting.wait()
    try:
        told: list[Any] = [None] * size
        distributed.all_gather_object(told, _Account.of(estimator, stats, error), group=group)
        _agree(told, error)
        stats = _reduced(stats, group)
    except RuntimeError as failed:
        if isinstance(failed, SynchronizationError) or failed is error:
            raise
        cause = (str(failed) or type(failed).__name__).splitlines()[0]
        raise SynchronizationError(
            f"expected all {size} ranks to reduce what they learned, got {cause!r}: see whether a rank has died"
        ) from failed
    known = next(account for account in told if account.features is not None)
    estimator.n_features_in_ = known.features
    names = next((account.names for account in told if account.names is not None), None)
    if names is not None:
        estimator.feature_names_in_ = np.asarray(names, dtype=object)
    return stats


# --- who is there -----------------------------------------------------------------------------------------------------


class _Meeting:
    """One reduction of a group, in the group's store: ``began`` and ``done`` for each rank."""

    def __init__(self, group: Any) -> None:
        world: Any = distributed.group.WORLD
        self.group = world if group is None else group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.number = _meetings.get(self.group, 0)
        self.store = self.group.get_group_store()
        device = torch.device(_device(group).type)
        self.timeout: float = self.group._get_backend(device).options._timeout.total_seconds()
        self.written: list[str] = []

    def key(self, what: str, rank: int, number: int | None = None) -> str:
        return f"batchnorm/{self.number if number is None else number}/{what}/{rank}"

    def announce(self, what: str) -> None:
        self.store.set(self.key(what, self.rank), "1")
        self.written.append(self.key(what, self.rank))

    def withdraw(self) -> None:
        """As if this rank had never come: the next meeting has this one's number."""
        for key in self.written:
            self.store.delete_key(key)

    def wait(self) -> None:
        """Until all ranks are done; says who has not begun. Raises SynchronizationError at the group's timeout."""
        try:
            self._wait()
        except BaseException:
            self.withdraw()
            raise
        _meetings[self.group] = self.number + 1
        # Whoever is here has left the meeting before: nobody reads its keys any more.
        for what in ("began", "done"):
            self.store.delete_key(self.key(what, self.rank, self.number - 1))

    def _wait(self) -> None:
        began, pause, told = time.monotonic(), 0.001, False
        done = [self.key("done", rank) for rank in range(self.size)]
        while not self.store.check(done):
            waited = time.monotonic() - began
            if waited > self.timeout:
                raise SynchronizationError(
                    f"expected all {self.size} ranks to fit, {self._missing('done')} did not within {self.timeout:g} "
                    f"seconds, the timeout of the process group: {_remedy(self.rank)}"
                )
            if waited > PATIENCE and not told:
                told = True
                absent = self._missing("began")
                if absent:
                    warnings.warn(
                        f"rank {self.rank} has waited {waited:.0f} seconds in fit for {absent}, which did not call "
                        f"it: {_remedy(self.rank)}",
                        RuntimeWarning,
                        stacklevel=7,
                    )
            time.sleep(pause)
            pause = min(0.05, 2 * pause)

    def _missing(self, what: str) -> str:
        ranks = [rank for rank in range(self.size) if not self.store.check([self.key(what, rank)])]
        some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        return f"rank{'s' if len(ranks) > 1 else ''} {some}" if ranks else ""


def _remedy(rank: int) -> str:
    return (
        "fit is collective where torch.distributed runs, so call it on every rank, or, on this one alone, under "
        f"`with batchnorm.preprocessing.local():` (here rank {rank})"
    )


def _device(group: Any) -> torch.device:
    """Where tensors must be to travel in ``group``."""
    accelerator = torch.accelerator.current_accelerator()
    backend = distributed.get_backend(group)
    if accelerator is not None and backend == distributed.get_default_backend_for_device(accelerator):
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


# --- what they have ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Account:
    """What a rank tells the others before statistics travel."""

    estimator: str
    features: int | None
    names: list[str] | None
    error: str | None
    empty: bool

    @classmethod
    def of(cls, estimator: Any, stats: Any, error: Exception | None) -> _Account:
        parameters = ", ".join(f"{name}={value!r}" for name, value in sorted(estimator.get_params(deep=False).items()))
        names = getattr(estimator, "feature_names_in_", None) if stats is not None else None
        text = None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"
        return cls(
            f"{type(estimator).__name__}({parameters})",
            None if stats is None else estimator.n_features_in_,
            None if names is None else [str(name) for name in names],
            text,
            isinstance(error, NothingToLearnError),
        )


def _agree(told: list[_Account], error: Exception | None) -> None:
    """Raise, on every rank, where one has failed or has something else in hand."""
    failed = [rank for rank, account in enumerate(told) if account.error is not None and not account.empty]
    empty = all(account.empty for account in told)
    if error is not None and (empty or not isinstance(error, NothingToLearnError)):
        raise error
    if failed:
        raise SynchronizationError(
            f"nothing was learned, because fit failed on rank {failed[0]}: {told[failed[0]].error}"
        )
    for what, of in (("estimator", "estimator"), ("number of features", "features"), ("feature names", "names")):
        values = [getattr(account, of) for account in told]
        first = next((rank for rank, value in enumerate(values) if value is not None), 0)
        for rank, value in enumerate(values):
            if value is not None and value != values[first]:
                raise SynchronizationError(
                    f"expected the same {what} on all ranks, got {_short(values[first])} on rank {first} and "
                    f"{_short(value)} on rank {rank}: give every rank the same estimator and the same columns"
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


# --- statistics on their way ------------------------------------------------------------------------------------------


def _reduced(stats: Any, group: Any) -> Any:
    """The statistics of all ranks, merged in their order; None from a rank that has nothing."""
    rank, size, step = distributed.get_rank(group), distributed.get_world_size(group), 1
    while step < size:
        if rank % (2 * step) == step:
            _send(stats, rank - step, group)
            break
        if rank + step < size:
            other = _receive(rank + step, group)
            stats = other if stats is None else stats if other is None else stats.merge(other)
        step *= 2
    return _hand_out(stats, group)


class _Packer(pickle.Pickler):
    """Takes the tensors out of what it pickles: they travel as they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        """The number of a tensor, which stands for it."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.detach().contiguous())
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


def _packed(stats: Any) -> tuple[tuple[bytes, list[Any]], list[Tensor]]:
    """``stats`` without its tensors and the tensors' shapes and dtypes; and the tensors."""
    packer = _Packer(file := io.BytesIO())
    packer.dump(stats)
    return (file.getvalue(), [(tuple(t.shape), t.dtype) for t in packer.tensors]), packer.tensors


def _send(stats: Any, to: int, group: Any) -> None:
    described, tensors = _packed(stats)
    distributed.send_object_list([described], group_dst=to, group=group)
    for tensor in tensors:
        distributed.send(tensor.to(_device(group)), group_dst=to, group=group)


def _receive(source: int, group: Any) -> Any:
    described: list[Any] = [None]
    distributed.recv_object_list(described, group_src=source, group=group)
    data, shapes = described[0]
    tensors = [torch.empty(shape, dtype=dtype, device=_device(group)) for shape, dtype in shapes]
    for tensor in tensors:
        distributed.recv(tensor, group_src=source, group=group)
    return _Unpacker(data, [tensor.cpu() for tensor in tensors]).load()


def _hand_out(stats: Any, group: Any) -> Any:
    """Rank 0's statistics to all."""
    described, own = _packed(stats) if distributed.get_rank(group) == 0 else (None, None)
    told: list[Any] = [described]
    distributed.broadcast_object_list(told, group_src=0, group=group)
    data, shapes = told[0]
    tensors = []
    for number, (shape, dtype) in enumerate(shapes):
        device = _device(group)
        tensor = torch.empty(shape, dtype=dtype, device=device) if own is None else own[number].to(device)
        distributed.broadcast(tensor, group_src=0, group=group)
        tensors.append(tensor.cpu())
    return _Unpacker(data, tensors).load()
