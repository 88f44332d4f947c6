"""One pass that is looked at, and the hooks of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from batchnorm.ops.averages import in_backward
from batchnorm.probes.watching.kinds import Copies, Kind
from batchnorm.probes.watching.sight import Sight, settle_all

if TYPE_CHECKING:
    from batchnorm.probes.watching.handle import Watch


class Look:
    """One pass that is looked at: a sight of each layer that was called, and the hooks that are still out."""

    def __init__(self, step: int, mode: str, number: int) -> None:
        self.step, self.mode, self.number = step, mode, number
        self.sights: dict[str, Sight] = {}
        self.parameters: Copies | None = None
        self.waiting: dict[str, Any] = {}  # for gradients: handles of hooks on outputs
        self.scheduled = False

    def settled(self) -> list[Sight]:
        """The sights, with their numbers as far as they are known."""
        settle_looks([self])
        return [*self.sights.values()]

    def release(self) -> None:
        """Wait for no gradient any more."""
        for handle in self.waiting.values():
            handle.remove()
        self.waiting.clear()


def settle_looks(looks: Iterable[Look]) -> None:
    """Make numbers of what the looks took of tensors: many at a time cost little more than one."""
    sights: list[Sight] = []
    for look in looks:
        if look.parameters is not None:
            for name, held in look.parameters.read().items():
                if name in look.sights:
                    look.sights[name].hold(held)
            look.parameters = None
        sights += look.sights.values()
    settle_all(sights)


class Seeing:
    """The hooks of one layer in one look: its first call of the pass is what counts."""

    def __init__(self, watch: Watch, look: Look, kind: Kind) -> None:
        self.watch, self.look, self.kind = watch, look, kind

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks at what goes in: before the layer runs only if it may overwrite that."""
        if self.kind.name not in self.look.sights and not in_backward():
            sight = self.look.sights[self.kind.name] = Sight(self.look.step, self.look.mode, self.kind)
            sight.see_input(args, kwargs, self.watch.units)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Looks at what came out, and asks for its gradient."""
        self.before(module, args, kwargs)
        sight, name = self.look.sights.get(self.kind.name), self.kind.name
        if sight is None or sight.output is not None or in_backward():
            return
        y = sight.see_output(output, self.watch.units)
        if y is not None:
            self.look.waiting[name] = y.register_hook(partial(self.watch.gradient_came, self.look, self.kind))
