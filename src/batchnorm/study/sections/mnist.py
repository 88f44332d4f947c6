"""The paper's experiment on MNIST, in full: Ioffe & Szegedy 2015, section 4.1 and Figure 1.

A binary 28 x 28 image, three hidden layers of 100 sigmoids, small Gaussian weights, batches of 60. It needs MNIST's
files, so it runs only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Series, Spread, Table
from batchnorm.study.measures import PER, best, ratios, spread, steps_to
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.wording import Role, band, curves, listed, ranged, rounded, share, short, triple

MARKS = (0.9, 0.95)
PAPER_STEPS = 50_000
LAYERS = 3
TITLES: dict[str, tuple[str, Role]] = {"none": ("without", "none"), "batch": ("BN", "batch")}
COSTS = {"none": 0.0013, "batch": 0.0024}
# Seconds of a look at the 10,000 test images, and how many there are.
LOOK = 0.12
LOOKS = 140
# Images at which the distribution of a unit's input is looked at.
LOOKED_AT = 1000


def grid(steps: int) -> dict[str, int]:
    """When to evaluate: a hundred times, and ten times as often in the first twenty-fifth."""
    coarse = max(steps // 100, 1)
    return {"coarse": coarse, "fine": max(coarse // 10, 1), "fine_until": 4 * coarse}


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Without BN and with it at each rate, for each seed."""
    wanted = config.mnist
    runs = []
    for seed in config.seed_list("mnist"):
        for lr in wanted.lrs:
            for norm in TITLES:
                params = {"lr": lr, "std": wanted.std, "norm": norm, "batch": config.batch}
                params |= {"data_dir": config.data_dir, **grid(wanted.steps)}
                cost = wanted.steps * COSTS[norm] + LOOKS * LOOK
                name = run_id("mnist", norm, lr=lr, seed=seed)
                runs.append(Run(name, "mnist", norm, seed, wanted.steps, cost, params, {"lr": lr}))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on MNIST, judged on its test images, and look at its last hidden layer."""
    import torch

    from batchnorm.study import datasets, models
    from batchnorm.study.execution import train_net
    from batchnorm.study.looks import InputLooks

    wanted = run.params
    images = datasets.load("mnist", wanted["data_dir"])
    train, test = (
        (torch.from_numpy(pixels).flatten(1), torch.from_numpy(labels))
        for pixels, labels in (images.train, images.test)
    )
    net = models.mlp(train[0].shape[1], 10, seed=run.seed, layers=LAYERS, norm=wanted["norm"], std=wanted["std"])
    model = torch.nn.Sequential(models.Binary(), *net)
    looks = InputLooks(run, test[0][:LOOKED_AT], wanted["coarse"])
    lines = train_net(run, model, train, test, report, looks)
    counts = [
        run.record(0, "images", [len(train[1]), len(test[1])]),
        run.record(0, "published", not images.unpublished),
    ]
    return [*counts, *looks.lines, *lines]


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    tried = {
        norm: {lr: lines for lr in config.mnist.lrs if (lines := records.where(variant=norm, lr=lr)).lines}
        for norm in TITLES
    }
    if not all(tried.values()):
        return None
    # The better of its rates, for each net alike.
    found = {norm: min(by_rate.values(), key=_rank) for norm, by_rate in tried.items()}
    chosen = {norm: lines.lines[0]["lr"] for norm, lines in found.items()}
    return Section(
        name="mnist",
        title=SECTIONS["mnist"],
        question="What does the paper's own experiment on MNIST show?",
        headline=_headline(config, found),
        shows=tuple(_shows(found, chosen)),
        does_not_show=tuple(_does_not_show(config, records)),
        setup=_setup(config, records),
        figures=tuple(_figures(tried, found)),
        tables=(_table(tried),),
    )


def _rank(records: Records) -> tuple[float, float]:
    steps, tops = _steps(records, MARKS[0]).median, _tops(records).median
    return (float("inf") if steps is None else steps, -(tops or 0.0))


def _headline(config: StudyConfig, found: dict[str, Records]) -> str:
    plain, batch = (_steps(found[norm], MARKS[0]) for norm in TITLES)
    tops = {norm: _tops(found[norm]).median for norm in TITLES}
    ratio = ratios(plain.values, batch.values) if len(plain.values) == len(batch.values) else spread(())
    if batch.median is None:
        told = f"with BN the net did NOT reach 90% within {config.mnist.steps} steps"
    elif plain.median is None:
        told = f"90% after {ranged(batch)} steps with BN, never within {config.mnist.steps} without it"
    elif ratio.median is not None and ratio.median <= 1:
        told = f"BN was NOT faster to 90%: {ranged(batch)} steps, {ranged(plain)} without it"
    else:
        times = "" if ratio.median is None else f", {short(ratio.median)} x as many"
        told = f"90% after {ranged(batch)} steps with BN and {ranged(plain)} without it{times}"
    best_of = f"{share(tops['batch'])} with BN, {share(tops['none'])} without"
    return f"The paper's net on MNIST: {told}; best test accuracy {best_of}."


def _shows(found: dict[str, Records], chosen: dict[str, float]) -> Iterator[str]:
    plain, batch = (_steps(found[norm], MARKS[1]) for norm in TITLES)
    yield (
        f"Each at the better of its rates ({short(chosen['batch'])} with BN, {short(chosen['none'])} without): to 95% "
        f"{_reached(batch)} with BN, {_reached(plain)} without."
    )
    from batchnorm.study.sections.distribution_page import moved

    still = {norm: moved(found[norm]).relative for norm in TITLES}
    if still["none"].median is not None and still["batch"].median is not None:
        verdict = "steadier" if still["batch"].median < still["none"].median else "NOT steadier"
        yield (
            f"The typical unit's input is {verdict} with BN: it moves {ranged(still['batch'])} std per {PER} steps, "
            f"{ranged(still['none'])} without (after the first {PER} steps)."
        )


def _does_not_show(config: StudyConfig, records: Records) -> Iterator[str]:
    wanted = config.mnist
    if not _published(records):
        yield "What MNIST would: the files in the folder are not the published ones."
    yield (
        "The paper's own figures: it gives neither its rate nor the deviation of its weights. Here the rates "
        f"are {listed(wanted.lrs)} and the deviation is {short(wanted.std)}, for both nets; the headline's section "
        "shows how much a tuned rate and a better start take from the ratio."
    )
    if wanted.steps < PAPER_STEPS:
        yield f"What comes later: this run has {wanted.steps} steps, the paper's has {PAPER_STEPS} (--full)."
    yield "That steadiness causes the speed: the section on distributions has the control."


def _setup(config: StudyConfig, records: Records) -> dict[str, Cell]:
    wanted = config.mnist
    train, test = records.value("images", (0, 0))
    origin = "the published files (SHA-256)" if _published(records) else "NOT the published files (other SHA-256)"
    return {
        "data": f"MNIST's format, {train} train and {test} test images; {origin}",
        "input": "28 x 28 binary image: a pixel is on from 128 up",
        "network": f"784 - {LAYERS} x 100 sigmoid - 10, all weights from N(0, {short(wanted.std)}^2), biases 0",
        "training": f"plain SGD, rates {listed(wanted.lrs)}, batch {config.batch}, {wanted.steps} steps",
        "accuracy": "on all test images; best: held by two evaluations in a row",
        "looked at": f"input of the third sigmoid over {LOOKED_AT} test images, eval mode; percentiles 15, 50, 85 "
        "of the typical unit",
        "seeds": listed(config.seed_list("mnist")),
    }


def _figures(tried: dict[str, dict[float, Records]], found: dict[str, Records]) -> Iterator[Figure]:
    yield Figure(
        "mnist-accuracy",
        "lines",
        "Test accuracy on MNIST",
        "step",
        "test accuracy",
        tuple(
            band(f"{title}, rate {short(lr)}", curves(lines, "accuracy"), role, dash=place > 0)
            for norm, (title, role) in TITLES.items()
            for place, (lr, lines) in enumerate(tried[norm].items())
        ),
        "Median and range over seeds: Figure 1 (a) of the paper.",
        "Test accuracy over steps of both nets; the line with batch normalization climbs first.",
        y_range=(0.0, 1.0),
    )
    for norm, (title, role) in TITLES.items():
        lines = found[norm].where(metric="percentiles")
        if lines.lines:
            # One seed, as in the paper: a median over seeds would be steadier than any net is.
            seed = lines.lines[0]["seed"]
            by_step = {line["step"]: line["value"] for line in lines.where(seed=seed)}
            steps = tuple(sorted(by_step))
            low, middle, high = zip(*(by_step[step] for step in steps), strict=True)
            yield Figure(
                f"mnist-input-{norm}",
                "lines",
                f"Input of a typical unit over training: {title}",
                "step",
                "input of the sigmoid",
                (Series(f"{title}: median, 15% to 85%", steps, middle, low, high, role=role),),
                f"The line is the median, the band goes from the 15th to the 85th percentile (seed {seed}): Figure 1 "
                f"({'b' if norm == 'none' else 'c'}) of the paper.",
                f"The 15th, 50th and 85th percentile of a typical unit's input over the steps, {title}.",
            )


def _table(tried: dict[str, dict[float, Records]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for norm, (title, _) in TITLES.items():
        for lr, lines in tried[norm].items():
            last = spread([curve[-1][1] for curve in curves(lines, "accuracy")])
            near, far = (_steps(lines, mark) for mark in MARKS)
            tops = (_tops(lines).median, last.median)
            rows.append((title, lr, *triple(near), rounded(far.median), *map(rounded, tops)))
    columns = ("Net", "Rate", "Steps to 90%", "Low", "High", "Steps to 95%", "Best accuracy", "At the end")
    return Table("MNIST", columns, tuple(rows), "Median over seeds; an empty cell is 'never'.")


def _reached(steps: Spread) -> str:
    return "never" if steps.median is None else f"{ranged(steps)} steps"


def _steps(records: Records, mark: float) -> Spread:
    return spread([steps_to(curve, mark) for curve in curves(records, "accuracy")])


def _tops(records: Records) -> Spread:
    return spread([best(curve) for curve in curves(records, "accuracy")])


def _published(records: Records) -> bool:
    return all(line["value"] for line in records.where(metric="published"))
