"""Test images that differ from the training's: running statistics are then wrong, and what new ones bring.

Li et al. 2016, "Revisiting Batch Normalization For Practical Domain Adaptation" (AdaBN): the target's statistics in the
place of the source's. Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
adaptation": how many samples that takes. Wang et al. 2021, "Tent": gamma and beta learn to be sure as well. Sun, Feng,
Saenko 2016, "Return of Frustratingly Easy Domain Adaptation" (CORAL): the covariance of the input is aligned instead.

What adapts sees other images than those it is tested on, without labels, except where the words say that it adapts to
each batch that it is asked about.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section, Spread
from batchnorm.study.measures import spread
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

if TYPE_CHECKING:
    import torch

    from batchnorm.study.data import Floats, Split

SHIFTS = {
    "clean": "as trained",
    "brightness": "brightness",
    "contrast": "low contrast",
    "noise": "noise",
    "blur": "blur",
    "moved": "one-pixel displacement",
}
# Normalization undoes what shifts or scales all of an image alike: w (a x + c) + b has the same standardized values.
EXACT = ("brightness", "contrast")
COSTS = {"none": 0.0006, "batch": 0.0011}


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """A net without BN and one with it for each seed."""
    wanted = config.domains
    runs = []
    for seed in config.seed_list():
        for norm, cost in COSTS.items():
            spec = {
                "lr": wanted.lr,
                "norm": norm,
                "activation": "relu",
                "batch": config.batch,
                "fine_until": 0,
                "coarse": 50,
                "brightness": wanted.brightness,
                "contrast": wanted.contrast,
                "noise": wanted.noise,
                "few": wanted.few,
                "draws": wanted.draws,
                "tent_lr": wanted.tent_lr,
            }
            expected = wanted.steps * cost + (0.15 if norm == "none" else 0.7)
            runs.append(Run(run_id("domains", norm, seed=seed), "domains", norm, seed, wanted.steps, expected, spec))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits; then ask it, and what it is adapted to, about images that were changed.

    Records ``accuracy_shifted`` with the labels ``shift`` and ``way``, and of each shift ``agreement``: the share of
    test images that get the answer of the clean ones when both are normalized with their own statistics. ``noticed``
    says whether batches were found to be sorted by class.
    """
    from batchnorm.study import data
    from batchnorm.study.execution import one_thread, train_mlp

    split = data.digits(run.seed)
    lines, model = train_mlp(run, split, report)
    model.eval()
    with one_thread():
        return [*lines, *_asked(run, split, model)]


def _asked(run: Run, split: Split, model: torch.nn.Module) -> Iterator[Record]:
    import torch

    from batchnorm.study.shifts import shifts

    def line(metric: str, value: object, **labels: str) -> Record:
        return run.record(run.steps, metric, value, **labels)

    options = {key: run.params[key] for key in ("brightness", "contrast", "noise")}
    labels = torch.from_numpy(split.test[1])
    clean: torch.Tensor | None = None
    for shift, change in shifts(**options).items():
        # Two seeds, so that no image of the target has the noise of a tested one.
        target, tested = change(split.validation[0], 2 * run.seed), change(split.test[0], 2 * run.seed + 1)
        found = {"frozen": _answers(model, tested), "coral": _answers(model, _aligned(split, target, tested))}
        if run.variant == "batch":
            found |= _adapted(run, model, target, tested)
            rng = torch.Generator().manual_seed(run.seed)
            drawn = [
                torch.randperm(len(target), generator=rng)[: run.params["few"]] for _ in range(run.params["draws"])
            ]
            few = [_right(_adabn(model, [target[places.numpy()]], tested), labels) for places in drawn]
            yield line("accuracy_shifted", sum(few) / len(few), shift=shift, way="few")
            clean = found["adabn"] if clean is None else clean
            yield line("agreement", float((found["adabn"] == clean).double().mean()), shift=shift)
            orders = {"shuffled": torch.arange(len(labels)), "one-class": labels.argsort(stable=True)}
            for way, order in orders.items():
                answers, noticed = _each_batch(model, tested, order, run.params["batch"])
                yield line("accuracy_shifted", _right(answers, labels), shift=shift, way=f"each-{way}")
                yield line("noticed", noticed, shift=shift, way=f"each-{way}")
        for way, answers in found.items():
            yield line("accuracy_shifted", _right(answers, labels), shift=shift, way=way)


def _adapted(run: Run, model: torch.nn.Module, target: Floats, tested: Floats) -> dict[str, torch.Tensor]:
    """The answers after AdaBN and TENT on the whole target."""
    from batchnorm.surgery import adapt

    batches = [
        _tensor(target[start : start + run.params["batch"]]) for start in range(0, len(target), run.params["batch"])
    ]
    adapted = adapt(model, batches, method="tent", lr=run.params["tent_lr"])
    try:
        tent = _answers(adapted, tested)
    finally:
        adapted.reset()
    return {"adabn": _adabn(model, batches, tested), "tent": tent}


def _adabn(model: torch.nn.Module, batches: list[Any], tested: Floats) -> torch.Tensor:
    from batchnorm.surgery import adapt

    adapted = adapt(model, [_tensor(batch) for batch in batches], on_sorted="ignore")
    try:
        return _answers(adapted, tested)
    finally:
        adapted.reset()


def _each_batch(model: torch.nn.Module, tested: Floats, order: torch.Tensor, size: int) -> tuple[torch.Tensor, bool]:
    """The answers when each batch is normalized with its own statistics; whether batches were found to be sorted."""
    import torch

    from batchnorm.surgery import SortedBatchesWarning, adapt

    features = _tensor(tested)
    answers = torch.empty(len(order), dtype=torch.long)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = adapt(model, episodic=True)
        try:
            with torch.no_grad():
                for part in order.tensor_split(max(1, len(order) // size)):
                    answers[part] = adapted(features[part]).argmax(1)
        finally:
            adapted.reset()
    return answers, any(issubclass(item.category, SortedBatchesWarning) for item in caught)


def _aligned(split: Split, target: Floats, tested: Floats) -> Floats:
    """The tested images with the mean and covariance of the training's, by what the target is like."""
    from batchnorm.preprocessing import CORAL

    coral: Any = CORAL(shrinkage="ledoit-wolf").fit(target, split.train[0])
    result: Floats = coral.transform(tested)
    return result


def _answers(model: torch.nn.Module, features: Floats) -> torch.Tensor:
    import torch

    with torch.no_grad():
        answers: torch.Tensor = model(_tensor(features)).argmax(1)
    return answers


def _right(answers: torch.Tensor, labels: torch.Tensor) -> float:
    return float((answers == labels).double().mean())


def _tensor(features: Any) -> torch.Tensor:
    import torch

    return torch.as_tensor(features, dtype=torch.float32)


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import domains_page

    return domains_page.section(config, records)


def accuracy_by_seed(records: Records, norm: str, shift: str, way: str = "frozen") -> dict[int, float]:
    """The accuracy of a net on changed images in one way of asking it, by seed."""
    found = records.where(metric="accuracy_shifted", variant=norm, shift=shift, way=way)
    return {line["seed"]: line["value"] for line in found}


def accuracy(records: Records, norm: str, shift: str, way: str = "frozen") -> Spread:
    """The same over seeds."""
    return spread(list(accuracy_by_seed(records, norm, shift, way).values()))
