"""Looks at the input of the last hidden layer's units while a net is trained."""

from __future__ import annotations

import torch

from batchnorm.probes import InputPercentiles, movement, typical_unit
from batchnorm.probes.distribution import Look
from batchnorm.study import models
from batchnorm.study.measures import PER
from batchnorm.study.plan import Run
from batchnorm.study.records import Record


class InputLooks:
    """What :func:`execution.train_net` calls as ``look(step, model)``: a look at each step that ``every`` divides.

    A look is at ``features`` in eval mode, with the noise of noisy layers in force. ``lines`` are its records:
    ``percentiles`` (the typical unit's, three numbers), and ``movement`` and ``movement_absolute`` since the look
    before, for each ``PER`` steps.
    """

    def __init__(self, run: Run, features: torch.Tensor, every: int) -> None:
        self.lines: list[Record] = []
        self._run = run
        self._features = features
        self._every = every
        self._before: tuple[int, Look] | None = None

    @torch.no_grad()
    def __call__(self, step: int, model: torch.nn.Sequential) -> None:
        """Look at ``model`` after ``step``."""
        if step % self._every:
            return
        model.eval()
        models.shake(model, True)
        with InputPercentiles(models.last_hidden_activation(model)) as probe:
            model(self._features)
        models.shake(model, False)
        model.train()
        look = probe.look
        typical = [round(p, 6) for p in typical_unit(look.percentiles)]
        self.lines.append(self._run.record(step, "percentiles", typical))
        if self._before is not None:
            since, before = self._before
            for metric, deviations in (("movement", before.deviations), ("movement_absolute", None)):
                moved = movement(before.percentiles, look.percentiles, deviations)
                if moved < float("inf"):
                    self.lines.append(self._run.record(step, metric, round(moved * PER / (step - since), 6)))
        self._before = (step, look)
