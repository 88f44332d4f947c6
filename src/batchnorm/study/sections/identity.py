"""Section 7: with gamma = sqrt(var + eps) and beta = mean, BN is the identity; and a problem that needs them.

Ioffe & Szegedy 2015, section 3: "we make sure that the transformation inserted in the network can represent the
identity transform".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Series, Spread, Table
from batchnorm.study.measures import best, spread
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.wording import Role, band, curves, listed, ranged, rounded, share, short

TITLES: dict[str, tuple[str, Role]] = {
    "none": ("without", "none"),
    "batch": ("BN", "batch"),
    "batch-plain": ("BN without gamma and beta", "control"),
}
COSTS = {"none": 0.0009, "batch": 0.0017, "batch-plain": 0.0016}
# Half the points are of each arm; a net that draws one line through the plane gets a little more right.
GUESS = 0.7
# An error of the order of float32's rounding.
EXACT = 1e-5
_EDGE = 1.1


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """The algebra, and three nets on the spiral for each seed."""
    wanted = config.identity
    runs = []
    for seed in config.seed_list():
        runs.append(Run(run_id("identity", "algebra", seed=seed), "identity", "algebra", seed, 1, 0.01))
        for norm in TITLES:
            spec: dict[str, Any] = {
                "coarse": 20,
                "lr": wanted.lr,
                "norm": norm,
                "batch": config.batch,
                "width": wanted.width,
                "points": wanted.points,
                "turns": wanted.turns,
            }
            # The regions are drawn for one seed: the others' are as different as the arms are alike.
            spec["grid"] = wanted.grid if seed == config.seed else 0
            name = run_id("identity", "spiral", norm, seed=seed)
            labels = {"lr": wanted.lr}
            runs.append(Run(name, "identity", norm, seed, wanted.steps, wanted.steps * COSTS[norm], spec, labels))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Measure the identity's error, or train one net on the spiral and draw its regions."""
    if run.variant == "algebra":
        return [run.record(1, "error", _identity_error(run.seed))]
    import torch

    from batchnorm.study import data
    from batchnorm.study.execution import train_mlp

    split = data.spiral(run.seed, run.params["points"], turns=run.params["turns"])
    lines, model = train_mlp(run, split, report)
    side = run.params["grid"]
    if side:
        axis = torch.linspace(-_EDGE, _EDGE, side)
        rows, columns = torch.meshgrid(axis, axis, indexing="ij")
        model.eval()
        with torch.no_grad():
            chance = torch.softmax(model(torch.stack([columns, rows], dim=-1).reshape(-1, 2)), dim=1)[:, 1]
        lines.append(
            run.record(run.steps, "regions", [[round(v, 3) for v in row] for row in chance.view(side, side).tolist()])
        )
        features, labels = split.test
        arms = {str(arm): features[labels == arm].round(3).tolist() for arm in (0, 1)}
        lines.append(run.record(run.steps, "points", arms))
    return lines


def _identity_error(seed: int) -> float:
    """max |BN(x) - x| / max |x| with gamma = sqrt(var + eps) and beta = mean, x (256, 100) in float32."""
    import torch

    from batchnorm.study import models

    generator = torch.Generator().manual_seed(seed)
    scale, mean = 3.0 * torch.rand(2, 100, generator=generator)
    x = torch.randn(256, 100, generator=generator) * scale + mean
    layer = models.mlp(100, 1, seed=seed, layers=1, norm="batch")[1]
    assert isinstance(layer, models.NORMS)
    with torch.no_grad():
        # In double: what is measured is the layer's rounding, not this one's.
        wide = x.double()
        layer.weight.copy_((wide.var(0, correction=0) + layer.eps).sqrt())
        layer.bias.copy_(wide.mean(0))
        return float((layer(x) - x).abs().max() / x.abs().max())


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    found = {norm: _tops(records.where(variant=norm)) for norm in TITLES}
    error = spread([line["value"] for line in records.where(variant="algebra", metric="error")])
    if error.median is None or not all(item.values for item in found.values()):
        return None
    return Section(
        name="identity",
        title=SECTIONS["identity"],
        question="What does batch normalization take away from a layer, and do gamma and beta give it back?",
        headline=_headline(found, error),
        shows=tuple(_shows(found, error)),
        does_not_show=(
            "That every problem needs gamma and beta: on digits their absence is not to be seen, the next layer's "
            "weights make up for it; the spiral was chosen because it shows them.",
            "That the nets without are unable to draw the spiral: they were trained at one rate, for "
            f"{config.identity.steps} steps.",
        ),
        setup=_setup(config),
        figures=tuple(_figures(config, records)),
        tables=(_table(found, records),),
    )


