"""What the rules look at: a model, its batch norms, how they are connected, and what data went through them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn, optim

from batchnorm.nn.recognition import Layer, batch_norms, unwrapped
from batchnorm.probes.feeding import ForwardFn
from batchnorm.probes.wiring import Wiring, trace

if TYPE_CHECKING:
    from batchnorm.probes.health.survey import Survey


class Subject:
    """A model under examination. Nothing is computed before a rule asks for it.

    Attributes:
        root: what was given, inside its wrappers or not.
        model: the model inside torch.compile and the parallel wrappers.
        prefix: what the names of its modules begin with: ``"module."`` inside a parallel wrapper.
        example: a batch, or None.
        batches: data, or None.
        forward_fn: how the model takes a batch.
        optimizer: that which trains the model, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        example: Any = None,
        *,
        forward_fn: ForwardFn | None = None,
        optimizer: optim.Optimizer | None = None,
    ) -> None:
        self.root = model
        self.model, self.prefix = unwrapped(model)
        self.example = example
        self.batches = batches
        self.forward_fn = forward_fn
        self.optimizer = optimizer

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

    @cached_property
    def wiring(self) -> Wiring:
        """What feeds what: exact with an example, else as far as it can be read."""
        return trace(self.root, self.example, self.forward_fn)

    @cached_property
    def survey(self) -> Survey:
        """What the batches showed."""
        from batchnorm.probes.health.survey import Survey

        assert self.batches is not None
        return Survey.take(self)
