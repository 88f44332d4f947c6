"""Section 6 in words, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Spread, Table
from batchnorm.study.measures import best, spread, steps_to
from batchnorm.study.records import Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.sections.preprocessing import LOSS, PARTS, TITLES
from batchnorm.study.wording import Role, band, bars, curves, listed, ranged, rounded, share, short, triple

THRESHOLD = 0.9
NOISE = 0.01


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None until each part has something to compare."""
    table = {kind: records.where(part="table", variant=kind) for kind in PARTS["table"]}
    linear = {kind: _fastest(records.where(part="linear", variant=kind)) for kind in PARTS["linear"]}
    deep = {kind: records.where(part="deep", variant=kind) for kind in PARTS["deep"]}
    if not (table["raw"].lines and table["standardized"].lines and all(linear[kind][1].values for kind in linear)):
        return None
    if not all(found.lines for found in deep.values()):
        return None
    return Section(
        name="preprocessing",
        title=SECTIONS["preprocessing"],
        question="What do centring, scaling and whitening the raw data do, before any layer normalizes?",
        headline=_headline(table, linear),
        shows=tuple(_shows(table, linear)),
        does_not_show=tuple(_does_not_show(deep)),
        setup=_setup(config),
        figures=tuple(_figures(table, linear, deep)),
        tables=(_table_of_table(table), _table_of_linear(linear), _table_of_deep(deep)),
    )


def _headline(table: dict[str, Records], linear: dict[str, tuple[float | None, Spread]]) -> str:
    raw, ready = _best_rate(table["raw"]), _best_rate(table["standardized"])
    return (
        f"On raw measurements a sigmoid net gets {share(raw[2].median)} right at its best rate, on standardized ones "
        f"{share(ready[2].median)} (90% after {ranged(ready[1])} steps); a linear model on digits needs "
        f"{ranged(linear['scaled'][1])} steps on pixels, {ranged(linear['standardized'][1])} standardized, "
        f"{ranged(linear['whitened'][1])} whitened."
    )


def _shows(table: dict[str, Records], linear: dict[str, tuple[float | None, Spread]]) -> Iterator[str]:
    tops = [_final(table["raw"].where(lr=lr)).median for lr in _lrs(table["raw"])]
    majority = table["raw"].value("majority")
    known = [top for top in tops if top is not None]
    ends = [curve[-1][1] for curve in curves(table["raw"], "accuracy")]
    if majority is not None and all(min(abs(end - majority), abs(1 - end - majority)) < NOISE for end in ends):
        yield (
            f"Raw, the net ends by naming one class whatever it is shown, in all {len(ends)} runs over {len(known)} "
            f"rates (right in {share(majority)} of the test cases if it is the larger): features of size 1000 hold the "
            "sigmoids at their ends."
        )
    else:
        yield f"Raw, over {len(known)} rates, the net ends between {share(min(known))} and {share(max(known))}."
    steps = {kind: item[1].median for kind, item in linear.items()}
    order = sorted(steps, key=lambda kind: float("inf") if (value := steps[kind]) is None else value)
    yield (
        f"For the linear model, each at its best rate, steps to train loss {short(LOSS)}: "
        + listed(f"{TITLES[kind]} {ranged(linear[kind][1])}" for kind in order)
        + ". Its loss is convex: all that preparing the data can change is the conditioning."
    )
    centred, rotated = linear["centred"][1], linear["rotated"][1]
    same = centred.values == rotated.values
    yield (
        "A rotation without scaling brings nothing: gradient descent from zero takes the same way in any rotated frame "
        f"({ranged(rotated)} steps, {ranged(centred)} before the rotation"
        + (")." if same else "; that they differ is rounding).")
    )


def _does_not_show(deep: dict[str, Records]) -> Iterator[str]:
    arrived = {kind: _arrival(found) for kind, found in deep.items()}
    first = min(arrived, key=lambda kind: float("inf") if (value := arrived[kind].median) is None else value)
    surprise = "the raw pixels, which undo the small start of the weights" if first == "raw" else f"the {TITLES[first]}"
    yield (
        f"That more preparation is always faster: in the 3 x 100 sigmoid net on digits the fastest are {surprise} ("
        + listed(f"{TITLES[kind]} {ranged(steps)}" for kind, steps in arrived.items())
        + " steps to 90%)."
    )
    tops = {kind: _tops(found).median for kind, found in deep.items()}
    others = [top for kind, top in tops.items() if kind != "whitened" and top is not None]
    white = tops["whitened"]
    if white is not None and others:
        loss = max(others) - white
        verdict = f"costs {100 * loss:.1f} points" if loss > NOISE else "costs nothing beyond the noise"
        yield (
            f"That whitening is free: in the same net it {verdict} of test accuracy ({share(white)}, the best other "
            f"input {share(max(others))}); directions that hold nothing but noise are made as large as the others."
        )
    yield "What the test accuracy of the linear model would be: it is stopped at a training loss."


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.preprocessing
    return {
        "estimators": "batchnorm.preprocessing, fitted on the training part only",
        "table": "scikit-learn breast_cancer, 30 raw features; 341 train, 114 validation, 114 test, stratified; "
        f"30 - 100 sigmoid - 2, rates {listed(wanted.table_lrs)}, batch {config.batch}, {wanted.table_steps} steps",
        "linear": "digits, softmax regression from zero weights, full batch (1000), rates "
        f"{listed(wanted.linear_lrs)}, at most {wanted.linear_steps} steps",
        "deep": f"digits, 64 - 3 x 100 sigmoid - 10, Xavier normal, rate {short(wanted.deep_lr)} (the same for all), "
        f"batch {config.batch}, {wanted.deep_steps} steps",
        "seeds": listed(config.seed_list()),
    }


