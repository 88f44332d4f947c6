"""Whitening layers beside BN in words, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Spread, Table
from batchnorm.study.measures import ratios, spread, steps_to
from batchnorm.study.records import Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.sections.whitening import UNTIL, nets
from batchnorm.study.wording import Role, band, bars, curves, listed, ranged, rounded, short, step_seconds, triple

FIRST, SECOND = 0.9, UNTIL
NAMES = {"batch": "BN", "iternorm": "IterNorm", "decorrelated": "DBN"}
ROLES: dict[str, Role] = {"batch": "batch", "iternorm": "data-a", "decorrelated": "data-b"}
CASES = {"sigmoid": "sigmoid", "relu": "ReLU"}


@dataclass(frozen=True)
class Net:
    """One normalization with one activation at its best rate: steps to both marks and what a step costs, over seeds."""

    norm: str
    group: int
    lr: float
    first: Spread
    second: Spread
    seconds: Spread

    @property
    def title(self) -> str:
        """``IterNorm, groups of 4``."""
        return NAMES[self.norm] if self.norm == "batch" else f"{NAMES[self.norm]}, groups of {self.group}"


Found = dict[str, list[Net]]
"""By activation, BN first."""


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None while there is no activation with BN and one whitening layer."""
    found = {case: _nets(config, records.where(case=case)) for case in CASES}
    found = {case: tried for case, tried in found.items() if len(tried) > 1 and tried[0].norm == "batch"}
    if not found:
        return None
    return Section(
        name="whitening",
        title=SECTIONS["whitening"],
        question="Does whitening the units of a layer bring more than normalizing each of them?",
        headline=_headline(found),
        shows=tuple(_shows(found)),
        does_not_show=tuple(_does_not_show(config, found)),
        setup=_setup(config),
        figures=tuple(_figures(records, found)),
        tables=(_table(found),),
    )


def _nets(config: StudyConfig, records: Records) -> list[Net]:
    """Each normalization at the rate with the fewest steps to 95%, then 90%; None counts as more than any."""
    best = []
    for norm, group in nets(config):
        tried = []
        of_net = records.where(variant=norm, group=group)
        for lr in of_net.distinct("lr"):
            lines = of_net.where(lr=lr)
            found = curves(lines, "accuracy")
            first, second = (spread([steps_to(curve, mark) for curve in found]) for mark in (FIRST, SECOND))
            tried.append(Net(norm, group, lr, first, second, step_seconds(lines)))
        if tried:
            best.append(min(tried, key=lambda net: (_open(net.second), _open(net.first))))
    return best


def _open(value: Spread) -> float:
    return float("inf") if value.median is None else value.median


def _against(net: Net, batch: Net, mark: str) -> Spread:
    """Steps of the net / steps of BN, seed by seed."""
    pair = getattr(net, mark).values, getattr(batch, mark).values
    count = min(map(len, pair))
    return ratios(*(values[:count] for values in pair))


def _verdict(net: Net, batch: Net, mark: str) -> str:
    """ "fewer", "more" or "alike": the first two only where all seeds say so."""
    both = list(zip(getattr(net, mark).values, getattr(batch, mark).values, strict=False))
    steps = [tuple(float("inf") if value is None else value for value in pair) for pair in both]
    if steps and all(ours < theirs for ours, theirs in steps):
        return "fewer"
    return "more" if steps and all(ours > theirs for ours, theirs in steps) else "alike"


def _counted(found: Found, mark: str, verdict: str) -> list[str]:
    return [
        f"{net.title} ({CASES[case]})"
        for case, tried in found.items()
        for net in tried[1:]
        if _verdict(net, tried[0], mark) == verdict
    ]


def _costs(found: Found) -> list[float]:
    costs = []
    for tried in found.values():
        theirs = tried[0].seconds.median
        costs += [net.seconds.median / theirs for net in tried[1:] if net.seconds.median and theirs]
    return costs


def _headline(found: Found) -> str:
    total = sum(len(tried) - 1 for tried in found.values())
    told = []
    for mark, level in (("first", "90%"), ("second", "95%")):
        fewer, more = (len(_counted(found, mark, verdict)) for verdict in ("fewer", "more"))
        told.append(f"to {level} in fewer steps than BN with every seed in {fewer} of {total} cases, in more in {more}")
    costs = _costs(found)
    cost = f"; a step takes {short(min(costs))} to {short(max(costs))} x as long" if costs else ""
    mark, level = ("second", "95%") if any(tried[0].second.median for tried in found.values()) else ("first", "90%")
    faster = _faster(found, mark)
    time = f"; in time {listed(faster) if faster else 'NONE'} beat BN to {level}"
    return f"Whitening gets {told[0]}; {told[1]}{cost}{time if costs else ''}."