def _headline(found: dict[str, Spread], error: Spread) -> str:
    plain, batch, bare = (share(found[norm].median) for norm in TITLES)
    restores = "restore" if (error.high or 0.0) < EXACT else "do NOT restore"
    return (
        f"gamma = sqrt(var + eps) and beta = mean {restores} the input (to {short(error.high)} of its size); on a "
        f"two-arm spiral BN gets {batch} right, without gamma and beta {bare}, without BN {plain}."
    )


def _shows(found: dict[str, Spread], error: Spread) -> Iterator[str]:
    plain, batch, bare = (found[norm] for norm in TITLES)
    yield (
        f"A layer with BN can be any layer without it: the identity is among what it can represent, with an error of "
        f"{ranged(error)} relative to the largest input (float32)."
    )
    assert batch.median is not None
    assert bare.median is not None
    if batch.median - bare.median > 0.05:
        yield (
            f"Without gamma and beta the sigmoids are held in their almost linear middle: {share(bare.median)} on the "
            f"spiral, against {share(batch.median)} with them."
        )
    else:
        yield (
            f"On this run the spiral did not need gamma and beta: {share(bare.median)} without, "
            f"{share(batch.median)} with."
        )
    if plain.median is not None and plain.median < GUESS < batch.median:
        yield f"Without BN the same net hardly learns the spiral in that time ({share(plain.median)})."


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.identity
    return {
        "algebra": "BatchNorm1d(100) in train mode on 256 random rows, gamma and beta set by hand",
        "data": f"two-arm spiral, {short(wanted.turns)} turns, {wanted.points} points: half train, a quarter "
        "validation, a quarter test, drawn per seed",
        "network": f"2 - 3 x {wanted.width} sigmoid - 2, Xavier normal weights, biases 0",
        "training": f"plain SGD, rate {short(wanted.lr)}, batch {config.batch}, {wanted.steps} steps",
        "accuracy": "the best test accuracy that two evaluations in a row hold",
        "seeds": listed(config.seed_list()),
    }


def _figures(config: StudyConfig, records: Records) -> Iterator[Figure]:
    yield Figure(
        "identity-curves",
        "lines",
        "Test accuracy on the spiral",
        "step",
        "test accuracy",
        tuple(
            band(title, curves(records.where(variant=norm), "accuracy"), role) for norm, (title, role) in TITLES.items()
        ),
        "Median and range over seeds.",
        "The net with full batch normalization climbs; the other two stay low for most or all of the time.",
        y_range=(0.4, 1.0),
    )
    for norm, (title, _) in TITLES.items():
        found = records.where(variant=norm)
        regions, points = found.value("regions"), found.value("points")
        if regions is None:
            continue
        side = len(regions)
        axis = tuple(round(-_EDGE + 2 * _EDGE * place / (side - 1), 4) for place in range(side))
        yield Figure(
            f"identity-regions-{norm}",
            "heatmap",
            f"Regions of the spiral: {title}",
            "x",
            "y",
            (
                Series("probability of the second arm", axis, axis, z=tuple(tuple(row) for row in regions)),
                _arm("first arm", points["0"], "data-a"),
                _arm("second arm", points["1"], "data-b"),
            ),
            f"What the net says over the plane, with the test points (seed {config.seed}).",
            f"The plane coloured by the probability of the second arm, {title}; the test points of both arms on it.",
        )


def _arm(name: str, points: list[list[float]], role: Role) -> Series:
    return Series(name, tuple(x for x, _ in points), tuple(y for _, y in points), role=role)


def _table(found: dict[str, Spread], records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for norm, (title, _) in TITLES.items():
        last: list[Any] = [curve[-1][1] for curve in curves(records.where(variant=norm), "accuracy")]
        item = found[norm]
        rows.append((title, rounded(item.median), rounded(item.low), rounded(item.high), rounded(spread(last).median)))
    columns = ("Net", "Best test accuracy", "Low", "High", "At the end")
    return Table("The spiral", columns, tuple(rows), f"Median and range over {len(found['batch'].values)} seeds.")


def _tops(records: Records) -> Spread:
    return spread([best(curve) for curve in curves(records, "accuracy")])
