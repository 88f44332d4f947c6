"""Records what Flax's BatchNorm computes: ``python tests/oracles/record_flax.py``, where flax 0.12.8 is installed.

JAX and what Flax needs beside it take three quarters of a gigabyte, too much for everyone's development environment. So
its answers are kept, in ``flax_batch_norm.json``: for each case the settings, three training batches (channels last),
the outputs and the averages after each, and the output for the last batch in inference.
"""

from __future__ import annotations

import json
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np

CASES = {
    "defaults": {},
    "settings": {"momentum": 0.7, "epsilon": 1e-2},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "masked": {"mask": True},
    "large mean": {"mean": 1e4},
    "large mean, slow variance": {"mean": 1e4, "use_fast_variance": False},
}


def record(random: np.random.Generator, mask: bool = False, mean: float = 0.0, **settings: object) -> dict:
    layer = flax.linen.BatchNorm(**settings)
    batches = [(random.standard_normal((4, 5, 3)) * [1, 2, 0.5] + 1 + mean).astype(np.float32) for _ in range(3)]
    masks = [random.random((4, 5)) < 0.6 for _ in range(3)]
    variables = layer.init(jax.random.key(0), jnp.asarray(batches[0]), use_running_average=True)
    variables = {
        group: {name: random.uniform(0.5, 1.5, 3).astype(np.float32) for name in arrays}
        for group, arrays in variables.items()
    }
    case = {"settings": settings, "start": lists(variables), "steps": []}
    for x, real in zip(batches, masks, strict=True):
        where = {"mask": jnp.asarray(real)[..., None]} if mask else {}
        y, moved = layer.apply(variables, jnp.asarray(x), use_running_average=False, mutable=["batch_stats"], **where)
        variables = {**variables, **moved}
        step = {"x": x.tolist(), "y": np.asarray(y).tolist(), "averages": lists(moved)["batch_stats"]}
        case["steps"].append({**step, "mask": real.tolist()} if mask else step)
    case["inference"] = np.asarray(layer.apply(variables, jnp.asarray(x), use_running_average=True)).tolist()
    return case


def lists(variables: dict) -> dict:
    return {
        group: {name: np.asarray(value).tolist() for name, value in arrays.items()}
        for group, arrays in variables.items()
    }


if __name__ == "__main__":
    random = np.random.default_rng(0)
    recorded = {"flax": flax.__version__, "cases": {name: record(random, **case) for name, case in CASES.items()}}
    Path(__file__).with_name("flax_batch_norm.json").write_text(json.dumps(recorded) + "\n", encoding="utf-8")
