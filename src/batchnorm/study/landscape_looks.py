"""Looks at the loss around a net while it is trained."""

from __future__ import annotations

import math
import time

from torch import nn

from batchnorm.probes import landscape
from batchnorm.study import training
from batchnorm.study.plan import Run
from batchnorm.study.records import Record

# Added to the seed of the batches that are looked at, which are thus others than those of training.
_APART = 500_009


class LandscapeLooks:
    """What :func:`execution.train_net` calls as ``look(step, model)``: a look at each evaluation.

    A look is on a batch of ``train`` drawn for it, the same for every variant of a seed, in train mode, through
    :func:`batchnorm.probes.landscape`. ``lines`` are its records: ``landscape`` with a mapping of ``loss``, ``least``
    and ``most`` (the loss along the gradient), ``gradient`` (its length), ``change`` (the largest along it),
    ``smoothness``, ``passes``, and for each layer asked, first to last, ``shifts``, ``gradients`` and ``cosines``:
    ``||G - G'||``, ``||G||`` and their angle's cosine. What is no number is None. ``seconds`` is the time of all looks.
    """

    def __init__(self, run: Run, train: training.Data) -> None:
        self.lines: list[Record] = []
        self.seconds = 0.0
        self._run = run
        self._batches = training.batches(train, run.params["batch"], run.seed + _APART)

    def __call__(self, step: int, model: nn.Sequential) -> None:
        """Look around ``model`` after ``step``."""
        begun = time.perf_counter()
        found = landscape(
            model,
            next(self._batches),
            nn.functional.cross_entropy,
            learning_rate=self._run.params["lr"],
            layers=self._run.params["shifts"],
        )
        self.seconds += time.perf_counter() - begun
        numbers = {
            "loss": found.loss,
            "least": found.loss_range[0],
            "most": found.loss_range[1],
            "gradient": found.gradient_norm,
            "change": found.gradient_range[1],
            "smoothness": found.smoothness,
        }
        layers = {
            "shifts": [_finite(shift.distance) for shift in found.shifts],
            "gradients": [_finite(shift.gradient_norm) for shift in found.shifts],
            "cosines": [_finite(shift.cosine) for shift in found.shifts],
        }
        value: dict[str, object] = {**{name: _finite(number) for name, number in numbers.items()}, **layers}
        value["passes"] = found.forwards + found.backwards
        self.lines.append(self._run.record(step, "landscape", value))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
