"""The loss around a network: how much it varies along the gradient, how much the gradient does, and Santurkar's shift.

Santurkar, Tsipras, Ilyas & Madry 2018, "How Does Batch Normalization Help Optimization?", sections 2.2 and 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from batchnorm._errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from batchnorm.probes.descent import Group
    from batchnorm.probes.feeding import ForwardFn

FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Steps in learning rates: from half to four times, the range that the paper takes for its VGG net."""


@dataclass(frozen=True)
class LayerShift:
    """Internal covariate shift of one layer as a change of its gradient (definition 2.1 of the paper).

    Attributes:
        layer: path of the module.
        gradient_norm: ``||G||``, of the layer's parameters where all parameters are as they are.
        distance: ``||G - G'||``, where G' is the same after every layer before it took its step of gradient descent.
        cosine: of the angle between G and G'; None where one of them is zero or not finite.
    """

    layer: str
    gradient_norm: float
    distance: float
    cosine: float | None


@dataclass(frozen=True)
class Landscape:
    """What was found around the parameters theta with gradient g, on one batch.

    Norms are Euclidean, over all parameters that require a gradient. Where the loss or a gradient is NaN or infinite,
    distances and ranges that need it are infinite.

    Attributes:
        loss: at theta.
        gradient_norm: ``||g||``.
        steps: the lengths eta of the steps ``theta - eta g``, in units of the gradient, as learning rates are.
        losses: the loss after each.
        gradient_changes: ``||g(theta - eta g) - g(theta)||`` after each.
        distances: ``||eta g||``, the way in the space of parameters, as their dtype rounds it.
        shifts: of the layers asked for, first to last.
        forwards: forward passes that this took.
        backwards: backward passes that this took.
    """

    loss: float
    gradient_norm: float
    steps: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_changes: tuple[float, ...]
    distances: tuple[float, ...]
    shifts: tuple[LayerShift, ...] = field(repr=False)
    forwards: int
    backwards: int

    @property
    def loss_range(self) -> tuple[float, float]:
        """Least and largest loss along the gradient (the paper's figure 4a)."""
        return _ends(self.losses)

    @property
    def gradient_range(self) -> tuple[float, float]:
        """Least and largest change of the gradient along it: its predictiveness (figure 4b). Less is better."""
        return _ends(self.gradient_changes)

    @property
    def smoothness(self) -> float | None:
        """``max ||g(theta') - g(theta)|| / ||theta' - theta||``: the "effective" beta of beta-smoothness (figure 4c).

        None where no step moved a parameter.
        """
        ratios = [change / way for change, way in zip(self.gradient_changes, self.distances, strict=True) if way > 0.0]
        return max(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """Flat numbers by name, as loggers take them: ``loss_min``, ``shift/<layer>/distance``, ..."""
        (low, high), (least, most) = self.loss_range, self.gradient_range
        numbers: dict[str, Any] = {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "loss_min": low,
            "loss_max": high,
            "gradient_change_min": least,
            "gradient_change_max": most,
            "smoothness": self.smoothness,
            "forwards": self.forwards,
            "backwards": self.backwards,
        }
        for shift in self.shifts:
            for name in ("gradient_norm", "distance", "cosine"):
                numbers[f"shift/{shift.layer}/{name}"] = getattr(shift, name)
        return numbers


def landscape(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    learning_rate: float,
    factors: Sequence[float] = FACTORS,
    layers: int | Sequence[str] = 4,
    forward_fn: ForwardFn | None = None,
) -> Landscape:
    """Look at the loss around the parameters of ``model``, on one batch, and leave everything as it was.

    With theta all parameters that require a gradient, g the gradient of the loss there, and eta = ``learning_rate``
    times each of ``factors``:

    - the loss at ``theta - eta g``, whose range is :attr:`Landscape.loss_range`,
    - ``||g(theta - eta g) - g(theta)||``, see :attr:`Landscape.gradient_range` and :attr:`Landscape.smoothness`,
    - for each of ``layers``, ``||G - G'||`` and the cosine, see :class:`LayerShift`: how much the step of the layers
      before a layer changes what it has to do.

    Every pass begins with the same buffers and the same random state (torch's), so that the loss is a function of the
    parameters alone, dropout and running statistics included. Modes stay as they are: in training a batch norm is part
    of the function by its batch's statistics, and that is what the paper looks at. Parameters (bit by bit), ``.grad``,
    buffers, modes and random state are afterwards what they were, also where a pass fails.

    The cost is ``1 + len(factors) + layers`` forward and as many backward passes, 9 of each by default, and the memory
    of three copies of the parameters; what was spent is in the result.

    Args:
        model: any module; looked at without its parallel wrapper, so that each process sees its own batch's loss.
        batch: as in training: a tuple or list is (inputs, targets), a mapping is ``model(**batch)``.
        loss_fn: ``loss_fn(output, targets) -> scalar``, as ``nn.CrossEntropyLoss()`` is; of a batch that is not
            (inputs, targets) it is given the batch itself in the place of targets.
        learning_rate: length of the step that training takes. For optimizers other than plain gradient descent the
            direction is not the one that they take.
        factors: lengths of the steps to look at, in learning rates.
        layers: names of modules with parameters of their own; or how many of those with weights of two dimensions or
            more (linear layers, convolutions), evenly from the second to the last. 0: none. Layers are ordered by their
            first call in the forward pass, and those called earlier are "before". A container that holds parameters
            itself is called before what it contains.
        forward_fn: ``forward_fn(model, batch)`` runs the model on batches of another kind.

    Raises:
        InputError: no parameter requires a gradient; the loss is not a scalar or does not depend on them; a learning
            rate or factor is not positive and finite; an unknown layer.
    """
    from batchnorm.nn.recognition import unwrapped
    from batchnorm.probes import descent

    steps = _steps(learning_rate, factors)
    with descent.explored(unwrapped(model)[0], batch, loss_fn, forward_fn) as passes:
        loss, gradient = passes.first()
        chosen = _chosen(passes.groups, layers)
        losses, changes, ways = [], [], []
        for eta in steps:
            ways.append(passes.step(gradient, eta, range(len(gradient))))
            after, there = passes.run()
            losses.append(after)
            changes.append(descent.distance(there, gradient))
        shifts = []
        for place in chosen:
            group = passes.groups[place]
            before = [index for earlier in passes.groups[:place] for index in earlier.members]
            passes.step(gradient, learning_rate, before)
            _, there = passes.run(group.members)
            shifts.append(_shift(group.layer, [gradient[index] for index in group.members], there))
    return Landscape(
        loss,
        descent.norm(gradient),
        steps,
        tuple(losses),
        tuple(changes),
        tuple(ways),
        tuple(shifts),
        passes.forwards,
        passes.backwards,
    )


def _chosen(groups: Sequence[Group], layers: int | Sequence[str]) -> list[int]:
    if isinstance(layers, int):
        if layers < 0:
            raise InputError(f"expected layers to be names or how many, 0 or more, got {layers}")
        # Before the first layer nothing changes; most lies before the last, which is always among the chosen.
        wide = [place for place, group in enumerate(groups) if group.wide][1:]
        count = min(layers, len(wide))
        return [wide[round((at + 1) * len(wide) / count) - 1] for at in range(count)]
    places = {group.layer: place for place, group in enumerate(groups)}
    for name in layers:
        if name not in places:
            known = ", ".join(map(repr, places))
            raise InputError(f"expected layers out of those with parameters of their own ({known}), got {name!r}")
    return sorted(places[name] for name in dict.fromkeys(layers))


def _steps(learning_rate: float, factors: Sequence[float]) -> tuple[float, ...]:
    for name, value in (("learning_rate", learning_rate), *(("factors", factor) for factor in factors)):
        if not isinstance(value, Real) or not 0.0 < value < math.inf:
            raise InputError(f"expected {name} to be a positive, finite number, got {value!r}")
    return tuple(learning_rate * factor for factor in factors)


def _shift(layer: str, here: Sequence[Tensor], there: Sequence[Tensor]) -> LayerShift:
    from batchnorm.probes.descent import distance, norm, product

    norms = norm(here), norm(there)
    cosine = None
    if all(0.0 < size < math.inf for size in norms):
        # Rounding takes the cosine of parallel gradients over 1.
        cosine = max(-1.0, min(1.0, product(here, there) / (norms[0] * norms[1])))
    return LayerShift(layer, norms[0], distance(there, here), cosine)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return min(finite, default=math.inf), max(finite) if finite and len(finite) == len(values) else math.inf
