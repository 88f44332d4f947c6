"""What is trained for and what is measured: losses, metrics, and whether a model's output fits its target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from batchnorm._errors import InputError

Loss = Callable[[Any, Tensor], Tensor]
Measure = Callable[[Tensor, Tensor], Any]
# name: (whether more is better, whether it is one of classification, of regression)
METRICS: dict[str, tuple[bool, bool, bool]] = {
    "accuracy": (True, True, False),
    "balanced-accuracy": (True, True, False),
    "loss": (False, True, True),
    "mse": (False, False, True),
    "mae": (False, False, True),
    "r2": (True, False, True),
}
DEFAULT = {"classification": "accuracy", "regression": "r2"}


@dataclass(frozen=True)
class Objective:
    """A task: its loss and its metric.

    ``loss`` and ``measure`` are a user's own functions of output and target, None for the task's.
    """

    task: str
    classes: int
    metric: str
    higher: bool
    loss: Loss | None = None
    measure: Measure | None = None

    def of(self, output: Any, target: Tensor) -> Tensor:
        """The loss of a batch: mean cross-entropy (of logits), or mean squared error."""
        if self.loss is not None:
            return self.loss(output, target)
        output = logits(output)
        if self.task == "regression":
            return functional.mse_loss(output.reshape(target.shape).float(), target.float())
        if _is_single(output, target):
            return functional.binary_cross_entropy_with_logits(output.reshape(target.shape).float(), target.float())
        return functional.cross_entropy(output.float(), target.long())

    def value(self, outputs: Tensor, targets: Tensor, loss: float) -> float:
        """The metric over a whole part; ``loss`` is its mean loss."""
        if self.measure is not None:
            return float(self.measure(outputs, targets))
        if self.metric == "loss":
            return loss
        if self.task == "classification":
            single = _is_single(outputs, targets)
            chosen = (outputs.reshape(targets.shape) > 0).long() if single else outputs.argmax(1)
            right = (chosen == targets).double()
            if self.metric == "accuracy":
                return float(right.mean())
            return float(torch.stack([right[targets == label].mean() for label in targets.unique()]).mean())
        outputs, targets = outputs.double().reshape(targets.shape), targets.double()
        if self.metric == "mae":
            return float((outputs - targets).abs().mean())
        mse = float((outputs - targets).square().mean())
        if self.metric == "mse":
            return mse
        var = float((targets - targets.mean(0)).square().mean())
        return 1 - mse / var if var > 0 else math.nan

    def check(self, output: Any, target: Tensor) -> None:
        """Raise an InputError where the model's output does not fit its target."""
        if self.loss is not None:
            return
        output = logits(output)
        shape, wanted = list(output.shape), list(target.shape)
        if self.task == "regression":
            if output.numel() != target.numel() or (output.dim() and output.shape[0] != target.shape[0]):
                raise InputError(
                    f"expected the model to give {wanted} for a batch of targets {wanted}, got {shape}: give its last "
                    f"layer {math.prod(wanted[1:])} output(s), or say task='classification' if these are classes"
                )
            return
        if self.classes == 2 and _is_single(output, target):
            return
        fits = output.dim() == target.dim() + 1 and [shape[0], *shape[2:]] == wanted and shape[1] >= self.classes
        if not fits:
            rest = "".join(f", {size}" for size in wanted[1:])
            raise InputError(
                f"expected the model to give ({wanted[0]}, {self.classes}{rest}), a logit for each of the "
                f"{self.classes} classes of the target, got {tuple(shape)}: change its last layer, or give loss="
            )


def logits(output: Any) -> Tensor:
    """The tensor in what a model gives: itself, its ``logits``, or the first of several.

    Raises:
        InputError: there is none.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, dict):
        found = found.get("logits", next(iter(found.values()), None))
    if isinstance(found, list | tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise InputError(f"expected the model to give a tensor, got {type(output).__name__}: give forward_fn=")
    return found


def objective(task: str, classes: int, metric: Any, loss: Loss | None, higher: bool | None) -> Objective:
    """The objective of a task.

    Raises:
        InputError: an unknown metric, or one of the other task.
    """
    if metric is None:
        metric = DEFAULT[task]
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        return Objective(task, classes, name, True if higher is None else higher, loss, metric)
    place = 1 if task == "classification" else 2
    fitting = [name for name, row in METRICS.items() if row[place]]
    if metric not in fitting:
        raise InputError(f"expected metric to be one of {', '.join(fitting)} for {task}, got {metric!r}")
    return Objective(task, classes, metric, METRICS[metric][0], loss)


def task_of(target: Tensor, where: str) -> tuple[str, int, str]:
    """Which task a target asks for: its name, the number of classes, and why, in a sentence.

    Integers are classes, other numbers quantities.
    """
    if target.is_floating_point():
        return "regression", 0, f"{where} holds numbers that are not whole: regression, by mean squared error."
    least, classes = int(target.min()), int(target.max()) + 1
    if least < 0:
        raise InputError(f"expected classes from 0 on in {where}, got {least}: number them anew")
    classes = max(classes, 2)
    return "classification", classes, f"{where} holds {classes} classes: classification, by cross-entropy."


def _is_single(output: Tensor, target: Tensor) -> bool:
    """Whether there is one logit for each target, that of class 1."""
    return output.shape == target.shape or (output.dim() == target.dim() + 1 and output.shape[1:2] == (1,))
