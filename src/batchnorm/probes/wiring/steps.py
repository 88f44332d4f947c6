"""The steps of a forward pass, and which of them read what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from batchnorm.nn.recognition import is_batch_norm, is_frozen

OUTSIDE = -1
"""Stands for what no step made: the model's input, a constant, or, in a part that could not be traced, anything."""


@dataclass(frozen=True)
class Made:
    """Stands in :attr:`Step.arguments` for the output of step ``index``; :data:`OUTSIDE` for another tensor."""

    index: int


@dataclass
class Step:
    """One call of an atomic module, or of a function between modules.

    Attributes:
        index: its place in the order of execution.
        name: the module's (first) path; None for a function.
        module: the module itself; None for a function.
        function: what was called, for a function: ``torch.cat``, ``Tensor.add``, ``torch.nn.functional.relu``.
        inputs: the steps whose outputs it reads, in the order of the arguments, repeated where one is read twice;
            :data:`OUTSIDE` for what no step made.
        users: the steps that read its output, ascending.
        reads: paths of parameters and buffers that a function reads by itself, or that a module is called with.
        output_shape: of its (first) output tensor; None where it is not known.
        input_shape: of its first input tensor.
        in_place: whether it overwrites its input, or another step's output through a view.
        passes: whether it gave its first input back as it came: an Identity, a Dropout in eval. Only known of a run.
        arguments: what it was called with, positional and named, with :class:`Made` for tensors; None where not known.
    """

    index: int
    name: str | None = None
    module: nn.Module | None = None
    function: Any = None
    inputs: list[int] = field(default_factory=list)
    users: list[int] = field(default_factory=list)
    reads: tuple[str, ...] = ()
    output_shape: tuple[int, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    in_place: bool = False
    passes: bool = False
    arguments: Any = None

    @property
    def label(self) -> str:
        """For messages: the path, or the function's name."""
        return self.name if self.name is not None else function_name(self.function)


@dataclass
class Wiring:
    """The steps of a forward pass.

    Attributes:
        steps: in the order of execution.
        outputs: those whose results the model returns.
        exact: whether this is what really ran (a recorded run on an example). Otherwise it is torch.fx's reading.
        whole: whether all of the model was traced. Where not, some parts are missing, and a step's users are known
            only within its part: see ``open_ends``.
        open_ends: steps whose output leaves a part that was traced by itself; they may have users that are not known.
    """

    steps: list[Step]
    outputs: frozenset[int]
    exact: bool
    whole: bool = True
    open_ends: frozenset[int] = frozenset()

    def of(self, module: nn.Module) -> list[Step]:
        """The calls of ``module``."""
        return [step for step in self.steps if step.module is module]

    def sources(self, step: Step) -> list[Step | None]:
        """The steps that ``step`` reads; None for :data:`OUTSIDE`."""
        return [None if index == OUTSIDE else self.steps[index] for index in step.inputs]

    def source(self, step: Step) -> Step | None:
        """The step whose output is the first argument of ``step``."""
        return self.steps[step.inputs[0]] if step.inputs and step.inputs[0] != OUTSIDE else None

    def users(self, step: Step) -> list[Step]:
        """The steps that read the output of ``step``."""
        return [self.steps[index] for index in step.users]

    def sole_user(self, step: Step) -> Step | None:
        """The only reader of ``step``; None where there are more or fewer, the model returns it, or it is not known."""
        if step.index in self.outputs or step.index in self.open_ends or len(step.users) != 1:
            return None
        return self.steps[step.users[0]]


def function_name(function: Any) -> str:
    """``relu`` for ``torch.nn.functional.relu``, ``Tensor.relu`` and ``aten.relu.default``."""
    if isinstance(function, str):
        return function
    name = getattr(function, "__name__", None) or str(function)
    if name == "__get__":  # a property of a tensor, such as .T
        return getattr(getattr(function, "__self__", None), "__name__", name)
    return name.split(".")[0]


def is_atomic(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one step: a layer, as opposed to what is made of layers."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict | fx.GraphModule):
        return False
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return False
    return (
        is_batch_norm(module)
        or is_frozen(module)
        or not module._modules
        or type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.", "batchnorm.nn."))
    )


def fill_users(steps: list[Step]) -> None:
    """Note at each step who reads it."""
    for step in steps:
        for index in dict.fromkeys(step.inputs):
            if index != OUTSIDE:
                steps[index].users.append(step.index)


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results, dataclasses among them."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for each in fields(leaf):
                yield from tensors(getattr(leaf, each.name, None))
