"""Which channel of one layer is which of another, through whatever only rearranges tensors between them.

What lies between is run again on labels: a tensor that holds, in the place of each number, the label of its channel.
Where the labels come out whole, each number of the one layer is a number of the other; an average of equal labels is
that label again, and an average over zeros that a padding added is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.probes.wiring import OUTSIDE, Made, Step, Wiring, function_name
from batchnorm.surgery.folding.taking import Left

# Linear in their input, whatever the other arguments; the labels show what becomes of the channels.
_FUNCTIONS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias"}
)
_FUNCTIONS |= {
    "transpose",
    "permute",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "t",
    "T",
    "mT",
    "narrow",
    "select",
}
_FUNCTIONS |= {
    "_unsafe_view",
    "slice",
    "__getitem__",
    "getitem",
    "detach",
    "lift_fresh_copy",
    "channel_shuffle",
    "roll",
}
_FUNCTIONS |= {"cat", "concat", "concatenate", "pixel_shuffle", "pixel_unshuffle", "flip", "expand", "repeat"}
_FUNCTIONS |= {"pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "mean"}
_FUNCTIONS |= {"interpolate", "upsample_nearest2d", "upsample_bilinear2d"}
_FUNCTIONS |= {f"{kind}{n}d" for kind in ("avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)}
_MODULES: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Unflatten, nn.Upsample)
_MODULES += (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_MODULES += (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.CircularPad2d)
_MODULES += (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_MODULES += (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def rearranges(step: Step) -> bool:
    """Whether ``step`` is linear and known, so that labels tell what it does to channels."""
    if step.in_place:
        return False
    if step.passes:
        return True
    if step.module is not None:
        return type(step.module) in _MODULES
    return function_name(step.function) in _FUNCTIONS


def before(wiring: Wiring, step: Step, sources: set[int]) -> tuple[list[Step], list[Step]]:
    """The steps of ``sources`` that alone make the input of ``step``, and whom only it reads; and those between.

    Raises:
        Left: there is something else.
    """
    found, between = [], []

    def walk(index: int, reader: Step) -> None:
        if index == OUTSIDE:
            raise Left("its input is not from a layer of the model")
        here = wiring.steps[index]
        if wiring.sole_user(here) is not reader:
            others = list(dict.fromkeys(user.label for user in wiring.users(here) if user is not reader))
            if here.index in wiring.outputs:
                others.append("who runs the model")
            shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            raise Left(f"{here.label}, before it, is also read by {shown}")
        if index in sources:
            found.append(here)
        elif rearranges(here) and here.inputs:
            between.append(here)
            for each in dict.fromkeys(here.inputs):
                walk(each, here)
        else:
            raise Left(f"its input comes from {here.label}, which cannot take it up")

    if not step.inputs or not step.input_shape:
        raise Left("its input is not from a layer of the model")
    walk(step.inputs[0], step)
    return found, between


def behind(wiring: Wiring, step: Step, readers: set[int]) -> tuple[list[Step], list[Step]]:
    """The steps of ``readers`` that alone read the output of ``step``, and those between. Raises :class:`Left`."""
    found: dict[int, Step] = {}
    between: dict[int, Step] = {}

    def walk(here: Step) -> None:
        if here.index in wiring.outputs or here.index in wiring.open_ends:
            raise Left("its output is the model's")
        if not here.users:
            raise Left("nobody reads its output")
        for user in wiring.users(here):
            if user.index in readers and user.inputs == [here.index]:
                found[user.index] = user
            elif rearranges(user):
                between[user.index] = user
                walk(user)
            else:
                raise Left(f"its output goes to {user.label}, which cannot take it up")

    walk(step)
    return list(found.values()), list(between.values())


def labels(channels: int, first: int = 0) -> Tensor:
    """Numbers that stand for channels: ``first + 1`` and so on, each with a fraction of its own."""
    fractions = torch.rand(channels, generator=torch.Generator().manual_seed(first), dtype=torch.float64)
    return torch.arange(first + 1, first + channels + 1, dtype=torch.float64) + 0.1 + 0.5 * fractions


def spread(values: Tensor, shape: tuple[int, ...] | None, axis: int) -> Tensor:
    """A tensor of this shape that holds the labels along ``axis``."""
    if shape is None or not all(isinstance(size, int) for size in shape):
        raise Left("a shape that is not constant is in between")
    along = [1] * len(shape)
    along[axis] = -1
    return values.view(along).expand(shape)


def replay(wiring: Wiring, index: int, known: dict[int, Tensor]) -> Tensor:
    """The output of step ``index`` if the outputs of the steps in ``known`` were these."""
    if index in known:
        return known[index]
    if index == OUTSIDE:
        raise Left("its input is not from a layer of the model alone")
    step = wiring.steps[index]
    if step.passes:
        return replay(wiring, step.inputs[0], known)
    if step.arguments is None or not rearranges(step):
        raise Left(f"{step.label} is in between")
    positional, named = pytree.tree_map_only(Made, lambda made: replay(wiring, made.index, known), step.arguments)
    call: Any = step.function if step.module is None else step.module
    try:
        result = call(*positional, **named)
    except Exception as error:  # noqa: BLE001 - whatever a recorded call says to another tensor
        raise Left(f"{step.label} is in between and cannot be followed: {type(error).__name__}") from None
    if not isinstance(result, Tensor):
        raise Left(f"{step.label} is in between")
    return result


def which(found: Tensor, values: Tensor) -> Tensor:
    """The index of each of the labels ``found`` among ``values``. Raises :class:`Left` where one is another number."""
    first = float(values[0].floor())
    index = (found - first).floor().clamp(0, len(values) - 1).nan_to_num().long()
    if not torch.allclose(values[index], found, rtol=0, atol=1e-6):
        raise Left("what is between mixes its channels, or adds zeros to them")
    return index


def pairs(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """For ``rows`` (channels, numbers) of labels: channels and the indexes of the labels in them, each pair once."""
    number = len(values)
    both = (which(rows, values) + number * torch.arange(len(rows)).unsqueeze(1)).unique()
    return both // number, both % number
