"""Programs of torch.export: the same plan over a graph of operators, and numbers in a state that the graph names."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from batchnorm._errors import SurgeryError
from batchnorm.probes.wiring import Made, Step, Wiring, function_name
from batchnorm.probes.wiring.steps import OUTSIDE, fill_users
from batchnorm.surgery.folding.layers import border_of
from batchnorm.surgery.folding.norms import Affine, check_numbers, of_statistics
from batchnorm.surgery.folding.plan import Norm, Plan
from batchnorm.surgery.folding.taking import Left, Taker

_IN_EVAL = "_native_batch_norm_legit_no_training"
_NORMS = frozenset({"batch_norm", _IN_EVAL, "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
_TRAINING = frozenset({"_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_batch_norm_with_update"})
_TRAINING |= {"_batch_norm_with_update_functional"}
_CONVS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)) | {"convolution"}
_PRODUCTS = frozenset({"linear", "addmm", "mm"})
_PASSING = frozenset({"dropout", "feature_dropout", "alpha_dropout", "alias", "detach", "lift_fresh_copy"})


class ProgramEditor:
    """A copy of a program whose graph and numbers can be changed; ``program()`` makes a program of it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.given = program
        self.module = copy.deepcopy(program.graph_module)
        self.graph = self.module.graph
        self.signature = copy.deepcopy(program.graph_signature)
        # A copied graph gives some nodes other names.
        names = {old.name: new.name for old, new in zip(program.graph.nodes, self.graph.nodes, strict=True)}
        for spec in (*self.signature.input_specs, *self.signature.output_specs):
            if hasattr(spec.arg, "name"):
                spec.arg.name = names.get(spec.arg.name, spec.arg.name)
        self.state: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)
        self.paths = {spec.arg.name: spec.target for spec in self.signature.input_specs if spec.target is not None}
        self.nodes = [node for node in self.graph.nodes if node.op == "call_function"]
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.norms: dict[fx.Node, dict[str, Any]] = {}
        for node in self.nodes:
            name = function_name(node.target)
            if name in _TRAINING:
                raise _in_training(node)
            if name in _NORMS:
                self.norms[node] = bound(node)

    def wiring(self) -> Wiring:
        """Its operators as steps."""
        steps = [self._step(node) for node in self.nodes]
        fill_users(steps)
        (last,) = (node for node in self.graph.nodes if node.op == "output")
        return Wiring(steps, frozenset(self.index[n] for n in last.all_input_nodes if n in self.index), exact=True)

    def _step(self, node: fx.Node) -> Step:
        def made(each: fx.Node) -> Any:
            return Made(self.index.get(each, OUTSIDE))

        inputs = [self.index.get(each, OUTSIDE) for each in node.all_input_nodes if each.name not in self.paths]
        if node in self.norms:
            inputs = [self.index.get(self.norms[node]["input"], OUTSIDE)]
        elif self._is_tensor_of_norm(node):
            inputs = [self.index[node.all_input_nodes[0]]]
        step = Step(self.index[node], function=node.target, inputs=inputs)
        step.arguments = (fx.node.map_arg(node.args, made), fx.node.map_arg(node.kwargs, made))
        step.passes = self._is_tensor_of_norm(node) or function_name(node.target) in _PASSING
        step.output_shape, step.input_shape = _shape(node), _shape(node.all_input_nodes[0] if inputs else node)
        if node in self.norms:
            step.input_shape = _shape(self.norms[node]["input"])
        return step

    def _is_tensor_of_norm(self, node: fx.Node) -> bool:
        return bool(function_name(node.target) == "getitem" and node.args[0] in self.norms and node.args[1] == 0)

    def tensor(self, node: Any) -> Tensor | None:
        """The parameter, buffer or constant that a placeholder stands for."""
        if not isinstance(node, fx.Node) or node.name not in self.paths:
            return None
        path = self.paths[node.name]
        value = self.state.get(path, self.constants.get(path))
        return value if isinstance(value, Tensor) else None

    def put(self, node: fx.Node, value: Tensor) -> None:
        """New numbers for what a placeholder stands for."""
        path = self.paths[node.name]
        place = self.state if path in self.state else self.constants
        old = place[path]
        place[path] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value

    def add_bias(self, weight: fx.Node, value: Tensor) -> fx.Node:
        """A parameter beside ``weight``, as a new placeholder."""
        path = f"{self.paths[weight.name].rpartition('.')[0]}.bias".lstrip(".")
        while path in self.state or path in self.constants:
            path += "_folded"
        with self.graph.inserting_after(weight):
            node = self.graph.placeholder(f"p_{path.replace('.', '_')}")
        node.meta["val"] = weight.meta["val"].new_empty(value.shape)
        specs = self.signature.input_specs
        at = next(number for number, spec in enumerate(specs) if spec.arg.name == weight.name)
        specs.insert(at + 1, InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), path))
        self.paths[node.name] = path
        old = self.tensor(weight)
        self.state[path] = nn.Parameter(value, bool(old is not None and old.requires_grad))
        return node

    def remove(self, node: fx.Node) -> None:
        """Take a batch norm out: whoever read its output reads its input."""
        source = self.norms[node]["input"]
        outputs = [node] if function_name(node.target) != _IN_EVAL and not _is_tuple(node) else list(node.users)
        for output in outputs:
            output.replace_all_uses_with(source)
            for spec in self.signature.output_specs:
                if spec.arg.name == output.name:
                    spec.arg.name = source.name
            if output is not node:
                self.graph.erase_node(output)
        for each in self.norms.values():
            if each["input"] in outputs:
                each["input"] = source
        held = self.norms.pop(node)
        self.graph.erase_node(node)
        mean = self.paths[held["running_mean"].name]
        counter = f"{mean.rpartition('.')[0]}.num_batches_tracked".lstrip(".")
        for old in [each for each in self.graph.nodes if each.op == "placeholder" and not each.users]:
            if old in held.values() or self.paths.get(old.name) == counter:
                path = self.paths.pop(old.name)
                self.signature.input_specs = [s for s in self.signature.input_specs if s.arg.name != old.name]
                self.graph.erase_node(old)
                self.state.pop(path, None)
                self.constants.pop(path, None)

    def program(self) -> ExportedProgram:
        """What it is now."""
        self.graph.lint()
        self.module.recompile()
        return ExportedProgram(
            self.module,
            self.graph,
            self.signature,
            self.state,
            copy.copy(self.given.range_constraints),
            list(self.given.module_call_graph),
            self.given.example_inputs,
            self.constants,
            verifiers=self.given.verifiers,
        )


