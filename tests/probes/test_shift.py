"""Covariate shift from records, against values worked out by hand and the study's own measure."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import InputError, RecordsError
from batchnorm.probes import InputPercentiles, movement, shift
from probes.test_movement import LEVELS, quantiles


def record(step, values, layer="bn", mode="train", **changes):
    """A look at ``values``, (values, units), as a watch writes it."""
    values = np.asarray(values, dtype=np.float64)
    return {
        "step": step,
        "layer": layer,
        "mode": mode,
        "count": len(values),
        "units": list(range(values.shape[1])),
        "levels": list(LEVELS),
        "quantiles": quantiles(values),
        "std": values.std(0).tolist(),
        **changes,
    }


X = np.random.default_rng(0).normal(size=(200, 3))


def test_a_steady_drift():
    # Three units that move by .1, .2 and .6 of their standard deviation, 2, every 20 steps.
    std = X.std(0)
    looks = [record(step, X / std * 2.0 + np.array([0.2, 0.4, 1.2]) * step / 20) for step in range(0, 201, 20)]
    (row,) = shift(looks)
    assert (row["layer"], row["mode"], row["looks"], row["units"]) == ("bn", "train", 6, 3)
    assert (row["first"], row["last"], row["every"]) == (100, 200, 20)
    for name in ("percentiles", "wasserstein"):
        assert row[f"{name}_std"] == pytest.approx(1.0)
        assert row[f"{name}_std_worst"] == pytest.approx(3.0)
        assert row[f"{name}_absolute"] == pytest.approx(2.0)
        assert row[f"{name}_absolute_worst"] == pytest.approx(6.0)
        assert row[f"{name}_unit"] == 2
    assert shift(reversed(looks)) == [row]
    assert shift(json.loads(json.dumps(looks))) == [row]


def test_the_first_steps_are_left_out():
    # Unscaled at first: next to no spread, and a jump of many times it.
    looks = [record(0, X * 1e-6), record(50, X * 1e-3 + 1.0)] + [record(step, X) for step in (100, 150, 200)]
    assert shift(looks)[0]["wasserstein_std"] == 0.0
    assert shift(looks, skip=0)[0]["wasserstein_std_worst"] > 1.0
    assert shift(looks, skip=150)[0]["looks"] == 2


def test_looks_that_are_not_evenly_spaced_are_scaled_each_by_its_own_distance():
    looks = [record(100, X), record(150, X + 1.0), record(350, X + 5.0)]
    assert shift(looks)[0]["percentiles_absolute"] == pytest.approx(2.0)


def test_the_studys_measure_is_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid())
    looks, records = [], []
    for step in range(100, 200, 20):
        x = torch.randn(50, 5)
        with InputPercentiles(model[1]) as probe, torch.no_grad():
            model(x)
            records.append(record(step, model[0](x).double().numpy()))
        looks.append(probe.look)
    moved = [movement(a.percentiles, b.percentiles, a.deviations) * 5 for a, b in pairwise(looks)]
    assert shift(records)[0]["percentiles_std"] == pytest.approx(median(moved), rel=1e-12)


def test_batches_of_one_distribution_move_by_chance_alone():
    rng = np.random.default_rng(0)
    (row,) = shift([record(step, rng.normal(3.0, 2.0, (60, 40))) for step in range(100, 1100, 20)])
    assert row["wasserstein_std"] == pytest.approx(row["wasserstein_std_chance"], rel=0.1)
    drifting = [record(step, rng.normal(3.0 + step / 20, 2.0, (60, 40))) for step in range(100, 1100, 20)]
    assert shift(drifting)[0]["wasserstein_std"] > 2 * row["wasserstein_std_chance"]
    # Of more values a watch reads a sample.
    many = [record(step, X, count=count) for step, count in ((100, 1024), (200, 10**6), (300, 10**6))]
    few = [record(step, X, count=1024) for step in (100, 200, 300)]
    assert shift(many)[0]["wasserstein_std_chance"] == shift(few)[0]["wasserstein_std_chance"]


def test_layers_and_modes_are_kept_apart():
    looks = [record(step, X + step, layer, mode) for step in (100, 200) for layer in "ba" for mode in ("train", "eval")]
    rows = shift(looks)
    assert [(row["layer"], row["mode"], row["looks"]) for row in rows] == [
        ("b", "train", 2),
        ("b", "eval", 2),
        ("a", "train", 2),
        ("a", "eval", 2),
    ]
    assert shift([]) == []


def test_too_few_looks_give_no_numbers():
    (row,) = shift([record(20, X), record(100, X)])
    assert (row["looks"], row["every"], row["percentiles_std"], row["wasserstein_unit"]) == (1, None, None, None)
    (row,) = shift([record(20, X)])
    assert (row["looks"], row["first"], row["units"]) == (0, None, 0)


def test_the_worst_unit_has_the_number_that_it_has_in_the_layer():
    looks = [record(step, X + np.array([0.0, 1.0, 0.0]) * step, units=[0, 31, 63]) for step in (100, 120, 140)]
    assert shift(looks)[0]["wasserstein_unit"] == 31


def test_what_is_not_finite_is_passed_over_unit_by_unit():
    looks = [record(step, X + np.array([1.0, 2.0, 3.0]) * step / 100) for step in (100, 200, 300)]
    looks[1]["quantiles"][2] = [None] * len(LEVELS)
    looks[1]["std"][2] = None
    looks[2]["quantiles"][1][-1] = math.inf
    (row,) = shift(looks)
    assert row["wasserstein_absolute"] == pytest.approx(median([1.5, 1.0]))
    assert row["percentiles_absolute"] == pytest.approx(1.5)
    assert row["wasserstein_absolute_worst"] == pytest.approx(2.0)
    assert math.isfinite(row["wasserstein_std_worst"])
    for look in looks:
        look["quantiles"] = [[None] * len(LEVELS)] * 3
    assert shift(looks)[0]["wasserstein_std"] is None


def test_a_unit_without_spread_has_no_movement_in_units_of_std():
    frozen = X * np.array([1.0, 1.0, 0.0])
    looks = [record(step, frozen + np.array([1.0, 1.0, 5.0]) * step / 100) for step in (100, 200)]
    (row,) = shift(looks)
    assert row["wasserstein_absolute_worst"] == pytest.approx(5.0)
    assert row["wasserstein_std_worst"] == pytest.approx(1.0 / X[:, :2].std(0).min())


def test_refusals():
    broken = record(0, X)
    del broken["std"]
    with pytest.raises(RecordsError, match=r"expected records of a watch, with step, .*; got one without 'std'"):
        shift([broken])
    with pytest.raises(InputError, match="skip must be a finite number and not negative, got -1"):
        shift([], skip=-1)
    other = record(200, X, levels=[15.0, 50.0, 85.0], quantiles=quantiles(X, (15.0, 50.0, 85.0)))
    with pytest.raises(InputError, match="expected one set of levels in all looks at 'bn': read one watch at a time"):
        shift([record(100, X), other])
    coarse = [record(step, X, levels=[25.0, 75.0], quantiles=quantiles(X, (25.0, 75.0))) for step in (100, 200)]
    with pytest.raises(RecordsError, match=r"expected quantiles at 15, 50 and 85 per cent, got \[25.0, 75.0\]"):
        shift(coarse)
    with pytest.raises(InputError, match="two looks at the same units, got 3 and 2"):
        shift([record(100, X), record(200, X[:, :2])])