def _faster(found: Found, mark: str) -> list[str]:
    """Those with a shorter median time to a mark than BN."""

    def time(net: Net) -> float:
        return _open(getattr(net, mark)) * (net.seconds.median or 0.0)

    return [
        f"{net.title} ({CASES[case]})"
        for case, tried in found.items()
        for net in tried[1:]
        if time(net) < time(tried[0])
    ]


def _shows(found: Found) -> Iterator[str]:
    for case, tried in found.items():
        batch = tried[0]
        yield f"{CASES[case]}: BN is at 90% after {ranged(batch.first)} steps, at 95% after {ranged(batch.second)}."
        for net in tried[1:]:
            cost = ratios([net.seconds.median], [batch.seconds.median]).median
            yield (
                f"{CASES[case]}, {net.title}: 90% after {ranged(net.first)} steps, 95% after {ranged(net.second)}, a "
                f"step {short(cost)} x as long as BN's."
            )


def _does_not_show(config: StudyConfig, found: Found) -> Iterator[str]:
    fewer, alike = _counted(found, "second", "fewer"), _counted(found, "second", "alike")
    if alike:
        yield f"A difference to 95% that all seeds agree on, for {listed(alike)}."
    if fewer:
        yield f"That fewer steps are less time: {listed(fewer)} took fewer steps to 95%; see what a step costs."
    yield (
        "What whitening costs elsewhere: times are of these layers on a processor, in small nets, where the covariance "
        "and its root are most of a step; and they were taken while other runs computed beside them."
    )
    yield (
        f"Large groups: a covariance of {config.batch} samples says little of more than a few units; and deeper nets "
        "or convolutions, for which the authors made these layers."
    )


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.whitening
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": "64 - 3 x 100 - 10, Xavier normal weights for sigmoid, He normal for ReLU, biases 0",
        "IterNorm": f"Newton's iteration, 5 times, groups of {listed(wanted.groups)} units",
        "DBN": f"DecorrelatedBatchNorm, by eigenvalues, groups of {listed(wanted.eigen_groups)} units",
        "training": f"plain SGD, batch {config.batch}, until 95% or {wanted.steps} steps, rates "
        f"{listed(wanted.sigmoid_lrs)} for sigmoid, {listed(wanted.relu_lrs)} for ReLU; each net at its best",
        "accuracy": "on the validation part; reached when two evaluations in a row are there",
        "time": "median processor time of a step, one thread",
        "seeds": listed(config.seed_list()),
    }


def _figures(records: Records, found: Found) -> Iterator[Figure]:
    for case, tried in found.items():
        series = []
        for place, net in enumerate(tried):
            lines = curves(records.where(case=case, variant=net.norm, group=net.group, lr=net.lr), "accuracy")
            series.append(band(net.title, lines, ROLES[net.norm], dash=place > 1 and tried[place - 1].norm == net.norm))
        yield Figure(
            f"whitening-{case}",
            "lines",
            f"Validation accuracy: {CASES[case]}",
            "step",
            "validation accuracy",
            tuple(series),
            "Median and range over seeds, as far as all go; runs end at 95%.",
            f"Accuracy over the steps with BN and with whitening layers, {CASES[case]}.",
            y_range=(0.0, 1.0),
        )
    series = []
    for case, tried in found.items():
        theirs = tried[0].seconds.median
        times = [ratios(net.seconds.values, (theirs,) * len(net.seconds.values)) for net in tried]
        role: Role = "data-a" if case == "sigmoid" else "data-b"
        series.append(bars(CASES[case], [net.title for net in tried], times, role))
    yield Figure(
        "whitening-costs",
        "bars",
        "Time of a step, as a multiple of BN's",
        "normalization",
        "time / BN's",
        tuple(series),
        "Median and range over seeds, on one thread of a processor.",
        "Bars for each layer: BN's is one, those of whitening are higher.",
    )


def _table(found: Found) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for case, tried in found.items():
        for net in tried:
            cost = rounded(ratios([net.seconds.median], [tried[0].seconds.median]).median)
            against = [rounded(_against(net, tried[0], mark).median) for mark in ("first", "second")]
            steps = (*triple(net.first), *triple(net.second))
            rows.append((CASES[case], net.title, net.lr, *steps, *against, cost))
    columns = (
        *("Units", "Net", "Rate", "Steps to 90%", "Low", "High", "Steps to 95%", "Low ", "High "),
        *("90%, of BN's", "95%, of BN's", "Time of a step, of BN's"),
    )
    return Table("Steps and time", columns, tuple(rows), "Median and range over seeds; an empty cell is 'never'.")
