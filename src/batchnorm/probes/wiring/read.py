"""The wiring of a model without an example: torch.fx reads its forward, or the forwards of its parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from batchnorm.probes.wiring.steps import OUTSIDE, Made, Step, Wiring, fill_users, is_atomic


class Reader:
    """Reads the forward with torch.fx, of the model or, where that fails, of its parts."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        # fx runs the Python of a forward, which may set attributes; parameters are shared, the rest is a copy.
        memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        try:
            self.copy: nn.Module | None = copy.deepcopy(model, memo)
        except Exception:  # noqa: BLE001 - a module that cannot be copied can still have its Sequentials read
            self.copy = None
        self.steps: list[Step] = []
        self.open_ends: set[int] = set()
        self.whole = True

    def wiring(self) -> Wiring:
        outputs = self._read("", self.model, self.copy, [OUTSIDE])
        fill_users(self.steps)
        known = frozenset(index for index in outputs if index != OUTSIDE)
        return Wiring(self.steps, known, exact=False, whole=self.whole, open_ends=frozenset(self.open_ends))

    def _read(self, name: str, module: nn.Module, twin: nn.Module | None, inputs: list[int]) -> list[int]:
        """Add the steps of ``module``, given the steps that its arguments come from; return those of its results."""
        if is_atomic(module):
            step = Step(len(self.steps), self.prefix + name, module, inputs=list(inputs))
            self.steps.append(step)
            return [step.index]
        graph = None if twin is None else _graph(twin)
        if graph is not None:
            return self._follow(graph, name, inputs)
        if isinstance(module, nn.Sequential):
            for key, child in module.named_children():
                inputs = self._read(_join(name, key), child, getattr(twin, key, None), inputs)
            return inputs
        # Each child by itself: what comes into it and where its results go is not known.
        self.whole = False
        for key, child in module.named_children():
            containers = isinstance(child, nn.ModuleList | nn.ModuleDict)
            below = child.named_children() if containers else [("", child)]
            for inner_key, inner in below:
                path = _join(_join(name, key), inner_key)
                twin_part = None if twin is None else twin.get_submodule(_join(key, inner_key))
                self.open_ends.update(self._read(path, inner, twin_part, [OUTSIDE]))
        self.open_ends.discard(OUTSIDE)
        return [OUTSIDE]

    def _follow(self, graph: fx.Graph, name: str, inputs: list[int]) -> list[int]:
        made: dict[fx.Node, list[int]] = {}
        given = iter([*inputs])
        for node in graph.nodes:
            before = [index for source in node.all_input_nodes for index in made[source]]
            if node.op == "placeholder":
                made[node] = [next(given, OUTSIDE)]
            elif node.op == "get_attr":
                made[node] = []
            elif node.op == "output":
                return before
            elif node.op == "call_module":
                path = _join(name, str(node.target))
                made[node] = self._read(path, self.model.get_submodule(path), None, before)
            else:
                ordered = [index for argument in _nodes((node.args, node.kwargs)) for index in made[argument]]
                reads = [s for s in node.all_input_nodes if s.op == "get_attr"]
                step = Step(
                    len(self.steps),
                    function=node.target,
                    inputs=ordered,
                    reads=tuple(self.prefix + _join(name, str(source.target)) for source in reads),
                    arguments=_arguments(node, made),
                )
                self.steps.append(step)
                made[node] = [step.index]
        return []


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - fx's signature
        return is_atomic(m)


def _graph(module: nn.Module) -> fx.Graph | None:
    try:
        return _Tracer().trace(module)
    except Exception:  # noqa: BLE001 - the forward is a stranger's Python: any reason that fx cannot read it will do
        return None


def _arguments(node: fx.Node, made: dict[fx.Node, list[int]]) -> Any:
    """What the node's function is called with, see :class:`Step`; a part's results count by the first."""

    def place(source: fx.Node) -> Any:
        return Made((made[source] or [OUTSIDE])[0])

    return fx.node.map_arg((node.args, dict(node.kwargs)), place)


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    collect: Callable[[fx.Node], None] = found.append
    fx.node.map_arg(values, collect)
    return found


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)
