"""A convnet on CIFAR-10, without BN and with it. It needs CIFAR-10's files, so it runs only where it is asked for.

The input is standardized per channel by the library's own scaler, which stands in front of the net as a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Spread, Table
from batchnorm.study.measures import best, ratios, spread, steps_to
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.wording import Role, band, curves, listed, ranged, rounded, share, short, step_seconds, triple

MARK = 0.5
STAGES = 3
TITLES: dict[str, tuple[str, Role]] = {"none": ("without", "none"), "batch": ("BN", "batch")}
# Seconds of a step and convolution at 16 channels in the first stage, and of a look at the 10,000 test images.
COSTS = {"none": 0.011, "batch": 0.012}
LOOK = 5.0
LOOKS = 15


@dataclass(frozen=True)
class Trained:
    """One variant at one rate over seeds: steps to the mark, best and last accuracy, seconds of a step by seed."""

    lr: float
    steps: Spread
    tops: Spread
    last: Spread
    seconds: Spread


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Each rate without BN and with it, for each seed."""
    wanted = config.cifar10
    runs = []
    for seed in config.seed_list("cifar10"):
        for lr in wanted.lrs:
            for norm in TITLES:
                params: dict[str, Any] = {"lr": lr, "norm": norm, "width": wanted.width, "depth": wanted.depth}
                # A look costs as much as a hundred steps.
                params |= {"batch": config.batch, "data_dir": config.data_dir, "fine_until": 0}
                params |= {"coarse": max(wanted.steps // LOOKS, 1)}
                size = wanted.width / 16
                cost = wanted.steps * STAGES * wanted.depth * COSTS[norm] * size + LOOKS * LOOK * size
                name = run_id("cifar10", norm, lr=lr, seed=seed)
                runs.append(Run(name, "cifar10", norm, seed, wanted.steps, cost, params, {"lr": lr}))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one convnet on CIFAR-10, judged on its test images."""
    import torch

    from batchnorm.preprocessing import StandardScaler
    from batchnorm.study import datasets, models
    from batchnorm.study.execution import one_thread, train_net

    wanted = run.params
    images = datasets.load("cifar10", wanted["data_dir"])
    train, test = ((torch.from_numpy(x), torch.from_numpy(labels)) for x, labels in (images.train, images.test))
    with one_thread():
        scaler = StandardScaler(channel_axis=1)
        for part in train[0].split(1000):
            scaler.partial_fit(models.Pixels()(part))
    names = ("norm", "width", "depth")
    net = models.convnet(3, 10, seed=run.seed, stages=STAGES, **{name: wanted[name] for name in names})
    model = torch.nn.Sequential(models.Pixels(), scaler.to_module(), *net)
    lines = train_net(run, model, train, test, report)
    counts = [
        run.record(0, "images", [len(train[1]), len(test[1])]),
        run.record(0, "published", not images.unpublished),
    ]
    return [*counts, *lines]


def trained(records: Records) -> Trained | None:
    """What the runs of one variant and rate came to."""
    lines = curves(records, "accuracy")
    if not lines:
        return None
    return Trained(
        records.lines[0]["lr"],
        spread([steps_to(line, MARK) for line in lines]),
        spread([best(line) for line in lines]),
        spread([line[-1][1] for line in lines]),
        step_seconds(records),
    )


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    tried = {
        norm: [item for lr in config.cifar10.lrs if (item := trained(records.where(variant=norm, lr=lr)))]
        for norm in TITLES
    }
    if not all(tried.values()):
        return None
    chosen = {norm: max(items, key=lambda item: item.tops.median or 0.0) for norm, items in tried.items()}
    return Section(
        name="cifar10",
        title=SECTIONS["cifar10"],
        question="Does a convnet on photographs gain by batch normalization?",
        headline=_headline(config, chosen),
        shows=tuple(_shows(chosen)),
        does_not_show=tuple(_does_not_show(config, records)),
        setup=_setup(config, records),
        figures=(_figure(records, chosen),),
        tables=(_table(tried),),
    )


def _headline(config: StudyConfig, chosen: dict[str, Trained]) -> str:
    plain, batch = chosen["none"], chosen["batch"]
    steps = config.cifar10.steps
    tops = f"{share(batch.tops.median)} with BN, {share(plain.tops.median)} without it"
    better = (batch.tops.median or 0.0) > (plain.tops.median or 0.0)
    gain = f"In {steps} steps a convnet on CIFAR-10 gets to {tops}"
    if not better:
        gain = f"BN did NOT help a convnet on CIFAR-10 within {steps} steps: {tops}"
    reached = [
        f"{'never' if item.steps.median is None else f'after {ranged(item.steps)} steps'} {name}"
        for item, name in ((batch, "with"), (plain, "without"))
    ]
    return f"{gain}; half of the test images right {' and '.join(reached)}."


def _shows(chosen: dict[str, Trained]) -> Iterator[str]:
    plain, batch = chosen["none"], chosen["batch"]
    cost = ratios(batch.seconds.values, plain.seconds.values).median
    yield (
        f"At the best rate tried for each ({short(plain.lr)} without, {short(batch.lr)} with BN); a step with BN took "
        f"{short(cost)} times as long (median processor time, one thread, our layer)."
    )


def _does_not_show(config: StudyConfig, records: Records) -> Iterator[str]:
    if not _published(records):
        yield "What CIFAR-10 would: the files in the folder are not the published ones."
    yield (
        "What such a net can come to: no augmentation, no schedule, no weight decay, "
        f"{config.cifar10.steps * config.batch} images seen. The rate is chosen by test accuracy, for both alike."
    )


def _setup(config: StudyConfig, records: Records) -> dict[str, Cell]:
    wanted = config.cifar10
    train, test = records.value("images", (0, 0))
    origin = "the published files (SHA-256)" if _published(records) else "NOT the published files (other SHA-256)"
    channels = listed(wanted.width * 2**stage for stage in range(STAGES))
    return {
        "data": f"CIFAR-10's binary version, {train} train and {test} test images; {origin}",
        "input": "pixels / 255, standardized per channel by the train images' mean and variance; no augmentation",
        "network": f"{STAGES} times {wanted.depth} x (3 x 3 convolution, BN or nothing, ReLU) and 2 x 2 pooling, "
        f"{channels} channels; average pooling, linear; He normal weights",
        "training": f"plain SGD, rates {listed(wanted.lrs)}, batch {config.batch}, {wanted.steps} steps",
        "accuracy": f"on all test images, about {LOOKS} times; best: held by two evaluations in a row",
        "seeds": listed(config.seed_list("cifar10")),
    }


def _figure(records: Records, chosen: dict[str, Trained]) -> Figure:
    return Figure(
        "cifar10-accuracy",
        "lines",
        "Test accuracy on CIFAR-10",
        "step",
        "test accuracy",
        tuple(
            band(
                f"{title}, rate {short(chosen[norm].lr)}",
                curves(records.where(variant=norm, lr=chosen[norm].lr), "accuracy"),
                role,
            )
            for norm, (title, role) in TITLES.items()
        ),
        "Median and range over seeds, each variant at the best rate tried.",
        "Test accuracy over steps of the convnet, with and without batch normalization.",
        y_range=(0.0, 1.0),
    )


def _table(tried: dict[str, list[Trained]]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (TITLES[norm][0], item.lr, *triple(item.steps), rounded(item.tops.median), rounded(item.last.median))
        for norm, items in tried.items()
        for item in items
    ]
    columns = ("Net", "Rate", "Steps to 50%", "Low", "High", "Best accuracy", "At the end")
    return Table("CIFAR-10", columns, tuple(rows), "Median over seeds; an empty cell is 'never'.")


def _published(records: Records) -> bool:
    return all(line["value"] for line in records.where(metric="published"))
