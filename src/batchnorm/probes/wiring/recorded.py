"""The wiring of what really ran: a model is run on an example, and each step noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from batchnorm.probes.feeding import ForwardFn, device_of, feed, on_device, undisturbed
from batchnorm.probes.wiring.steps import OUTSIDE, Made, Step, Wiring, fill_users, function_name, is_atomic, tensors

# Of these tensors they read no more than the shape: who calls them is no user of the values.
_LIKE_FIRST = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
)
_LIKE_FIRST |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "new_empty_strided"}
_LIKE_SECOND = frozenset({"reshape_as", "view_as", "expand_as", "type_as"})
# They give no tensor, but read values, by which Python can decide.
_READERS = frozenset({"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__contains__", "__array__"})
_READERS |= {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__dlpack__"}


class Recorder(TorchFunctionMode):
    """Runs a model and notes each step. Tensors are kept until the end: an id is then one tensor's alone."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix
        self.steps: list[Step] = []
        self.made: dict[int, int] = {}
        self.kept: list[Tensor] = []
        self.by_storage: dict[int, list[int]] = {}
        self.inside = 0
        named = [*model.named_parameters(), *model.named_buffers()]
        self.own = {id(tensor): prefix + name for name, tensor in named}

    def run(self, example: Any, forward_fn: ForwardFn | None) -> Wiring:
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model, training=False))
            for name, module in self.model.named_modules():
                if is_atomic(module):
                    stack.enter_context(self._hooked(self.prefix + name, module))
            example = on_device(example, device_of(self.model))  # not a step of the model
            with self:
                result = feed(self.model, example, forward_fn)
        outputs = frozenset(self.made[id(t)] for t in tensors(result) if id(t) in self.made)
        fill_users(self.steps)
        return Wiring(self.steps, outputs, exact=True)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return function(*args, **kwargs)
        name = function_name(function)
        step, given = self._begin((args, kwargs), _values_read(name, args, kwargs))
        step.function = function
        versions = [_version(tensor) for tensor in given]
        result = function(*args, **kwargs)
        made, overwritten = list(tensors(result)), _overwritten(given, versions)
        if made or overwritten or name in _READERS:
            step.reads = tuple(self.own[id(t)] for t in given if id(t) in self.own)
            step.passes = _passes(given, made, overwritten)
            self._end(step, made, overwritten)
        return result

    @contextmanager
    def _hooked(self, name: str, module: nn.Module) -> Iterator[None]:
        open_steps: list[tuple[Step, list[Tensor], list[int]]] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.inside:
                step, given = self._begin((args, kwargs))
                step.name, step.module = name, module
                open_steps.append((step, given, [_version(tensor) for tensor in given]))
            self.inside += 1

        def after(_: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
            self.inside -= 1
            if not self.inside:
                step, given, versions = open_steps.pop()
                made, overwritten = list(tensors(result)), _overwritten(given, versions)
                step.reads = tuple(self.own[id(t)] for t in given if id(t) in self.own)
                step.passes = _passes(given, made, overwritten)
                self._end(step, made, overwritten)

        handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, arguments: Any, read: Any = None) -> tuple[Step, list[Tensor]]:
        given = list(tensors(arguments))
        self.kept += given
        values = given if read is None else tensors(read)
        inputs = [self.made.get(id(tensor), OUTSIDE) for tensor in values if id(tensor) not in self.own]
        shape = tuple(given[0].shape) if given else None
        return Step(-1, inputs=inputs, input_shape=shape, arguments=self._known(arguments)), given

    def _known(self, arguments: Any) -> Any:
        try:
            return pytree.tree_map_only(Tensor, lambda tensor: Made(self.made.get(id(tensor), OUTSIDE)), arguments)
        except Exception:  # noqa: BLE001
            # Some containers accept tensors alone, as the PackedSequence of a recurrent layer does.
            return None

    def _end(self, step: Step, made: list[Tensor], overwritten: list[Tensor]) -> None:
        step.index = len(self.steps)
        step.output_shape = tuple(made[0].shape) if made else None
        self.steps.append(step)
        for tensor in overwritten:
            step.in_place = True
            # Whoever reads another view of this memory from now on reads what this step wrote.
            for other in self.by_storage.get(_storage(tensor), []):
                earlier = self.made[other]
                if earlier != step.index and earlier not in step.inputs:
                    step.inputs.append(earlier)
                self.made[other] = step.index
        for tensor in made:
            if id(tensor) in self.own:
                continue
            self.kept.append(tensor)
            if id(tensor) not in self.made:
                self.by_storage.setdefault(_storage(tensor), []).append(id(tensor))
            self.made[id(tensor)] = step.index


def _values_read(name: str, args: Any, kwargs: Any) -> Any:
    """Those of the arguments whose values a function reads."""
    if name in _LIKE_FIRST:
        return args[1:]
    return args[:1] if name in _LIKE_SECOND else (args, kwargs)


def _passes(given: list[Tensor], made: list[Tensor], overwritten: list[Tensor]) -> bool:
    return bool(given) and len(made) == 1 and made[0] is given[0] and not overwritten


def _overwritten(given: list[Tensor], versions: list[int]) -> list[Tensor]:
    return [tensor for tensor, version in zip(given, versions, strict=True) if _version(tensor) != version]


def _version(tensor: Tensor) -> int:
    # Parameters of a model that was made in inference mode do not count; nothing writes to them either.
    return -1 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a tensor without a storage, such as a sparse one, has no views
        return id(tensor)
