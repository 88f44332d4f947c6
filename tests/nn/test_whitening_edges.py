"""Where whitening layers go wrong: equal eigenvalues, lost rank, NaN, half precision, many iterations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from batchnorm.nn import DecorrelatedBatchNorm, IterNorm
from nn.whitening_samples import LAYERS, correlated, layers, made
from oracles import whitening as oracle


@layers
def test_gradients_of_every_kind(kind):
    layer = made(kind, 4, 2, torch.float64, track_running_stats=False)
    x = correlated((7, 4, 3), dtype=torch.float64).requires_grad_()
    mask = torch.rand(7, 3) > 0.3

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,), {"mask": mask})

    arguments = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments)


@layers
@pytest.mark.parametrize("shift", [0.0, 1e-9])
def test_gradients_where_eigenvalues_coincide(kind, shift):
    """pytorch #47599, #76531: through eigenvectors they would be NaN, or wrong without a word."""
    # An orthogonal design: the covariance is the identity, all eigenvalues are equal (or differ in the ninth place).
    q = torch.randn(16, 4, dtype=torch.float64)
    q, _ = torch.linalg.qr(q - q.mean(0))
    x = (q * 4 * torch.tensor([1, 1 + shift, 1, 1 - shift])).requires_grad_()
    layer = LAYERS[kind](4, 4, affine=False, track_running_stats=False, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_gradients_of_a_group_wider_than_the_batch():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layer = DecorrelatedBatchNorm(6, 6, affine=False, track_running_stats=False, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_third_derivatives():
    layer = DecorrelatedBatchNorm(3, 3, affine=False, track_running_stats=False, dtype=torch.float64)
    x, v = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def along(t, order):
        if order == 0:
            return layer(x + t * v).pow(3).sum()
        return torch.func.grad(lambda t: along(t, order - 1))(t)

    h = 1e-4
    second = [along(torch.tensor(t, dtype=torch.float64), 2) for t in (h, -h)]
    third = along(torch.tensor(0.0, dtype=torch.float64), 3)
    torch.testing.assert_close(third, (second[0] - second[1]) / (2 * h), rtol=1e-5, atol=1e-5)


def test_directions_without_variance_are_dropped_and_never_amplified():
    """decorrelated_bn #1, scikit-learn #12333: noise in a dependent direction must not come out with variance 1."""
    x = correlated((200, 4))
    x[:, 3] = x[:, 0] + x[:, 1]  # to float32's rounding
    layer = DecorrelatedBatchNorm(4, 4, eps=1e-12, affine=False)
    y = layer(x)
    _, (cov,) = oracle.statistics(y.double().numpy(), 4)
    np.testing.assert_allclose(np.linalg.eigvalsh(cov), [0, 1, 1, 1], atol=1e-4)
    for _ in range(200):
        layer(x)
    layer.eval()
    off = torch.tensor([[1.0, 1, 0, -1]]) / 3**0.5  # the direction in which training showed nothing
    moved = layer(x[:1] + 1e-3 * off) - layer(x[:1])
    assert moved.norm() < 1e-4


@layers
def test_a_constant_channel_gives_beta(kind):
    x = correlated((30, 4))
    x[:, 2] = 1e4
    layer = made(kind, 4, 4).requires_grad_()
    leaf = x.requires_grad_()
    y = layer(leaf)
    torch.testing.assert_close(y[:, 2], layer.bias[2].expand(30))
    y.square().sum().backward()
    assert leaf.grad.isfinite().all()


@layers
def test_nan_stays_in_its_group(kind):
    x = correlated((9, 6)).requires_grad_()
    spoiled = x.detach().clone()
    spoiled[3, 1] = torch.nan
    layer = made(kind, 6, 3)
    twin = copy.deepcopy(layer)
    expected, y = layer(x), twin(spoiled.requires_grad_())
    assert y[:, :3].isnan().all()
    torch.testing.assert_close(y[:, 3:], expected[:, 3:])
    expected[:, 3:].square().sum().backward()
    y[:, 3:].square().sum().backward()
    torch.testing.assert_close(spoiled.grad[:, 3:], x.grad[:, 3:])
    torch.testing.assert_close(twin.running_cov[1], layer.running_cov[1])


def test_newtons_iteration_neither_diverges_nor_amplifies():
    scales = torch.logspace(0, -3, 6, dtype=torch.float64)  # variances over six orders
    x = torch.randn(500, 6, dtype=torch.float64) * scales
    x = x @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    exact = DecorrelatedBatchNorm(6, 6, eps=1e-14, affine=False, dtype=torch.float64)(x)
    for iterations in (40, 100):
        y = IterNorm(6, 6, iterations, eps=1e-14, affine=False, dtype=torch.float64)(x)
        torch.testing.assert_close(y, exact, rtol=1e-6, atol=1e-6)
    layer = IterNorm(6, 6, 5, affine=False, dtype=torch.float64, momentum=1.0)
    layer(x)
    trace = float(layer.running_cov.diagonal(dim1=1, dim2=2).sum())
    assert torch.linalg.eigvalsh(layer.whitening_matrix()).max() <= 1.5**5 / trace**0.5 + 1e-12


@layers
def test_half_precision_and_autocast_keep_the_statistics(kind):
    x = correlated((64, 16, 40, 4), 3.0)
    layer = made(kind, 16, 8)
    half = copy.deepcopy(layer)(x.bfloat16())
    expected = copy.deepcopy(layer).double()(x.bfloat16().double())
    torch.testing.assert_close(half.double(), expected, rtol=2e-2, atol=2e-2)
    cast, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = cast(ours)
        y.square().sum().backward()
    expected = plain(theirs)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(cast.running_cov, plain.running_cov)
