"""Batch normalization over the batches of all processes of a group."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from batchnorm._errors import InputError, ShapeError, SynchronizationError
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNormLayer
from batchnorm.nn.twins import twin
from batchnorm.ops import collectives
from batchnorm.ops.functional import Activation, OnSingleValue


class SavedGroup(NamedTuple):
    """A process group as a pickled layer remembers it."""

    name: str
    ranks: tuple[int, ...]


class SyncBatchNorm(_BatchNormLayer):
    r"""Batch normalization over (N, C) or (N, C, \*spatial) input whose batch is spread over processes.

    .. math::
        y = \mathrm{activation}\left(\gamma \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta
            + \mathrm{residual}\right)

    with mean and biased var, per channel, over the parts that all processes of ``process_group`` have: in training each
    computes what one process with the whole batch would, its outputs, input gradients and running averages (with
    Bessel's correction for the whole count). Parts may be of different sizes or empty. The gradients of weight and bias
    are sums over the own part, which DistributedDataParallel and FSDP average. In eval, in a group of one, and where
    ``torch.distributed`` is not initialised, it is :class:`BatchNorm1d` for any rank of input and talks to nobody.

    It has the arguments of :class:`torch.nn.SyncBatchNorm`, in its order, and its ``state_dict``; it runs on every
    backend and device, gloo and CPU included. It is no instance of it: DistributedDataParallel refuses those on the
    CPU. Forward is one collective (all-gather of 2 C + 2 numbers) and backward another (all-reduce of 2 C); at the
    first forward of a layer one more makes sure that all processes have the same number of channels and the same dtype.

    All processes must call the layer, forward and backward, in the same order. One whose output no loss uses has no
    backward and lets the others wait: add ``0 * y.sum()`` to its loss.

    Args:
        num_features: C.
        eps: added to var, in units of x squared.
        momentum: the weight of the new value in the running averages; None for the cumulative average.
        affine: learn gamma (``weight``) and beta (``bias``).
        track_running_stats: keep running averages; without them, eval normalizes with this process's batch.
        process_group: whose processes share their statistics; None for all.
        bias, activation, decay, ddof, on_single_value, inference_weight: as in :class:`BatchNorm1d`. A single value per
            channel is what all processes have together.

    Shape: input, output and ``residual`` (N, C) or (N, C, \*spatial); ``mask`` (N, \*spatial), of the own part.

    Raises:
        SynchronizationError: (RuntimeError) the processes disagree in channels or dtype, or one does not answer within
            the group's timeout. In a compiled graph the latter is the backend's own error.
        ValueError, RuntimeError: as :class:`BatchNorm1d`.

    Source: Ioffe & Szegedy (2015), Algorithm 1, with the pooled statistics of :func:`batchnorm.moments.pooled`.
    """

    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        decay: float | None = None,
        ddof: int = 1,
        on_single_value: OnSingleValue = "raise",
        inference_weight: float = 0.0,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            decay=decay,
            ddof=ddof,
            on_single_value=on_single_value,
            inference_weight=inference_weight,
        )
        self.process_group = process_group
        self._agreed: collectives.Agreements = weakref.WeakKeyDictionary()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"expected at least 2D input (got {input.dim()}D input)")

    def _shares_with(self, input: Tensor) -> Any:
        # As in torch, an eval without running averages takes the batch of this process.
        group = self._group() if self.training else None
        peers = None if group is None else collectives.peers(group)
        if peers is not None:
            collectives.agree(input, peers, group, self._agreed)
        return group

    def _group(self) -> Any:
        """The group to share with, or None where there is none yet."""
        if not distributed.is_available() or not distributed.is_initialized():
            return None
        if self.process_group is None:
            return distributed.group.WORLD
        if isinstance(self.process_group, SavedGroup):
            found = found_group(self.process_group)
            if isinstance(found, SavedGroup):
                raise SynchronizationError(
                    f"expected the process group {found.name!r} of ranks {list(found.ranks)} that this layer was "
                    "saved with, got none like it here: set its process_group"
                )
            self.process_group = found
        return self.process_group

    def __getstate__(self) -> dict[str, Any]:
        """A process group is remembered by its name and ranks, here and in copies; what was agreed on is not."""
        state = self.__dict__.copy()
        del state["_agreed"]
        state["process_group"] = saved_group(self.process_group)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Finds the process group again where there is one of that name and those ranks."""
        super().__setstate__(state)
        self._agreed = weakref.WeakKeyDictionary()
        self.process_group = found_group(self.process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """``module`` with its batch norms, torch's and ours, made synchronised, or the one that takes its place.

        Parameters and buffers stay the same objects; activation, ddof and the like are kept, which
        ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` drops without a word. Hooks are not carried over. Raises
        InputError at a subclass whose ways are not known, and changes nothing then.
        """
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and type(layer) not in _KNOWN:
                raise InputError(
                    f"expected torch's or batchnorm's own layers to convert, got {type(layer).__name__} at {name!r}: "
                    "replace it by hand"
                )
        return _converted(module, process_group)


_KNOWN = (
    *(torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm),
)


def _converted(module: torch.nn.Module, process_group: Any) -> torch.nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _converted(child, process_group))
    if type(module) not in _KNOWN:
        return module
    assert isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    return twin(SyncBatchNorm, module, process_group=process_group)


def saved_group(group: Any) -> Any:
    """A process group as it can be copied and pickled; anything else as it is."""
    if distributed.is_available() and isinstance(group, distributed.ProcessGroup):
        return SavedGroup(group.group_name, tuple(distributed.get_process_group_ranks(group)))
    return group


def found_group(saved: Any) -> Any:
    """The group that was saved, or ``saved`` where there is none like it, or where it is no saved group."""
    if not isinstance(saved, SavedGroup) or not distributed.is_available() or not distributed.is_initialized():
        return saved
    resolve: Any = torch._C._distributed_c10d._resolve_process_group
    try:
        group = resolve(saved.name)
    except (RuntimeError, ValueError, KeyError):  # which one depends on the version
        return saved
    # Names are numbers in the order of making: the same one may mean other processes in another run.
    return group if tuple(distributed.get_process_group_ranks(group)) == saved.ranks else saved
