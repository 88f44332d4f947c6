"""Rules about which dimension of its input a batch norm takes for the channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from batchnorm.nn.recognition import is_batch_norm
from batchnorm.probes.health.passing import ACTIVATIONS, Convolution
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.subject import Failure, Subject
from batchnorm.probes.wiring import Step, Wiring, function_name

_KEEP = frozenset(
    (
        *ACTIVATIONS,
        *("dropout", "contiguous", "clone", "float", "half", "double", "to", "detach", "layer_norm", "clamp"),
        *("add", "add_", "sub", "mul", "div", "truediv", "__add__", "__mul__"),
    )
)


@rule("BN005", "channels-not-in-dimension-1", "error", needs="wiring")
def channels_elsewhere(subject: Subject) -> Iterator[Sign]:
    """A batch norm whose input has its channels in another dimension than 1, or does not fit it at all.

    torch's batch norms take (N, C, ...); a Linear layer gives (N, L, C), and so does all that comes from Keras or from
    ``permute(0, 2, 3, 1)``. Found on an example:

    - the example fails in a batch norm: the finding says what came and what was expected, in the place of an exception.
    - the channels of the last linear layer or convolution upstream, followed through permute, transpose, movedim,
      reshape and what works by element, are not in dimension 1. It runs because another dimension happens to have
      ``num_features`` too (error), or was declared instead (warning): positions are then normalized, over the channels.

    Remedy: ``x.transpose(1, 2)`` before and after, or ``x.flatten(0, 1)``; channels-last *memory* needs no permute:
    ``x.to(memory_format=torch.channels_last)``.

    False alarms: as a warning, positions that are to be normalized one by one on purpose (a batch norm over the nodes
    of a graph or the sensors of a series).
    """
    if subject.failure is not None:
        yield _stopped(subject.failure)
    if not subject.wiring.exact:
        return
    for layer in subject.layers:
        for step in subject.wiring.of(layer.module):
            source = subject.wiring.source(step)
            found = None if source is None else _channels(subject.wiring, source)
            shape, features = step.input_shape, getattr(layer.module, "num_features", None)
            if found is None or shape is None or found.dimension == 1 or found.dimension >= len(shape):
                continue
            declared = found.number != features
            yield Sign(
                layer.name,
                f"the {found.number} channels of {found.layer} are in dimension {found.dimension} of {shape}; "
                "dimension 1 is normalized"
                + (f", as num_features={features} declares" if declared else ", of the same size"),
                f"bring the channels to dimension 1 before it: x.movedim({found.dimension}, 1)",
                {"dimension": found.dimension, "channels": found.number, "shape": list(shape)},
                severity="warning" if declared else "error",
            )
            break


def _stopped(failure: Failure) -> Sign:
    module, shape = failure.layer.module, failure.shape
    features = getattr(module, "num_features", None)
    numbers: dict[str, Any] = {"num_features": features, "shape": None if shape is None else list(shape)}
    said = str(failure.error).strip().split("\n", 1)[0]
    remedy = "give it the number of channels that its input has in dimension 1, and the class for its rank"
    if shape is None:
        return Sign(failure.layer.name, f"the example fails here: {said}", remedy, numbers)
    message = f"the example fails here: got {shape}, expected {features} channels in dimension 1"
    if len(shape) > 1 and shape[1] == features:
        message = f"the example fails here: got {shape}: {said}"
    elif shape and shape[0] == features and f"(got {len(shape)}D input)" in said:
        remedy = "the dimension of samples is missing: give a batch (N, C, ...), of one sample x.unsqueeze(0)"
    elif features in shape[2:]:
        remedy = (
            f"bring the channels to dimension 1 before it: x.movedim({len(shape) - 1 - shape[::-1].index(features)}, 1)"
        )
    return Sign(failure.layer.name, message, remedy, numbers)


class _Channels(NamedTuple):
    dimension: int
    number: int
    layer: str


def _channels(wiring: Wiring, step: Step) -> _Channels | None:
    """Where the channels of the last layer upstream are in the output of ``step``; None where that is not known."""
    path: list[Step] = []
    current: Step | None = step
    while current is not None and not isinstance(current.module, nn.Linear | Convolution):
        if current.module is not None and not _keeps(current.module):
            return None
        path.append(current)
        current = wiring.source(current)
    if current is None or current.output_shape is None:
        return None
    shape = current.output_shape
    found = _made(current, shape)
    for later in reversed(path):
        if found is None or later.output_shape is None:
            return None
        found = _after(later, found, shape)
        shape = later.output_shape
    return found


def _made(step: Step, shape: tuple[int, ...]) -> _Channels | None:
    if isinstance(step.module, nn.Linear):
        return _Channels(len(shape) - 1, step.module.out_features, step.label)
    module = step.module
    if isinstance(module, Convolution):
        return _Channels(1 if len(shape) == len(module.kernel_size) + 2 else 0, module.out_channels, step.label)
    return None


def _keeps(module: nn.Module) -> bool:
    """Whether the dimensions come out as they went in, whatever they are."""
    return (
        isinstance(module, nn.Identity | nn.LayerNorm | nn.modules.dropout._DropoutNd)
        or is_batch_norm(module)
        or (type(module).__module__ == "torch.nn.modules.activation" and not module._modules)
    )


def _after(step: Step, before: _Channels, shape: tuple[int, ...]) -> _Channels | None:
    """Where the channels are after ``step``, whose input has ``shape``."""
    after = step.output_shape
    assert after is not None
    if step.module is not None:
        return before
    name = function_name(step.function)
    if name in _KEEP:
        same = after == shape
        return before if same else None
    order = _order(name, step.arguments or ((), {}), len(shape))
    if order is not None:
        return before._replace(dimension=order.index(before.dimension))
    if name in ("flatten", "reshape", "view"):
        dimension = before.dimension
        if after[: dimension + 1] == shape[: dimension + 1]:
            return before
        # Row-major: the last dimension stays whole where the sizes say so.
        if dimension == len(shape) - 1 and after and after[-1] == shape[-1]:
            return before._replace(dimension=len(after) - 1)
    return None


def _order(name: str, arguments: tuple[tuple[Any, ...], dict[str, Any]], rank: int) -> list[int] | None:
    """The dimensions of the input in the order of the output, for what reorders them; else None."""
    args, named = arguments
    order = list(range(rank))
    if name == "permute":
        dims = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:] or named.get("dims", ())
        if sorted(d % rank for d in dims if isinstance(d, int)) != order:
            return None
        return [d % rank for d in dims]
    if name in ("transpose", "swapaxes", "swapdims", "transpose_"):
        found = [*args[1:], *named.values()]
        if len(found) != 2 or not all(isinstance(d, int) for d in found):
            return None
        first, second = (d % rank for d in found)
        order[first], order[second] = order[second], order[first]
        return order
    if name in ("movedim", "moveaxis"):
        found = [*args[1:], *named.values()]
        if len(found) != 2 or not all(isinstance(d, int) for d in found):
            return None
        source, target = (d % rank for d in found)
        order.remove(source)
        order.insert(target, source)
        return order
    return None
