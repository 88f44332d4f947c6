"""Ports of a layer's state: names, settings, the kind of variance. test_keras, test_flax: against their layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import batchnorm as bn

STATE = {
    "weight": torch.tensor([0.5, 2.0]),
    "bias": torch.tensor([-1.0, 3.0]),
    "running_mean": torch.tensor([0.25, 1e4]),
    "running_var": torch.tensor([4.0, 0.5]),
    "num_batches_tracked": torch.tensor(7),
}
FRAMEWORKS = {
    "keras": (bn.nn.state.from_keras, bn.nn.state.to_keras),
    "flax": (bn.nn.state.from_flax, bn.nn.state.to_flax),
    "onnx": (bn.nn.state.from_onnx, bn.nn.state.to_onnx),
}
frameworks = pytest.mark.parametrize(("read", "write"), FRAMEWORKS.values(), ids=FRAMEWORKS.keys())


@frameworks
@pytest.mark.parametrize("keep", [("weight", "bias"), ("weight",), ()], ids=str)
def test_there_and_back(read, write, keep):
    state = {key: value for key, value in STATE.items() if key not in ("weight", "bias") or key in keep}
    arrays, settings = write(state, eps=1e-4, momentum=0.2, ddof=0)
    assert settings["momentum"] == 0.8
    back, options = read(arrays, settings["momentum"], settings["epsilon"])
    assert (options["eps"], options["momentum"], options["ddof"]) == (1e-4, 0.2, 0)
    if write is not bn.nn.state.to_onnx:
        assert (options["affine"], options["bias"]) == ("weight" in keep, "bias" in keep)
        assert set(back) == set(state)
    for key in set(state) - {"num_batches_tracked"}:
        assert torch.equal(back[key], state[key]), key


@frameworks
def test_the_variance_is_corrected_where_n_is_known(read, write):
    arrays, settings = write(STATE, ddof=1, n=5)
    plain, _ = write(STATE, ddof=1)
    back, options = read(arrays, settings["momentum"], n=5)
    torch.testing.assert_close(back["running_var"], STATE["running_var"])
    assert options["ddof"] == 1
    kept, options = read(arrays, settings["momentum"])
    torch.testing.assert_close(kept["running_var"], STATE["running_var"] * 4 / 5)
    assert options["ddof"] == 0
    same, _ = read(plain)
    assert torch.equal(same["running_var"], STATE["running_var"])
    already, _ = read(write(STATE, ddof=0, n=5).arrays)
    assert torch.equal(already["running_var"], STATE["running_var"])


def test_beta_without_gamma_gets_a_gamma_of_one():
    arrays = {"beta": np.ones(2), "moving_mean": np.zeros(2), "moving_variance": np.ones(2)}
    state, options = bn.nn.state.from_keras(arrays)
    assert torch.equal(state["weight"], torch.ones(2).double())
    assert options["affine"]
    assert options["bias"]


def test_the_arrays_are_copies():
    arrays = {"moving_mean": np.zeros(2, np.float32), "moving_variance": np.ones(2, np.float32)}
    state, options = bn.nn.state.from_keras(arrays)
    layer = bn.nn.BatchNorm1d(2, **options)
    layer.load_state_dict(state)
    state["running_mean"].fill_(3)
    assert arrays["moving_mean"].sum() == 0
    written, _ = bn.nn.state.to_keras(layer.state_dict())
    written["moving_mean"][:] = 5
    assert layer.running_mean.sum() == 0


def test_bfloat16_goes_over_as_float32():
    arrays, _ = bn.nn.state.to_onnx(
        {key: value.bfloat16() for key, value in STATE.items() if value.is_floating_point()}
    )
    assert arrays["scale"].dtype == np.float32


@frameworks
def test_what_cannot_be_converted_is_refused(read, write):
    arrays, _ = write(STATE)
    with pytest.raises(ValueError, match=r"expected momentum, the weight of the old value, between 0 and 1, got 1\.5"):
        read(arrays, 1.5)
    with pytest.raises(ValueError, match="expected momentum, the weight of the new value, between 0 and 1, got -1"):
        write(STATE, momentum=-1)
    with pytest.raises(ValueError, match="got None: the other frameworks have no cumulative average"):
        write(STATE, momentum=None)
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"expected n, .*, of 2 or more, got {n}"):
            read(arrays, n=n)
        with pytest.raises(ValueError, match=f"expected n, .*, of 2 or more, got {n}"):
            write(STATE, n=n)
    with pytest.raises(ValueError, match=r"expected a batch norm's state with 'running_mean', .*, got 'weight'"):
        write({"weight": STATE["weight"]})
    with pytest.raises(ValueError, match=r"'running_mean', 'running_var', got .*'kernel'"):
        write({**STATE, "kernel": STATE["weight"]})
    with pytest.raises(RuntimeError, match=r"expected arrays of one shape \(C,\), got {'weight': \[2\], 'bias': \[3\]"):
        write({**STATE, "bias": torch.zeros(3)})


def test_foreign_names_that_do_not_fit_are_refused():
    two = np.zeros(2)
    with pytest.raises(ValueError, match=r"expected 'gamma', 'beta', .*, got 'moving_mean'"):
        bn.nn.state.from_keras({"moving_mean": two})
    with pytest.raises(ValueError, match=r"got 'moving_mean', 'moving_variance', 'moving_stddev'"):
        bn.nn.state.from_keras({"moving_mean": two, "moving_variance": two, "moving_stddev": two})
    with pytest.raises(ValueError, match=r"expected the collections 'params' and 'batch_stats' .*, got 'mean'"):
        bn.nn.state.from_flax({"mean": two})
    with pytest.raises(ValueError, match="expected 'scale', 'B', 'input_mean', 'input_var', got 'input_mean'"):
        bn.nn.state.from_onnx({"input_mean": two, "input_var": two})
    with pytest.raises(RuntimeError, match="expected arrays of one shape"):
        bn.nn.state.from_keras({"moving_mean": np.zeros((1, 2)), "moving_variance": np.zeros((1, 2))})