def plan_of(editor: ProgramEditor) -> Plan:
    """What there is to fold in a program."""
    wiring = editor.wiring()
    takers: dict[int, Taker] = {}
    for node in editor.nodes:
        taker = _taker(editor, node)
        if taker is not None:
            takers[editor.index[node]] = taker
    return Plan(wiring, takers, [_norm(editor, node, wiring) for node in list(editor.norms)])


def _norm(editor: ProgramEditor, node: fx.Node, wiring: Wiring) -> Norm:
    given = editor.norms[node]
    if given.get("training"):
        raise _in_training(node)
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (editor.tensor(given[key]) for key in keys)
    name = editor.paths[given["running_mean"].name].rpartition(".")[0] if mean is not None else node.name
    eps = float(given["eps"] if "eps" in given else given["epsilon"])
    call = wiring.steps[editor.index[node]]
    tensors = dict(zip(keys, (mean, var, weight, bias), strict=True))
    check_numbers(tensors, eps, f"{name} ({function_name(node.target)})")

    def affine() -> Affine:
        if mean is None or var is None or (weight is None) != (given["weight"] is None):
            raise Left("its numbers are not in the program's state")
        if (bias is None) != (given["bias"] is None):
            raise Left("its numbers are not in the program's state")
        return of_statistics(mean, var, weight, bias, eps)

    return Norm(name, function_name(node.target), [call], affine, True, lambda: editor.remove(node))


