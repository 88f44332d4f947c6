"""What was done to a model, in words: every operation of this room says it, and it can be asked for later."""

from __future__ import annotations

import logging
import weakref
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from batchnorm.nn.recognition import unwrapped

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    Model = nn.Module | ExportedProgram

log = logging.getLogger("batchnorm.surgery")


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        layer: path of the module, ``""`` for the model itself.
        what: the change, as in ``"BatchNorm2d(64) became SyncBatchNorm(64)"``.
        lost: what could not be kept, or an empty string.
    """

    layer: str
    what: str
    lost: str = ""

    def __str__(self) -> str:
        lost = f" (lost: {self.lost})" if self.lost else ""
        return f"{self.layer or 'the model'}: {self.what}{lost}"


class Changes(tuple[Change, ...]):
    """Changes, oldest first. ``print()`` shows a line for each; ``changes.lost`` are those that lost something."""

    __slots__ = ()

    @property
    def lost(self) -> Changes:
        """Those that could not keep everything."""
        return Changes(change for change in self if change.lost)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain dictionaries, for JSON."""
        return [asdict(change) for change in self]

    def __str__(self) -> str:
        return "\n".join(str(change) for change in self) or "nothing was changed"


# Beside the models, not in them: a model that goes to a file or another process must not need this package there.
_history: weakref.WeakKeyDictionary[Model, list[tuple[str, Changes]]] = weakref.WeakKeyDictionary()


def changes(model: Model, last: bool = True) -> Changes:
    """What the package changed in ``model``, in this process.

    Args:
        model: what a function of :mod:`batchnorm.surgery` returned. torch.compile and the parallel wrappers around it
            make no difference.
        last: the latest operation alone; with False, all of them, oldest first.

    Returns:
        Empty where nothing was done. Of a copy nothing is known but what was done to it after it was made.
    """
    done = _history.get(_known_as(model), [])
    if last:
        done = done[-1:]
    return Changes(change for _, found in done for change in found)


def remember(model: Model, operation: str, found: list[Change], before: Model | None = None) -> Changes:
    """Keep what ``operation`` did, log it, and return it.

    Args:
        model: the root after the operation.
        operation: its name: ``"convert"``.
        found: what it did.
        before: the root that it was given, where that is another; its history goes on.
    """
    done, model = Changes(found), _known_as(model)
    before = None if before is None else _known_as(before)
    if before is not None and before is not model:
        _history[model] = list(_history.get(before, []))
    _history.setdefault(model, []).append((operation, done))
    for change in done:
        log.info("%s: %s", operation, change)
    return done


def stands_for(wrapper: nn.Module, model: nn.Module) -> None:
    """``wrapper`` holds ``model``: what is known of one, now and later, is known of the other."""
    _history[wrapper] = _history.setdefault(_known_as(model), [])


def _known_as(model: Model) -> Model:
    """Wrappers come and go: what is known is known of the model inside."""
    return unwrapped(model)[0] if isinstance(model, nn.Module) else model
