"""Section 6: what preparing the raw data does, before any layer: raw, centred, standardized, rotated, whitened.

Three questions: a table of raw measurements for a sigmoid net; digits for a linear model, where nothing but the
conditioning of the data decides; digits for the deep sigmoid net, where the simple story ends.
What it comes to is said in ``preprocessing_page``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

if TYPE_CHECKING:
    from batchnorm.study.data import Split

# How the data may come to the net, and the kinds that each part compares.
TITLES = {
    "raw": "raw",
    "scaled": "divided by 16",
    "min-max": "scaled to (-1, 1)",
    "centred": "centred",
    "standardized": "standardized",
    "rotated": "centred and rotated (PCA)",
    "whitened": "whitened (PCA)",
}
PARTS = {
    "table": ("raw", "centred", "min-max", "standardized", "whitened"),
    "linear": ("scaled", "centred", "standardized", "rotated", "whitened"),
    "deep": ("raw", "scaled", "standardized", "whitened"),
}
LOSS = 0.1
STEP = 0.0006
LINEAR_STEP = 0.0003


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Each part with each kind of input; the table at each rate, the linear model over all its rates in one run."""
    wanted = config.preprocessing
    runs = []
    for seed in config.seed_list():
        for kind in PARTS["deep"]:
            spec: dict[str, Any] = {"lr": wanted.deep_lr, "batch": config.batch}
            runs.append(_run("deep", kind, seed, wanted.deep_steps, STEP, spec, lr=wanted.deep_lr))
        for kind in PARTS["linear"]:
            steps = wanted.linear_steps * len(wanted.linear_lrs)
            spec = {"lrs": wanted.linear_lrs, "steps": wanted.linear_steps}
            runs.append(_run("linear", kind, seed, steps, LINEAR_STEP, spec))
        for kind in PARTS["table"]:
            for lr in wanted.table_lrs:
                spec = {"lr": lr, "layers": 1, "batch": config.batch}
                runs.append(_run("table", kind, seed, wanted.table_steps, STEP, spec, lr=lr))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Prepare the data with the library's estimators, fitted on the training part, and train on it."""
    from batchnorm.study import data
    from batchnorm.study.execution import train_mlp

    if run.labels["part"] == "linear":
        return _linear(run, prepare(run.variant, data.digits(run.seed)), report)
    # Pixels as they are stored, 0 to 16, are what "raw" means; the other kinds do not mind the scale.
    deep = run.labels["part"] == "deep"
    split = data.digits(run.seed, scale=1.0) if deep else data.breast_cancer(run.seed)
    lines, _ = train_mlp(run, prepare(run.variant, split), report)
    labels = split.test[1]
    return [*lines, run.record(lines[-1]["step"], "majority", max((labels == name).mean() for name in set(labels)))]


def prepare(kind: str, split: Split) -> Split:
    """The split with its features prepared as ``kind`` says; only the training part is looked at."""
    import dataclasses

    import numpy as np

    from batchnorm import preprocessing

    features = split.train[0]
    if kind in ("raw", "scaled"):
        peak = 16.0 if kind == "scaled" and features.max() > 1.0 else 1.0
        parts = [(part[0] / peak, part[1]) for part in (split.train, split.validation, split.test)]
        return dataclasses.replace(split, train=parts[0], validation=parts[1], test=parts[2])
    made = {
        "min-max": preprocessing.MinMaxScaler,
        "centred": preprocessing.MeanSubtractor,
        "standardized": preprocessing.StandardScaler,
        "rotated": preprocessing.MeanSubtractor,
        "whitened": preprocessing.Whitener,
    }
    estimator = made[kind](**({"method": "pca"} if kind == "whitened" else {})).fit(features)
    turn = np.eye(features.shape[1])
    if kind == "rotated":
        # The eigenvectors of the covariance: a rotation alone, no direction is scaled.
        turn = np.linalg.eigh(np.cov(features, rowvar=False))[1]

    def of(part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        result = np.asarray(estimator.transform(part[0]))
        return (result @ turn if kind == "rotated" else result), part[1]

    return dataclasses.replace(split, train=of(split.train), validation=of(split.validation), test=of(split.test))


def _linear(run: Run, split: Split, report: Report) -> list[Record]:
    """Softmax regression from zero weights by full-batch gradient descent: at each rate, steps to train loss 0.1."""
    import torch
    from torch import nn

    from batchnorm.study import training
    from batchnorm.study.execution import one_thread, tensors

    limit = run.params["steps"]
    train = tensors(split.train)
    lines: list[Record] = []
    with one_thread():
        for place, lr in enumerate(run.params["lrs"]):
            model = torch.nn.utils.skip_init(nn.Linear, split.features, split.classes)
            nn.init.zeros_(model.weight)
            nn.init.zeros_(model.bias)
            reached: list[int] = []

            def watch(step: int, loss: float, place: int = place, reached: list[int] = reached) -> bool:
                # The loss is that before the step.
                if loss < LOSS:
                    reached.append(step - 1)
                report(place * limit + step, None)
                return bool(reached)

            training.train(
                model,
                train,
                lr=lr,
                steps=limit,
                batch=len(train[1]),
                seed=run.seed,
                at=range(1, limit + 1),
                watch=watch,
            )
            lines.append(run.record(limit, "steps_to_loss", reached[0] if reached else None, lr=lr))
            lines.append(run.record(limit, "train_accuracy", training.accuracy(model, train), lr=lr))
    return lines


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import preprocessing_page

    return preprocessing_page.section(config, records)


def _run(part: str, kind: str, seed: int, steps: int, step: float, spec: dict[str, Any], **labels: float) -> Run:
    name = run_id("preprocessing", part, kind, seed=seed, **labels)
    return Run(name, "preprocessing", kind, seed, steps, steps * step, spec, {"part": part, **labels})
