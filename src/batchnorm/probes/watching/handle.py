"""``bn.watch``: hooks on a model that now and then look at how its layers are doing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from batchnorm._checks import check_choice
from batchnorm._errors import InputError
from batchnorm.nn.recognition import unwrapped
from batchnorm.ops.averages import in_backward
from batchnorm.probes.feeding import probing
from batchnorm.probes.shift import shift
from batchnorm.probes.watching import out
from batchnorm.probes.watching.hooks import RootHook, passes_can_be_seen
from batchnorm.probes.watching.kinds import Kind, Parameters
from batchnorm.probes.watching.layers import Layers, chosen, flat_ends, is_rectifier
from batchnorm.probes.watching.looks import Look, Seeing, settle_looks

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Record = dict[str, Any]
Every = int | Callable[[int], bool]
MODES = ("train", "eval")
_PENDING = 2**21  # bytes of samples that may wait to be settled together


class Watch:
    """What :func:`watch` returns: a handle, and a context manager that calls :meth:`remove` at its end.

    Attributes:
        model: what is watched.
        units: at how many channels of a layer it looks, at most.
        step: the number of the pass to come, from 0. It may be set; a step that was looked at is not looked at again.
        unseen: why layers that were called in the last look could not be recorded, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        every: Every,
        layers: Layers,
        units: int | None,
        max_records: int,
        modes: tuple[str, ...],
        on_look: Callable[[Watch], object] | None,
        manual: bool,
    ) -> None:
        _check(every, units, max_records, modes)
        if not isinstance(model, nn.Module):
            raise InputError(f"expected a torch.nn.Module to watch, got {type(model).__name__}")
        if on_look is not None and not callable(on_look):
            raise InputError(f"expected on_look to be a function of the watch, got {on_look!r}")
        inner, _ = unwrapped(model)
        if isinstance(inner, torch.jit.ScriptModule):
            raise InputError("expected a model that runs in Python, got a scripted one: watch it before torch.jit")
        self.model, self.step = model, 0
        self.unseen: dict[str, str] = {}
        self._kinds = {layer.name: Kind(layer.name, layer.module) for layer in chosen(inner, layers)}
        self._parameters = Parameters(self._kinds.values())
        self._activations = [module for module in inner.modules() if is_rectifier(module) or flat_ends(module)]
        self._every, self.units, self._max, self._on_look = every, units, max_records, on_look
        self._modes = dict.fromkeys(modes, 0)  # how many passes there were of each
        self._counting = modes[0]
        self._looked_at: int | None = None  # the last step that was
        self._looks: list[Look] = []
        self._number, self._stride = 0, 1
        self._now: Look | None = None  # a pass under way that is looked at
        self._open: Look | None = None  # the last look, while its gradients may still come
        self._unsettled: list[Look] = []  # complete ones, of which samples are still to be made into numbers
        self._bytes = 0  # that those samples take
        self._armed = ExitStack()
        self._hooks: list[Any] = []
        if not manual:
            if getattr(model, "_compiled_call_impl", None) is not None:
                raise InputError(
                    "expected a model that is called through Python, got one compiled in place by model.compile(): "
                    "watch what torch.compile(model) returns instead"
                )
            self._hooks = [
                model.register_forward_pre_hook(RootHook(self, begins=True)),
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take all hooks off the model, which is then as it was. The records stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.end_step()
        self._complete()

    def begin_step(self, training: bool | None = None) -> None:
        """A pass begins; the layers' calls up to :meth:`end_step` belong to it. Only needed with ``manual=True``.

        Args:
            training: whether it is one of training; None asks the model.
        """
        if in_backward() or probing():  # a recomputation of what was seen already; passes that are not of the training
            return
        if self._now is not None:
            self._disarm()
        mode = "train" if (self.model.training if training is None else training) else "eval"
        if mode not in self._modes:
            return
        counts = mode == self._counting
        place = self.step if counts else self._modes[mode]
        self._modes[mode] += 1
        wanted = self._every(place) if callable(self._every) else place % self._every == 0
        if wanted and not (counts and self._looked_at == self.step):
            self._arm(Look(self.step, mode, self._number))
            if counts:
                self._looked_at = self.step
        if counts:
            self.step += 1

    def end_step(self, whole: bool = True) -> None:
        """The pass is over. Gradients that come afterwards still belong to it.

        Args:
            whole: False where it broke off: then it does not tell which activation follows a layer.
        """
        if not in_backward():
            self._disarm(whole)

    def _arm(self, look: Look) -> None:
        if not passes_can_be_seen(self._armed):
            return
        self._complete()
        self._now = look
        look.parameters = self._parameters.copy()
        hold = self._armed.callback
        for kind in self._kinds.values():
            see = Seeing(self, look, kind)
            if kind.overwrites and kind.module is not self.model:  # whose hooks before its pass are running already
                hold(kind.module.register_forward_pre_hook(see.before, with_kwargs=True).remove)
            hold(kind.module.register_forward_hook(see.after, with_kwargs=True).remove)
        if self._hooks:  # after those of the layers, of which the model may be one
            hold(self.model.register_forward_hook(RootHook(self, begins=False), always_call=True).remove)
        if not all(kind.followed for kind in self._kinds.values()):
            for module in self._activations:
                hold(module.register_forward_pre_hook(self._follow).remove)

    def _follow(self, follower: nn.Module, args: tuple[Any, ...]) -> None:
        if self._now is not None and args:
            for sight in reversed(self._now.sights.values()):
                if sight.see_follower(follower, args[0]):
                    return

    def gradient_came(self, look: Look, kind: Kind, gradient: Tensor) -> None:
        """Called by the hook on a layer's output."""
        if look is not self._open and look is not self._now:
            return
        look.sights[kind.name].see_gradient(gradient, self.units)
        look.waiting.pop(kind.name, None)
        if not look.waiting and not look.scheduled:
            # At the end of the backward pass, in which a user's function had better not run.
            look.scheduled = True
            torch.autograd.Variable._execution_engine.queue_callback(self._complete)

    def _disarm(self, whole: bool = False) -> None:
        self._armed.close()
        look, self._now = self._now, None
        if look is None:
            return
        self.unseen = {name: sight.unseen for name, sight in look.sights.items() if sight.unseen}
        look.sights = {name: sight for name, sight in look.sights.items() if not sight.unseen}
        if not look.sights:
            return
        for name, sight in look.sights.items():
            if whole and sight.output is not None:
                kind = self._kinds[name]
                kind.follower, kind.followed = sight.follower, True
        self._open = look
        self._keep(look)
        if not look.waiting:
            self._complete()

    def _keep(self, look: Look) -> None:
        """Add a look; when there are too many, every second goes, so that they stay spread over the whole run."""
        self._number += 1
        if self._looks and self._looks[-1].number % self._stride:
            self._looks.pop()  # was there only for being the latest
        self._looks.append(look)
        if len(self._looks) > self._max:
            self._stride *= 2
            self._looks = [each for each in self._looks if each.number % self._stride == 0 or each is look]

    def _complete(self) -> None:
        look, self._open = self._open, None
        if look is not None:
            look.release()
            self._unsettled.append(look)
            self._bytes += sum(sight.pending_bytes() for sight in look.sights.values())
            if self._bytes > _PENDING:
                settle_looks(self._unsettled)
                self._unsettled, self._bytes = [], 0
            if self._on_look is not None:
                self._on_look(self)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the watched layers, in the model's order; of a shared module the first."""
        return tuple(self._kinds)

    @property
    def last_step(self) -> int | None:
        """The step of the last look; None before the first."""
        return self._looks[-1].step if self._looks else None

    @property
    def records(self) -> list[Record]:
        """What was seen, one dictionary a layer and look, in the order of the looks. See docs/watch.md for the keys."""
        return [sight.record() for look in self._looks for sight in look.settled()]

    def latest(self, layer: str) -> Record:
        """The last record of a layer. Raises InputError where there is none."""
        for look in reversed(self._looks):
            if layer in look.sights:
                look.settled()
                return look.sights[layer].record()
        if layer not in self._kinds:
            raise InputError(f"expected a watched layer, got {layer!r}: one of {', '.join(map(repr, self._kinds))}")
        raise InputError(f"expected a look at {layer!r}, got none yet: {self.unseen.get(layer, 'it was not called')}")

    def shift(self, skip: int = 100) -> list[dict[str, Any]]:
        """How far the distributions moved: :func:`batchnorm.probes.shift.shift` of the records."""
        return shift(self.records, skip)

    def scalars(self, step: int | None = None) -> dict[str, float]:
        """The last look, or that of ``step``, as flat numbers by name (``"bn/<layer>/mean_gap_max"``).

        For ``wandb.log(watch.scalars())`` and ``mlflow.log_metrics``: names hold letters, digits, ``_ - . /`` and
        spaces only, values are finite. docs/watch.md lists the names.

        Raises:
            InputError: no look at ``step`` is kept.
        """
        looks = self._looks[-1:] if step is None else [look for look in self._looks if look.step == step]
        if step is not None and not looks:
            kept = ", ".join(str(look.step) for look in self._looks[-5:]) or "none"
            raise InputError(f"expected a step that is kept, got {step}: the last ones are {kept}")
        return out.scalars(self.layers, [sight for look in looks for sight in look.settled()])

    def to_tensorboard(self, writer: SummaryWriter) -> None:
        """Write every complete look that this writer has not had from here: scalars, and histograms over units."""
        complete = [look for look in self._looks if look is not self._open]
        out.to_tensorboard(self, writer, [(look.number, look.settled()) for look in complete])

    def save(self, path: str | Path) -> None:
        """Write the records, one JSON object a line; :func:`load_records` reads them. Raises OutputError."""
        out.save(self.records, path)

    def to_html(self, path: str | Path) -> None:
        """Write a page with the figures of the records. Raises MissingDependencyError, OutputError."""
        importlib.import_module("batchnorm.report.watch").write_watch_page(self.records, path)


def _check(every: Every, units: int | None, max_records: int, modes: tuple[str, ...]) -> None:
    """Raise an InputError unless these make sense."""
    if not callable(every) and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise InputError(f"expected every to be 1 or more, or a function of the step, got {every!r}")
    if units is not None and units < 1:
        raise InputError(f"expected units of 1 or more, or None for all, got {units}")
    if max_records < 2:
        raise InputError(f"expected max_records of 2 or more, got {max_records}")
    if isinstance(modes, str) or not modes:
        raise InputError(f"expected modes as a tuple of {' and '.join(map(repr, MODES))}, got {modes!r}")
    for mode in modes:
        check_choice("modes", mode, MODES)
