"""What the processes of a group tell each other: gathered vectors, sums, and whether they are at the same thing.

Every collective is a functional one (``torch.ops._c10d_functional``): a value in, a value out, so that torch.compile
traces it. :func:`gather` and :func:`add_up` are differentiable to any order and pass through ``torch.func``; as
everywhere in torch.distributed, what is differentiated is the sum of all processes' losses.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from batchnorm._errors import InputError, SynchronizationError
from batchnorm.ops import reference

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# For each process group the numbers of channels that its processes have agreed on. It knows the group itself and not
# its name: one that was destroyed and made anew, perhaps with other processes, has to agree again.
Agreements = weakref.WeakKeyDictionary[Any, set[int]]

_agreed: Agreements = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Peers:
    """A process group of more than one process, as the collectives name it."""

    name: str
    size: int
    rank: int


def peers(group: Any) -> Peers | None:
    """The processes of ``group``, or None where there is nobody to talk to.

    Raises InputError where this process is not one of them.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    size = distributed.get_world_size(group)
    if size == 1:
        return None
    if size < 1:
        raise InputError("expected a process group that this process belongs to, got one of other processes")
    return Peers(group.group_name, size, distributed.get_rank(group))


def signature(x: Tensor) -> int:
    """The number of channels and the dtype of x as one number, exact in every float type that travels."""
    return x.size(1) * len(_DTYPES) + _DTYPES.index(x.dtype)


def check_signatures(x: Tensor, received: Tensor) -> None:
    """Raise a SynchronizationError where a process has sent another signature than this one."""
    own = signature(x)
    found = received.tolist()
    if any(other != own for other in found):
        told = ", ".join(f"{_described(other)} on rank {rank}" for rank, other in enumerate(found))
        raise SynchronizationError(
            "expected the same number of channels and the same dtype on all ranks of the process group, "
            f"got {told}: give every rank the same model, and autocast on all or none"
        )


def agree(x: Tensor, peers: Peers, group: Any, before: Agreements = _agreed) -> None:
    """Make sure, once for each number of channels, that all processes have that number.

    The vectors that are gathered afterwards are as long as there are channels, and a backend to which processes give
    different lengths stops the program, hangs, or hands out memory that nobody wrote. So the first time a single number
    is exchanged, which is as long everywhere. ``before`` is what is known already; a layer has its own, so that it asks
    at its own first use. Nothing is exchanged in what is traced or transformed, or on the meta device.
    """
    if torch.compiler.is_compiling() or reference.composing() or x.is_meta:
        return
    if x.size(1) in before.get(group, ()):
        return
    own = torch.full((1,), signature(x), dtype=torch.float32, device=x.device)
    check_signatures(x, all_gather(own, peers).reshape(-1))
    for known in (before, _agreed):
        known.setdefault(group, set()).add(x.size(1))


def all_gather(vector: Tensor, peers: Peers) -> Tensor:
    """(size, *): what each process has given."""
    collectives = torch.ops._c10d_functional
    try:
        gathered = collectives.all_gather_into_tensor(vector.contiguous(), peers.size, peers.name)
        gathered = collectives.wait_tensor(gathered)
    except RuntimeError as error:
        raise _failed("gather", peers, error) from error
    return gathered.reshape(peers.size, *vector.shape)


def all_reduce(vector: Tensor, peers: Peers) -> Tensor:
    """The sum of what all processes have given."""
    collectives = torch.ops._c10d_functional
    try:
        return collectives.wait_tensor(collectives.all_reduce(vector.contiguous(), "sum", peers.name))
    except RuntimeError as error:
        raise _failed("add up", peers, error) from error


def gather(vector: Tensor, peers: Peers) -> Tensor:
    """:func:`all_gather` with derivatives."""
    if torch.compiler.is_compiling():  # which does not trace a function with rules for torch.func; this it does
        from torch.distributed._functional_collectives import all_gather_tensor_autograd

        name: Any = peers.name
        gathered = all_gather_tensor_autograd(vector.contiguous(), 0, name)
        return gathered.reshape(peers.size, *vector.shape)
    return _Gather.apply(vector, peers)


def add_up(vector: Tensor, peers: Peers) -> Tensor:
    """:func:`all_reduce` with derivatives."""
    return _Sum.apply(vector, peers)


class _Collective(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        _, ctx.peers = inputs


class _Gather(_Collective):
    @staticmethod
    def forward(vector: Tensor, peers: Peers) -> Tensor:
        return all_gather(vector, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.peers)[ctx.peers.rank], None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return gather(tangent, ctx.peers)

    @staticmethod
    def vmap(_info: Any, in_dims: tuple[int, None], vector: Tensor, peers: Peers) -> tuple[Tensor, int]:
        return gather(vector.movedim(in_dims[0], 0), peers), 1


class _Sum(_Collective):
    @staticmethod
    def forward(vector: Tensor, peers: Peers) -> Tensor:
        return all_reduce(vector, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad, ctx.peers), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return add_up(tangent, ctx.peers)

    @staticmethod
    def vmap(_info: Any, in_dims: tuple[int, None], vector: Tensor, peers: Peers) -> tuple[Tensor, int]:
        return add_up(vector.movedim(in_dims[0], 0), peers), 0


def _described(number: float) -> str:
    channels, index = divmod(int(number), len(_DTYPES))
    return f"{channels} channels of {str(_DTYPES[index]).removeprefix('torch.')}"


def _failed(what: str, peers: Peers, error: RuntimeError) -> SynchronizationError:
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return SynchronizationError(
        f"expected all {peers.size} ranks of process group {peers.name!r} to {what} batch-norm statistics with rank "
        f"{peers.rank}, got {cause!r}: see whether a rank has died or raised, or has left out this layer or its "
        "backward (an output that no loss uses: add 0 * output.sum() to the loss)"
    )
