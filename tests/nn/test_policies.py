"""decay and momentum, ddof, the cumulative average, and the batch with a single value."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.nn.functional import batch_norm
from oracles import batch_norm as oracle


def test_decay_is_the_complement_of_momentum():
    assert bn.nn.BatchNorm1d(3, decay=0.99).momentum == pytest.approx(0.01)
    assert bn.nn.BatchNorm1d(3, decay=1).momentum == 0
    x = torch.randn(8, 3)
    ours, theirs = bn.nn.BatchNorm1d(3, decay=0.75), torch.nn.BatchNorm1d(3, momentum=0.25)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"decay": 0.9, "momentum": 0.2}, "expected momentum or decay, got both: momentum=0.2, decay=0.9"),
        ({"decay": 0.9, "momentum": None}, "expected momentum or decay, got both: momentum=None, decay=0.9"),
        ({"decay": 1.5}, "expected decay between 0 and 1, got 1.5"),
        ({"decay": float("nan")}, "expected decay between 0 and 1, got nan"),
        ({"ddof": 2}, "expected ddof to be one of 0, 1, got 2"),
        (
            {"on_single_value": "ignore"},
            "expected on_single_value to be one of 'raise', 'running', 'skip', got 'ignore'",
        ),
        (
            {"on_single_value": "running", "track_running_stats": False},
            'on_single_value="running" needs running statistics, got track_running_stats=False',
        ),
        ({"inference_weight": -0.1}, "expected inference_weight from 0 to 1, got -0.1"),
    ],
)
@pytest.mark.parametrize("make", [lambda **kw: bn.nn.BatchNorm1d(3, **kw), bn.nn.LazyBatchNorm1d], ids=["", "lazy"])
def test_the_constructor_refuses(make, kwargs, words):
    with pytest.raises(bn.InputError) as caught:
        make(**kwargs)
    assert str(caught.value) == words


def test_what_is_not_the_default_is_shown_and_kept():
    kwargs = {"ddof": 0, "on_single_value": "skip", "inference_weight": 0.25}
    layer = bn.nn.BatchNorm2d(3, decay=0.75, **kwargs)
    assert "momentum=0.25" in repr(layer)
    assert repr(layer).endswith("ddof=0, on_single_value='skip', inference_weight=0.25)")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert {name: getattr(twin, name) for name in kwargs} == kwargs


@pytest.mark.parametrize("shift", [0.0, 1e4], ids=["easy", "mean 1e4"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_running_variance_biased_and_unbiased(ddof, shift):
    x = (torch.randn(7, 3, 2) + shift).double()
    layer = bn.nn.BatchNorm1d(3, momentum=1.0, ddof=ddof).double()
    layer(x)
    rows = np.moveaxis(x.numpy(), 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(layer.running_var.numpy(), rows.var(axis=0, ddof=ddof), rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_cumulative_average_is_the_mean_over_batches(masked):
    layer = bn.nn.BatchNorm1d(2, momentum=None, ddof=0).double()
    means, variances = [], []
    for size in (3, 9, 2, 5):
        x = torch.randn(size, 2).double()
        kwargs = {}
        if masked:
            x = torch.cat([x, torch.full((2, 2), float("nan")).double()])
            kwargs["mask"] = torch.arange(size + 2) < size
            layer(x, mask=torch.zeros(size + 2, dtype=torch.bool))  # says nothing, weighs nothing
        layer(x, **kwargs)
        means.append(x[:size].mean(0))
        variances.append(x[:size].var(0, correction=0))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack(variances).mean(0))
    assert layer.num_batches_tracked == 4


# --- a single value ---------------------------------------------------------------------------------------------------

SINGLE = {
    "one row": (torch.tensor([[3.0, -2.0]]), {}),
    "one position": (torch.tensor([[[3.0], [-2.0]]]), {}),
    "masked rows": (torch.tensor([[3.0, -2.0], [9.0, float("nan")]]), {"mask": torch.tensor([True, False])}),
    "one length": (torch.full((2, 2, 2), float("nan")), {"lengths": torch.tensor([0, 1])}),
}
SINGLE["one length"][0][1, :, 0] = torch.tensor([3.0, -2.0])
singles = pytest.mark.parametrize(("x", "kwargs"), SINGLE.values(), ids=SINGLE.keys())
ways = pytest.mark.parametrize("way", ["eager", "compiled"])


def trained(**kwargs):
    layer = bn.nn.BatchNorm1d(2, activation="leaky_relu", **kwargs)
    with torch.no_grad():
        for name, tensor in layer.named_parameters():
            tensor.copy_(torch.tensor([2.0, 0.5] if name == "weight" else [1.0, -1.0]))
    layer(torch.randn(8, 2) * 2 + 1)
    return layer


def called(layer, way):
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager") if way == "compiled" else layer


@singles
def test_raise(x, kwargs):
    layer = trained()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"Expected more than 1 (real )?value per channel when training, got"):
        layer(x, **kwargs)
    assert str(layer.state_dict()) == str(before)


@ways
@singles
@pytest.mark.parametrize("policy", ["running", "skip"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_running_and_skip(policy, momentum, way, x, kwargs):
    layer = trained(on_single_value=policy, momentum=momentum)
    before = copy.deepcopy(layer.state_dict())
    leaf = x.clone().requires_grad_()
    y = called(layer, way)(leaf, **kwargs)
    y.sum().backward()
    if policy == "running":
        mean, std = layer.running_mean, torch.sqrt(layer.running_var + layer.eps)
    else:
        mean, std = torch.zeros(2), torch.ones(2)
    x_hat = (torch.tensor([3.0, -2.0]) - mean) / std
    z = layer.weight * x_hat + layer.bias
    slope = torch.where(z > 0, 1.0, 0.01)
    real = y.detach().abs() > 0
    torch.testing.assert_close(y[real].detach(), (z * slope).detach())
    torch.testing.assert_close(leaf.grad[real], (slope * layer.weight / std).detach())
    assert leaf.grad[~real].abs().sum() == 0
    assert real.sum() == 2
    torch.testing.assert_close(layer.weight.grad, slope.detach() * x_hat)
    torch.testing.assert_close(layer.bias.grad, slope.detach())
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    torch._dynamo.reset()


@ways
@pytest.mark.parametrize("policy", ["running", "skip"])
def test_two_values_are_normalized_as_ever(policy, way):
    layer, plain = bn.nn.BatchNorm1d(2, on_single_value=policy), bn.nn.BatchNorm1d(2)
    run = called(layer, way)
    x = torch.randn(4, 2, 3)
    for kwargs in ({}, {"lengths": torch.tensor([1, 0, 1, 0])}, {"lengths": torch.tensor([0, 0, 0, 0])}):
        torch.testing.assert_close(run(x, **kwargs), plain(x, **kwargs))
        torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["running", "skip"])
def test_an_epoch_with_a_ragged_last_batch(policy):
    """scvi-tools #2314: 65 samples in batches of 16 leave one."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), bn.nn.BatchNorm1d(4, on_single_value=policy))
    for batch in torch.randn(65, 3).split(16):
        model(batch).square().sum().backward()
    assert model[1].num_batches_tracked == 4
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_tracking_switched_off_normalizes_a_single_value_with_what_was_tracked():
    layer = trained(on_single_value="running")
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    x = torch.tensor([[3.0, -2.0]])
    torch.testing.assert_close(layer(x), copy.deepcopy(layer).eval()(x))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_functional_running_needs_running_statistics():
    with pytest.raises(bn.InputError, match='on_single_value="running" needs running_mean and running_var'):
        batch_norm(torch.ones(1, 3), None, None, training=True, on_single_value="running")


def test_one_value_of_each_sample_is_not_single():
    y = bn.nn.BatchNorm1d(2)(x := torch.randn(2, 2))
    expected, *_ = oracle.forward(x.numpy(), np.ones(2), np.zeros(2), eps=1e-5)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5)
