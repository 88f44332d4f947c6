"""Most runs of the study: train a multilayer perceptron and record its accuracy until its marks are reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from batchnorm.study import models, training
from batchnorm.study.data import Split
from batchnorm.study.plan import Report, Run
from batchnorm.study.records import Record

# One entry a loss curve needs for every so many of the accuracy's.
_LOSS_EVERY = 5
MODEL = (
    *("norm", "layers", "width", "activation", "gain", "std"),
    *("noise", "momentum", "ghost", "groups", "group_size", "refresh", "damping"),
)
"""The params of a run that say what its net is."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one torch thread: runs stand side by side, and sums are added in one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tensors(part: tuple[Any, Any]) -> training.Data:
    """A part of a split as float32 features and int64 labels."""
    features, labels = part
    return torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)), torch.from_numpy(labels)


def train_mlp(
    run: Run, split: Split, report: Report, look: Callable[[int, torch.nn.Sequential], None] | None = None
) -> tuple[list[Record], torch.nn.Sequential]:
    """Train the net that ``run.params`` describe and record its accuracy on one part of the split.

    Of the params, those in :data:`MODEL` go to :func:`models.mlp`; ``judge`` is the part looked at ("test" by default);
    the others as in :func:`train_net`.
    """
    wanted = run.params
    options = {name: wanted[name] for name in MODEL if name in wanted}
    model = models.mlp(split.features, split.classes, seed=run.seed, **options)
    judged = tensors(getattr(split, wanted.get("judge", "test")))
    return train_net(run, model, tensors(split.train), judged, report, look), model


def train_net(
    run: Run,
    model: torch.nn.Sequential,
    data: training.Data,
    judged: training.Data,
    report: Report,
    look: Callable[[int, torch.nn.Sequential], None] | None = None,
) -> list[Record]:
    """Train ``model`` on ``data`` as ``run.params`` say and record its accuracy on ``judged``.

    Of the params, ``lr`` and ``batch`` are required; ``until`` ends the run when two evaluations in a row are at that
    accuracy; ``order`` is the key of :data:`training.ORDERS` for the batches; evaluated is every ``fine`` steps up to
    ``fine_until``, every ``coarse`` steps after it.
    ``look(step, model)`` is called after each evaluation.
    """
    wanted = run.params
    until = wanted.get("until", 2.0)
    lines: list[Record] = []
    above = 0

    def watch(step: int, loss: float) -> bool:
        nonlocal above
        value = training.accuracy(model, judged)
        lines.append(run.record(step, "accuracy", value))
        if loss == loss and len(lines) % _LOSS_EVERY == 0 and loss != float("inf"):
            lines.append(run.record(step, "loss", loss))
        report(step, value)
        if look is not None:
            look(step, model)
        above = above + 1 if value >= until else 0
        return above >= 2

    with one_thread():
        begun = time.perf_counter()
        ended = training.train(
            model,
            data,
            lr=wanted["lr"],
            steps=run.steps,
            batch=wanted["batch"],
            seed=run.seed,
            at=training.evaluation_steps(
                run.steps, wanted.get("fine_until", 200), wanted.get("fine", 2), wanted.get("coarse", 10)
            ),
            watch=watch,
            order=wanted.get("order", "shuffled"),
        )
        whole = time.perf_counter() - begun
    if ended.diverged:
        lines.append(run.record(ended.steps, "diverged", True))
    lines.append(run.record(ended.steps, "seconds", round(ended.step_seconds, 7), what="step"))
    lines.append(run.record(ended.steps, "seconds", round(whole, 4), what="run"))
    return lines
