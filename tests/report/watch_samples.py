"""Records as a watch writes them, made up: the report's tests need no model."""

from __future__ import annotations

import math
import random
from statistics import NormalDist, median
from typing import Any

from report.samples import NASTY

LEVELS = (0.5, *(float(level) for level in range(5, 100, 5)), 99.5)
SHARES = [NormalDist().inv_cdf(level / 100.0) for level in LEVELS]


def record(step: int, layer: str = "bn", units: int = 8, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """One look at a batch norm whose input drifts and whose running statistics catch up."""
    rng = random.Random(f"{layer} {step} {seed}")
    mean = [0.01 * step + unit + rng.gauss(0, 0.1) for unit in range(units)]
    std = [1.0 + 0.1 * unit for unit in range(units)]
    quantiles = [[m + s * share for share in SHARES] for m, s in zip(mean, std, strict=True)]
    gap = [math.exp(-step / 100) + 0.01 * unit for unit in range(units)]
    return {
        "step": step,
        "layer": layer,
        "type": "BatchNorm2d",
        "mode": "train",
        "count": 60,
        "channels": units,
        "units": list(range(units)),
        "mean": mean,
        "std": std,
        "levels": list(LEVELS),
        "quantiles": quantiles,
        "typical": [median(row[at] for row in quantiles) for at in (3, 10, 17)],
        "output_mean": [0.0] * units,
        "output_std": [1.0] * units,
        "dead": 0.125,
        "saturated": None,
        "grad_mean": [0.0] * units,
        "grad_std": [0.01] * units,
        "grad_norm": [0.1] * units,
        "weight": [1.0 + 0.001 * step * unit for unit in range(units)],
        "bias": [0.001 * step] * units,
        "running_mean": mean,
        "running_var": std,
        "mean_gap": gap,
        "var_ratio": [0.8 + 0.05 * unit for unit in range(units)],
    } | changes


def run(layers: int = 1, steps: int = 400, every: int = 20, **changes: Any) -> list[dict[str, Any]]:
    """A whole run; the deeper a layer, the worse its variances."""
    return [
        record(step, f"features.{at}.norm", **{"var_ratio": [1.0, 1.0 + 0.1 * at], "units": 2, **changes})
        for step in range(0, steps, every)
        for at in range(layers)
    ]


def nasty() -> list[dict[str, Any]]:
    """A name that tries to be HTML, the model itself, no numbers, NaN, a look in evaluation, layers of other kinds."""
    nothing = [None] * 2
    found = run(2)
    for step in range(0, 400, 20):
        found.append(record(step, NASTY, dead=0.5, saturated=0.25))
        found.append(
            record(step, "", 2, mean=nothing, std=nothing, quantiles=[[None] * len(LEVELS)] * 2, typical=None)
            | {"mean_gap": nothing, "var_ratio": nothing, "grad_norm": nothing, "weight": nothing, "bias": nothing}
        )
        bare = dict.fromkeys(("mean_gap", "var_ratio", "grad_norm", "weight", "bias", "dead"))
        found.append(record(step, "relu", 2, **{"type": "ReLU", "saturated": 1.0, **bare}))
        found.append(record(step, "features.0.norm", mode="eval"))
        found.append(record(step, "frozen", 2, var_ratio=[0.0, 1.0], grad_norm=[0.0, 0.0]))
    return found