def _taker(editor: ProgramEditor, node: fx.Node) -> Taker | None:
    kind = function_name(node.target)
    if kind not in _CONVS | _PRODUCTS:
        return None
    given = bound(node)
    through = given["weight"] if "weight" in given else given["mat2"]
    held = through
    if kind in ("addmm", "mm"):
        held = _transposed(through)
    weight = editor.tensor(held)
    bias_node = given.get("bias") if kind != "addmm" else given["self"]
    bias = editor.tensor(bias_node)
    if weight is None or held is None or (bias_node is not None and bias is None):
        return None
    refusal = None
    if any(len(each.users) != 1 for each in (held, through, bias_node) if each is not None):
        refusal = "its parameters have other users"
    if kind == "addmm" and (given["beta"], given["alpha"]) != (1, 1):
        refusal = "it scales its product"
    groups, transposed, border = 1, False, None
    if kind in _CONVS:
        groups, transposed = given["groups"], given.get("transposed", kind.startswith("conv_transpose"))
        border = border_of(_convolution(given, tuple(weight.shape[2:]), transposed))

    def write(new: Tensor, offset: Tensor | None) -> None:
        editor.put(held, new)
        if offset is None:
            return
        current = bound(node).get("bias") if kind != "addmm" else bias_node
        if isinstance(current, fx.Node):
            editor.put(current, offset)
        elif kind == "mm":
            _add_to_product(node, editor.add_bias(held, offset))
        else:
            added = editor.add_bias(held, offset)
            names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
            values = bound(node) | {"bias": added}
            node.args = tuple(values[name] for name in names)
            node.kwargs = {}

    axis = -1 if kind in _PRODUCTS else 1 - weight.dim()
    name = editor.paths[held.name].rpartition(".")[0]
    return Taker(name, kind, weight, bias, groups, axis, border, refusal, write, transposed=transposed)


def _add_to_product(node: fx.Node, bias: fx.Node) -> None:
    node.args = (bias, *node.args)
    node.target = torch.ops.aten.addmm.default


def _transposed(node: Any) -> fx.Node | None:
    """The placeholder that ``node`` is the transpose of."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name, source = function_name(node.target), node.args[0]
    known = name in ("t", "numpy_T") or (name == "permute" and node.args[1] == [1, 0])
    known = known or (name == "transpose" and set(node.args[1:]) in ({0, 1}, {-1, -2}))
    return source if known and isinstance(source, fx.Node) else None


def _convolution(given: dict[str, Any], kernel: tuple[int, ...], transposed: bool) -> Any:
    def each(name: str) -> Any:
        value = given.get(name, 0)
        if isinstance(value, str):
            return value
        values = [value] if isinstance(value, int) else list(value)
        return values * len(kernel) if len(values) == 1 else values

    return SimpleNamespace(
        kernel_size=kernel,
        transposed=transposed,
        padding_mode="zeros",
        **{name: each(name) for name in ("stride", "padding", "dilation", "output_padding")},
    )


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by name, with the operator's defaults."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    values = {a.name: a.default_value if a.has_default_value() else None for a in arguments}
    values.update(zip([a.name for a in arguments], node.args, strict=False))
    return {**values, **node.kwargs}


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), tuple | list)


def _in_training(node: fx.Node) -> SurgeryError:
    if bound(node).get("running_mean") is None:
        return SurgeryError(
            f"expected batch norms with running statistics, got {node.name} without, which normalizes by its batch: "
            "there is no constant to fold"
        )
    return SurgeryError(f"expected a program of a model in eval mode, got {node.name} in training: export model.eval()")
