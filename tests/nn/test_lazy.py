"""Lazy layers become ours, with everything that was asked of them."""

from __future__ import annotations

import pytest
import torch

import batchnorm as bn

KINDS = [
    (bn.nn.LazyBatchNorm1d, bn.nn.BatchNorm1d, torch.nn.LazyBatchNorm1d, (4, 3)),
    (bn.nn.LazyBatchNorm1d, bn.nn.BatchNorm1d, torch.nn.LazyBatchNorm1d, (4, 3, 5)),
    (bn.nn.LazyBatchNorm2d, bn.nn.BatchNorm2d, torch.nn.LazyBatchNorm2d, (4, 3, 2, 5)),
    (bn.nn.LazyBatchNorm3d, bn.nn.BatchNorm3d, torch.nn.LazyBatchNorm3d, (4, 3, 2, 2, 2)),
]
kinds = pytest.mark.parametrize(("lazy", "becomes", "torchs", "shape"), KINDS)
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None, "eps": 1e-3, "dtype": torch.float64},
    {"activation": "relu", "ddof": 0, "on_single_value": "skip", "inference_weight": 0.25, "decay": 0.75},
]


@kinds
@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_becomes_the_layer_that_it_would_have_been(lazy, becomes, torchs, shape, kwargs):
    layer, expected = lazy(**kwargs), becomes(3, **kwargs)
    assert isinstance(layer, torchs)
    assert layer.has_uninitialized_params() == ("affine" not in kwargs or expected.track_running_stats)
    x = torch.randn(shape, dtype=kwargs.get("dtype"))
    torch.testing.assert_close(layer(x, residual=x), expected(x, residual=x))
    assert type(layer) is becomes
    assert repr(layer) == repr(expected)
    assert list(layer.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(layer.state_dict(), expected.state_dict())
    assert {k: v for k, v in vars(layer).items() if not k.startswith("_")} == {
        k: v for k, v in vars(expected).items() if not k.startswith("_")
    }


def test_takes_the_state_of_an_initialised_layer():
    layer, trained = bn.nn.LazyBatchNorm1d(), bn.nn.BatchNorm1d(3)
    trained(torch.randn(8, 3))
    layer.load_state_dict(trained.state_dict())
    layer.eval()
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), trained.eval()(x))


def test_resetting_before_the_first_forward_does_nothing():
    layer = bn.nn.LazyBatchNorm1d()
    layer.reset_parameters()
    assert layer.has_uninitialized_params()


@pytest.mark.parametrize("lazy", [bn.nn.LazyBatchNorm1d, bn.nn.LazyBatchNorm2d, bn.nn.LazyBatchNorm3d])
@pytest.mark.parametrize("shape", [(3,), (3, 3, 3, 3, 3, 3)], ids=["1-D", "6-D"])
def test_the_wrong_rank_is_refused_and_decides_nothing(lazy, shape):
    layer = lazy()
    with pytest.raises(ValueError, match=rf"expected .* input \(got {len(shape)}D input\)"):
        layer(torch.ones(shape))
    assert layer.has_uninitialized_params()
