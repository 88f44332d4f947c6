"""DecorrelatedBatchNorm and IterNorm against the papers in float64: values, statistics, state, refusals."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.nn import DecorrelatedBatchNorm, IterNorm
from nn.whitening_samples import LAYERS, affine, correlated, layers, made, root
from oracles import whitening as oracle

# The last are past the limits of one block and of float64 products, in both layouts.
INPUTS = {
    "2d": ((40, 12), torch.contiguous_format),
    "3d": ((5, 12, 7), torch.contiguous_format),
    "4d": ((3, 12, 5, 4), torch.contiguous_format),
    "4d-channels-last": ((3, 12, 5, 4), torch.channels_last),
    "5d": ((2, 12, 3, 2, 4), torch.contiguous_format),
    "large": ((37, 48, 19, 17), torch.contiguous_format),
    "large-channels-last": ((37, 48, 19, 17), torch.channels_last),
}
inputs = pytest.mark.parametrize(("shape", "layout"), INPUTS.values(), ids=INPUTS.keys())


@layers
@inputs
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_a_training_step_is_the_papers(kind, shape, layout, mean):
    x = correlated(shape, mean).to(memory_format=layout).requires_grad_()
    layer = made(kind, shape[1], 4)
    gamma, beta = affine(layer)
    y = layer(x)
    exact = x.detach().double().numpy()
    expected = oracle.forward(exact, 4, root(kind), gamma, beta)
    torch.testing.assert_close(y.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    dy = torch.randn(shape)
    y.backward(dy)
    assert y.is_contiguous(memory_format=layout)
    assert x.grad.is_contiguous(memory_format=layout)
    direction = np.random.default_rng(0).normal(size=shape)
    along = oracle.gradient(exact, dy.double().numpy(), 4, root(kind), gamma, beta)(direction)
    size = float(x.grad.double().norm())
    assert (x.grad.double().numpy() * direction).sum() == pytest.approx(along, abs=1e-4 * size)
    axes = (0, *range(2, len(shape)))
    torch.testing.assert_close(layer.bias.grad, dy.sum(axes), rtol=1e-5, atol=1e-3)
    x_hat = (expected - beta.reshape(1, -1, *[1] * (len(shape) - 2))) / gamma.reshape(1, -1, *[1] * (len(shape) - 2))
    dgamma = (dy.double().numpy() * x_hat).sum(axes)
    torch.testing.assert_close(layer.weight.grad.double(), torch.from_numpy(dgamma), rtol=1e-4, atol=1e-3)


@inputs
def test_a_batch_comes_out_white(shape, layout):
    x = correlated(shape, 1e3).to(memory_format=layout)
    y = DecorrelatedBatchNorm(shape[1], 6, affine=False)(x)
    mean, cov = oracle.statistics(y.double().movedim(1, -1).reshape(-1, shape[1]).numpy(), 6)
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(cov, np.broadcast_to(np.eye(6), cov.shape), atol=2e-3)  # eps takes its part


@layers
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("large", [False, True])
def test_padding_does_not_count(kind, layout, large):
    shape = (37, 48, 19, 17) if large else (3, 8, 5, 4)
    x = correlated(shape, 1e4)
    mask = torch.rand(shape[0], *shape[2:]) > 0.4
    x = torch.where(mask.unsqueeze(1), x, torch.nan).to(memory_format=layout).requires_grad_()
    residual = torch.where(mask.unsqueeze(1), torch.randn(shape), torch.nan)
    layer = made(kind, shape[1], 4, activation="silu")
    y = layer(x, mask=mask, residual=residual)
    z = oracle.forward(x.detach().double().numpy(), 4, root(kind), *affine(layer), mask.numpy())
    expected = torch.nn.functional.silu(torch.from_numpy(z) + residual.double().nan_to_num())
    expected = torch.where(mask.unsqueeze(1), expected, 0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad.ne(0).any(1), mask)
    rows = x.detach().movedim(1, -1)[mask].double().numpy()
    mean, cov = oracle.statistics(rows, 4)
    count = len(rows)
    torch.testing.assert_close(layer.running_mean.double(), torch.from_numpy(0.1 * mean), rtol=1e-6, atol=1e-6)
    moved = 0.9 * np.eye(4) + 0.1 * cov * count / (count - 1)
    torch.testing.assert_close(layer.running_cov.double(), torch.from_numpy(moved), rtol=1e-5, atol=1e-5)


@layers
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("ddof", [0, 1])
def test_running_statistics_are_averages_of_covariances(kind, momentum, ddof):
    layer = made(kind, 6, 3, momentum=momentum, ddof=ddof)
    mean, cov = np.zeros(6), np.broadcast_to(np.eye(3), (2, 3, 3))
    for step in range(1, 6):
        x = correlated((10, 6), 5.0)
        layer(x)
        m, s = oracle.statistics(x.double().numpy(), 3)
        share = momentum or 1 / step
        mean, cov = (1 - share) * mean + share * m, (1 - share) * cov + share * s * (10 / 9 if ddof else 1)
    assert layer.num_batches_tracked == 5
    torch.testing.assert_close(layer.running_mean.double(), torch.from_numpy(mean), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_cov.double(), torch.from_numpy(cov), rtol=1e-6, atol=1e-6)
    layer.eval()
    x = correlated((7, 6), 5.0)
    running = layer.running_mean.double().numpy(), layer.running_cov.double().numpy()
    expected = oracle.apply(x.double().numpy(), running[0], [root(kind)(s) for s in running[1]], *affine(layer))
    torch.testing.assert_close(layer(x).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    for ours, s in zip(layer.whitening_matrix(), running[1], strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(root(kind)(s)), rtol=1e-8, atol=1e-8)


@layers
def test_eval_sees_a_change_of_the_running_covariance(kind):
    layer = made(kind, 4, 2).eval()
    x = correlated((5, 4))
    before = layer(x)
    layer.running_cov.data.mul_(4)  # .data: no version counter tells of it
    assert not torch.allclose(layer(x), before)


@layers
def test_groups_of_one_are_batch_norm(kind):
    layer, plain = LAYERS[kind](4, 1), bn.nn.BatchNorm1d(4)
    x, z = correlated((9, 4), 3.0), correlated((9, 4), 3.0)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.eval()(z), plain.eval()(z))


@layers
def test_the_backward_uses_the_statistics_of_its_forward(kind):
    layer = made(kind, 4, 2).eval()
    x = correlated((6, 4)).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).pow(2).sum(), x)
    y = layer(x)
    layer.train()
    layer(correlated((6, 4), 7.0))
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x)
    torch.testing.assert_close(grad, expected)


@layers
def test_gamma_and_beta_of_each_sample(kind):
    layer = LAYERS[kind](4, 2)
    x, weight, bias = correlated((5, 4, 3)), torch.randn(5, 4), torch.randn(5, 4)
    white = LAYERS[kind](4, 2, affine=False)(x)
    y = layer(x, weight=weight, bias=bias)
    torch.testing.assert_close(y, white * weight.unsqueeze(-1) + bias.unsqueeze(-1))


@layers
@pytest.mark.parametrize("masked", [False, True])
def test_policies_for_a_single_value(kind, masked):
    layer = made(kind, 4, 2)
    layer(correlated((20, 4), 2.0))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3 if masked else 1, 4)
    mask = torch.tensor([True, False, False]) if masked else None
    with pytest.raises(ValueError, match=r"Expected more than 1 .*value per channel when training"):
        layer(x, mask=mask)
    layer.on_single_value = "running"
    y = layer(x, mask=mask)
    torch.testing.assert_close(y, copy.deepcopy(layer).eval()(x, mask=mask))
    layer.on_single_value = "skip"
    torch.testing.assert_close(layer(x, mask=mask)[0], layer.weight * x[0] + layer.bias)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@layers
def test_state_and_copies(kind):
    layer = made(kind, 6, 3)
    layer(correlated((9, 6)))
    assert list(layer.state_dict()) == ["weight", "bias", "running_mean", "running_cov", "num_batches_tracked"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = correlated((5, 6))
        assert torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))
    fresh = LAYERS[kind](6, 3)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.state_dict(), layer.state_dict(), rtol=0, atol=0)
    fresh.reset_parameters()
    torch.testing.assert_close(fresh.state_dict(), LAYERS[kind](6, 3).state_dict(), rtol=0, atol=0)
    assert "group_size=3" in repr(layer)
    # A program that folds or converts by the running variance fails, and does not go wrong.
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    with pytest.raises(AttributeError, match="running_var"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(layer)


def test_meta_device():
    layer = DecorrelatedBatchNorm(6, 3, device="meta")
    assert layer.running_cov.device.type == "meta"
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), DecorrelatedBatchNorm(6, 3).state_dict(), rtol=0, atol=0)


@layers
def test_bad_input_is_refused_before_it_is_counted(kind):
    with pytest.raises(
        ValueError, match="expected group_size to divide num_features=10, got 4: take one of 1, 2, 5, 10"
    ):
        LAYERS[kind](10, 4)
    with pytest.raises(ValueError, match="expected group_size to divide num_features=10, got 0"):
        LAYERS[kind](10, 0)
    layer = made(kind, 4, 2)
    bad = {
        "expected 2D to 5D input": torch.randn(4),
        "expected an input with 4 channels": torch.randn(6, 3),
        "expected a floating point input": torch.ones(6, 4, dtype=torch.long),
        "expected running_mean to be torch.float64": torch.randn(6, 4).double(),
        "Expected more than 1 value per channel": torch.randn(1, 4),
    }
    for message, x in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            layer(x)
    with pytest.raises(ValueError, match="expected a residual of the input's shape"):
        layer(torch.randn(6, 4), residual=torch.randn(6, 1))
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="expected num_iterations of 0 or more, got -1"):
        IterNorm(4, 2, -1)
    with pytest.raises(ValueError, match="expected running statistics"):
        LAYERS[kind](4, 2, track_running_stats=False).whitening_matrix()


@layers
def test_a_recomputed_forward_does_not_count_twice(kind):
    layer = made(kind, 4, 2)
    x = correlated((6, 4)).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 1
