"""What the rules look at: a model, its batch norms, how they are connected, and what data went through them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn, optim
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from batchnorm.nn.recognition import Layer, batch_norms, unwrapped
from batchnorm.probes.feeding import ForwardFn
from batchnorm.probes.wiring import Wiring, trace

if TYPE_CHECKING:
    from batchnorm.probes.health.survey import Survey


@dataclass(frozen=True)
class Failure:
    """An example that did not get through a batch norm.

    Attributes:
        layer: the batch norm.
        shape: of the input that it was given; None where that was no tensor.
        error: what it said.
    """

    layer: Layer
    shape: tuple[int, ...] | None
    error: Exception


class Subject:
    """A model under examination. Nothing is computed before a rule asks for it.

    Attributes:
        root: what was given, inside its wrappers or not.
        model: the model inside torch.compile and the parallel wrappers.
        prefix: what the names of its modules begin with: ``"module."`` inside a parallel wrapper.
        example: a batch, or None.
        batches: data, or None.
        forward_fn: how the model takes a batch.
        groups: the parameter groups of what trains the model, all optimizers' in turn, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        example: Any = None,
        *,
        forward_fn: ForwardFn | None = None,
        optimizers: Iterable[optim.Optimizer] | None = None,
    ) -> None:
        self.root = model
        self.model, self.prefix = unwrapped(model)
        self.example = example
        self.batches = batches
        self.forward_fn = forward_fn
        self.groups = None if optimizers is None else [group for each in optimizers for group in each.param_groups]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The batch norms, those that are frozen by their class among them."""
        return tuple(
            Layer(tuple(self.prefix + name for name in layer.names), layer.module)
            for layer in batch_norms(self.model, frozen=True)
        )

    @cached_property
    def trained(self) -> tuple[Layer, ...]:
        """Batch norms that are not frozen by their class: torch's, ours and subclasses."""
        return tuple(
            Layer(tuple(self.prefix + name for name in layer.names), layer.module) for layer in batch_norms(self.model)
        )

    @property
    def wiring(self) -> Wiring:
        """What feeds what: exact with an example that the model takes, else as far as it can be read."""
        return self._traced[0]

    @property
    def failure(self) -> Failure | None:
        """Where the example did not get through a batch norm; None where it did, or there is none."""
        return self._traced[1]

    @property
    def cannot_run(self) -> str:
        """Why the model takes no batch; empty where it does, or that was not tried."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if any(is_lazy(tensor) for tensor in tensors):
            return "a model whose lazy layers have seen a batch"
        if any(tensor.device.type == "meta" for tensor in tensors):
            return "a model whose tensors hold data, not the meta device"
        if self.failure is not None:
            return f"a batch that gets through {self.failure.layer.name or 'the model'}"
        return ""

    @cached_property
    def cannot_trace(self) -> str:
        """Why the wiring cannot be seen at all; empty where it can."""
        if any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules()):
            return "a model in Python, without a ScriptModule in it"
        return ""

    @cached_property
    def _traced(self) -> tuple[Wiring, Failure | None]:
        if self.cannot_trace:
            return Wiring([], frozenset(), exact=False, whole=False), None
        tensors = [*self.model.parameters(), *self.model.buffers()]
        # To run a lazy model is to change it, and one without data does not run.
        if self.example is None or any(is_lazy(tensor) or tensor.device.type == "meta" for tensor in tensors):
            return trace(self.root), None
        inside: list[tuple[Layer, tuple[int, ...] | None]] = []
        with ExitStack() as stack:
            for layer in self.layers:
                for handle in _noting(layer, inside):
                    stack.callback(handle.remove)
            try:
                return trace(self.root, self.example, self.forward_fn), None
            except (RuntimeError, TypeError, ValueError) as error:
                if not inside or isinstance(error, torch.OutOfMemoryError):
                    raise
                failure = Failure(*inside[-1], error)
        return trace(self.root), failure

    @cached_property
    def survey(self) -> Survey:
        """What the batches showed."""
        from batchnorm.probes.health.survey import Survey

        assert self.batches is not None
        return Survey.take(self)


def _noting(
    layer: Layer, inside: list[tuple[Layer, tuple[int, ...] | None]]
) -> tuple[RemovableHandle, RemovableHandle]:
    """Hooks that keep in ``inside`` the batch norms that a forward is in at the moment: where it fails, the last."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        inside.append((layer, tuple(args[0].shape) if args and isinstance(args[0], Tensor) else None))

    def leave(_: nn.Module, _args: Any, _result: Any) -> None:
        inside.pop()

    return layer.module.register_forward_pre_hook(enter), layer.module.register_forward_hook(leave)