def _figures(
    table: dict[str, Records], linear: dict[str, tuple[float | None, Spread]], deep: dict[str, Records]
) -> Iterator[Figure]:
    shown = []
    kinds: tuple[tuple[str, Role], ...] = (("raw", "none"), ("standardized", "batch"), ("whitened", "control"))
    for kind, role in kinds:
        if not table[kind].lines:  # an interrupted study
            continue
        lr = _best_rate(table[kind])[0]
        shown.append(band(f"{TITLES[kind]}, rate {short(lr)}", curves(table[kind].where(lr=lr), "accuracy"), role))
    yield Figure(
        "preprocessing-table",
        "lines",
        "Raw measurements in a sigmoid net",
        "step",
        "test accuracy",
        tuple(shown),
        "Each input at its best rate; median and range over seeds.",
        "The line of the standardized input climbs at once, that of the raw input stays at the larger class's share.",
        y_range=(0.3, 1.0),
    )
    yield Figure(
        "preprocessing-linear",
        "bars",
        f"Linear model: steps to train loss {short(LOSS)}",
        "",
        "steps",
        (bars("steps", [TITLES[kind] for kind in linear], [item[1] for item in linear.values()], "other"),),
        "Each input at its best rate; median and range over seeds.",
        "Bars of the steps: longest for pixels, shorter for centred and rotated, shortest for whitened.",
    )
    roles: dict[str, Role] = {"raw": "none", "scaled": "other", "standardized": "batch", "whitened": "control"}
    yield Figure(
        "preprocessing-deep",
        "lines",
        "Digits in the deep sigmoid net, without BN",
        "step",
        "test accuracy",
        tuple(band(TITLES[kind], curves(found, "accuracy"), roles[kind]) for kind, found in deep.items()),
        "One rate for all; median and range over seeds.",
        "Raw pixels climb first and highest, pixels divided by 16 last; whitened input ends lowest of the fast ones.",
        y_range=(0.0, 1.0),
    )


def _table_of_table(table: dict[str, Records]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for kind, found in table.items():
        if found.lines:
            lr, steps, final = _best_rate(found)
            rows.append((TITLES[kind], lr, *triple(steps), *triple(final)))
    columns = ("Input", "Best rate", "Steps to 90%", "Low", "High", "Final accuracy", "Low ", "High ")
    return Table("breast_cancer, sigmoid net", columns, tuple(rows), "At the rate with the best final test accuracy.")


def _table_of_linear(linear: dict[str, tuple[float | None, Spread]]) -> Table:
    rows = tuple((TITLES[kind], lr, *triple(steps)) for kind, (lr, steps) in linear.items())
    return Table(
        f"digits, linear, steps to train loss {short(LOSS)}", ("Input", "Best rate", "Steps", "Low", "High"), rows
    )


def _table_of_deep(deep: dict[str, Records]) -> Table:
    rows = tuple((TITLES[kind], *triple(_arrival(found)), *triple(_tops(found))) for kind, found in deep.items())
    columns = ("Input", "Steps to 90%", "Low", "High", "Best accuracy", "Low ", "High ")
    return Table("digits, 3 x 100 sigmoid, without BN", columns, rows)


def _best_rate(found: Records) -> tuple[float, Spread, Spread]:
    """The rate with the best final accuracy, the fastest among equals; its steps to 90% and final accuracy.

    Chosen with an eye on the test part, for every input alike: it is the inputs that are compared, not the rates.
    """
    rows = [(lr, _arrival(found.where(lr=lr)), _final(found.where(lr=lr))) for lr in _lrs(found)]
    return min(
        rows,
        key=lambda row: (-round(row[2].median or 0.0, 2), float("inf") if row[1].median is None else row[1].median),
    )


def _fastest(found: Records) -> tuple[float | None, Spread]:
    """The rate at which the median over seeds of the steps is least, and those steps."""
    steps = found.where(metric="steps_to_loss")
    rows = [(lr, spread([line["value"] for line in steps.where(lr=lr)])) for lr in _lrs(steps)]
    if not rows:
        return None, spread([])
    lr, fastest = min(rows, key=lambda row: float("inf") if row[1].median is None else row[1].median)
    return (None if fastest.median is None else lr), fastest


def _lrs(found: Records) -> tuple[float, ...]:
    return tuple(sorted(set(found.distinct("lr"))))


def _arrival(found: Records) -> Spread:
    return spread([steps_to(curve, THRESHOLD) for curve in curves(found, "accuracy")])


def _tops(found: Records) -> Spread:
    return spread([best(curve) for curve in curves(found, "accuracy")])


def _final(found: Records) -> Spread:
    return spread([rounded(curve[-1][1]) for curve in curves(found, "accuracy")])
