"""Which layers must have their statistics before others can be measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm.nn.recognition import Layer
from batchnorm.probes.feeding import ForwardFn
from batchnorm.probes.wiring import OUTSIDE, trace


def groups(model: nn.Module, example: Any, forward_fn: ForwardFn | None, layers: list[Layer]) -> list[list[str]]:
    """The names of ``layers`` that ``example`` reaches, in groups: what feeds a layer is in a group before it.

    Layers that feed each other, by being called several times, stand where the first of them is called.
    """
    steps = trace(model, example, forward_fn).steps
    names = {layer.module: layer.name for layer in layers}
    above: list[frozenset[str]] = []  # the layers that each step's output depends on
    needed: dict[str, frozenset[str]] = {}
    for step in steps:
        sources = frozenset[str]().union(*(above[index] for index in step.inputs if index != OUTSIDE))
        name = names.get(step.module) if step.module is not None else None
        if name is not None:
            needed[name] = needed.get(name, frozenset()) | sources
            sources |= {name}
        above.append(sources)
    found: list[list[str]] = []
    done: frozenset[str] = frozenset()
    while len(done) < len(needed):
        waiting = {name: sources - done - {name} for name, sources in needed.items() if name not in done}
        ready = [name for name, sources in waiting.items() if not sources] or [next(iter(waiting))]
        found.append(ready)
        done |= frozenset(ready)
    return found
