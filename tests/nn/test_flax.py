"""Against what Flax's BatchNorm computed (``oracles/record_flax.py``)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import batchnorm as bn
from nn.ports import from_ours, layer_of, to_ours

FLAX = json.loads((Path(__file__).parents[1] / "oracles" / "flax_batch_norm.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("name", [name for name in FLAX if name != "large mean"])
def test_trains_on_as_the_flax_layer_that_it_was(name):
    case = FLAX[name]
    settings = {key: case["settings"][key] for key in ("momentum", "epsilon") if key in case["settings"]}
    ours = layer_of(bn.nn.state.from_flax(case["start"], **settings))
    for step in case["steps"]:
        mask = None if "mask" not in step else torch.tensor(step["mask"])
        y = from_ours(ours(to_ours(step["x"]), mask=mask))
        real = ... if mask is None else mask.numpy()
        # A float32 mean of 1e4 is known to several 5e-4, and their outputs no better.
        np.testing.assert_allclose(y[real], np.array(step["y"])[real], rtol=1e-4, atol=1e-2 if "mean" in name else 1e-5)
        if mask is not None:  # Flax normalizes what is masked too; here it is zero
            assert np.abs(y[~mask.numpy()]).sum() == 0
            assert np.abs(np.array(step["y"])[~mask.numpy()]).sum() > 0
        np.testing.assert_allclose(ours.running_mean, step["averages"]["mean"], rtol=1e-5)
        np.testing.assert_allclose(ours.running_var, step["averages"]["var"], rtol=1e-4)
    expected = np.array(case["inference"])
    np.testing.assert_allclose(from_ours(ours.eval()(to_ours(step["x"]))), expected, rtol=1e-4, atol=1e-2)


def test_flax_default_variance_is_lost_at_a_large_mean():
    """``use_fast_variance`` is E[x^2] - E[x]^2 in float32: a difference that is not to be reproduced."""
    case = FLAX["large mean"]
    ours = layer_of(bn.nn.state.from_flax(case["start"]))
    for step in case["steps"]:
        x = np.array(step["x"])
        exact = (x - x.mean((0, 1))) / x.std((0, 1))
        affine = np.array(case["start"]["params"]["scale"]), np.array(case["start"]["params"]["bias"])
        error = np.abs(from_ours(ours(to_ours(x))) - (exact * affine[0] + affine[1])).max()
        theirs = np.abs(np.array(step["y"]) - (exact * affine[0] + affine[1])).max()
        assert error < 1e-3
        assert theirs > 1
