"""Data that break careless arithmetic: far from zero, constant, alone, at the limits of a type, infinite, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from batchnorm.ops import reference
from ops.triton.interpreted.comparing import FLOAT32, KERNELS, assert_equal
from ops.triton.interpreted.ways import ROUTES, take
from oracles import batch_norm as oracle

EPS = 1e-5
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
in_either_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())

# Each way with one of the two formats: the interpreter is slow.
WAYS = [
    (ROUTES[0], FORMATS["channels_last"]),
    (ROUTES[1], FORMATS["contiguous"]),
    (ROUTES[2], FORMATS["channels_last"]),
]
by_each_way = pytest.mark.parametrize(("route", "memory_format"), WAYS, ids=ROUTES)

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NumPy's, of infinities
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def step(kernels, x, grad, weight=None, bias=None, activation="none", mask=None):
    """Forward and backward: y, mean, var, dx, dweight, dbias."""
    y, count, mean, var, invstd, _ = kernels.train_forward(x, weight, bias, None, mask, EPS, activation)
    saved = (mean, invstd, weight, bias, None, None, mask, activation, count, False)
    return y, mean, var, *kernels.train_backward(grad, x, *saved)[:3]


def relative_error(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


@by_each_way
def test_a_mean_of_1e4_costs_no_digits_and_torch_is_no_better(memory_format, route, monkeypatch):
    take(route, monkeypatch)
    x = (torch.randn(6, 3, 7, 9, dtype=torch.float64) + 1e4).float().contiguous(memory_format=memory_format)
    grad = torch.randn(x.shape).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(3), torch.randn(3)
    ours = step(KERNELS, x, grad, weight, bias, "relu")
    exact = step(reference, x.double(), grad.double(), weight.double(), bias.double(), "relu")
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    theirs = functional.relu(functional.batch_norm(leaf, None, None, weight, bias, training=True, eps=EPS))
    theirs.backward(grad)
    for index, peer in ((0, theirs.detach()), (3, leaf.grad)):
        error = relative_error(ours[index], exact[index])
        assert error < 2e-6
        assert error <= max(relative_error(peer, exact[index]), 4 * FLOAT32)
    # The oracle, which shares no line with the reference.
    y, mean, var = oracle.forward(x.numpy(), weight_of(weight), weight_of(bias), eps=EPS, activation="relu")
    np.testing.assert_allclose(ours[0].numpy(), y, rtol=0, atol=4e-6)
    np.testing.assert_allclose(ours[1].numpy(), mean, rtol=1e-10)
    np.testing.assert_allclose(ours[2].numpy(), var, rtol=2e-6)


def weight_of(parameter):
    return parameter.double().numpy().reshape(1, -1)


@in_either_format
def test_a_first_tile_far_from_the_rest(memory_format):
    x = torch.randn(64, 2, 4, 4)
    x[:2] += 1e4  # where the sums find their origin
    x = x.contiguous(memory_format=memory_format)
    _, mean, m2 = KERNELS.stats(x, None)
    _, exact_mean, exact_m2 = reference.stats(x.double(), None)
    torch.testing.assert_close(mean, exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(m2, exact_m2, rtol=1e-5, atol=0)


@in_either_format
@pytest.mark.parametrize("value", [0.1, -1e4])
def test_constant_channels_come_out_as_the_bias(memory_format, value):
    x = torch.full((4, 3, 5, 5), value).contiguous(memory_format=memory_format)
    y, mean, var, dx, *_ = step(KERNELS, x, torch.randn_like(x), bias=torch.tensor([1.0, -2.0, 0.0]))
    torch.testing.assert_close(mean, torch.full((3,), value, dtype=torch.float32).double(), rtol=1e-12, atol=0)
    assert bool((var >= 0).all())
    assert bool((var <= (1e-6 * abs(value)) ** 2).all())
    torch.testing.assert_close(y, torch.tensor([1.0, -2.0, 0.0]).view(1, 3, 1, 1).expand_as(y), rtol=0, atol=1e-5)
    assert bool(dx.isfinite().all())


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)])
def test_a_single_value(shape):
    x = torch.randn(shape)
    y, mean, var, dx, *_ = step(KERNELS, x, torch.ones_like(x))
    assert not y.any()
    assert not var.any()
    assert not dx.any()
    assert torch.equal(mean, x.double().flatten())


@by_each_way
@pytest.mark.parametrize("bad", [float("-inf"), float("nan")])
def test_an_infinity_or_nan_stays_in_its_channel(memory_format, bad, route, monkeypatch):
    take(route, monkeypatch)
    x = torch.randn(6, 3, 7, 9)
    x[3, 1, 4, 4] = bad
    x = x.contiguous(memory_format=memory_format)
    grad = torch.randn(x.shape).contiguous(memory_format=memory_format)
    ours = step(KERNELS, x, grad, activation="relu")
    exact = step(reference, x, grad, activation="relu")
    clean = [0, 2]
    for result, truth in zip(ours, exact, strict=True):
        channel = 1 if result.dim() == 4 else 0
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert bool(result.index_select(channel, torch.tensor(clean)).isfinite().all())
    assert torch.equal(ours[1].isinf(), exact[1].isinf())  # a mean of infinity, and not of NaN


@in_either_format
def test_float16_at_its_limits(memory_format):
    x = (torch.rand(4, 3, 6, 5) * 131000 - 65500).half().contiguous(memory_format=memory_format)
    x[0, 0] = 65504
    ours = step(KERNELS, x, torch.randn_like(x))
    exact = step(reference, x.double(), torch.zeros_like(x).double())
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(ours[2], exact[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-3, atol=2e-3)
    tiny = (torch.randn(4, 3, 6, 5) * 2**-20).half().contiguous(memory_format=memory_format)  # subnormal
    torch.testing.assert_close(KERNELS.stats(tiny, None)[2], reference.stats(tiny, None)[2], rtol=1e-5, atol=0)


@in_either_format
def test_what_is_masked_does_not_count_whatever_it_is(memory_format):
    x = torch.randn(5, 3, 4, 7).contiguous(memory_format=memory_format)
    mask = torch.rand(5, 4, 7) > 0.4
    spoilt = torch.where(mask.unsqueeze(1), x, float("nan")).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    spoilt_grad = torch.where(mask.unsqueeze(1), grad, float("inf"))
    assert_equal(
        step(KERNELS, spoilt, spoilt_grad, activation="silu", mask=mask),
        step(KERNELS, x, grad, activation="silu", mask=mask),
    )
    nothing = torch.zeros(5, 4, 7, dtype=torch.bool)
    for result in step(KERNELS, spoilt, spoilt_grad, mask=nothing):
        assert not result.any()


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_bits_every_time(route, monkeypatch):
    take(route, monkeypatch)
    x, grad = torch.randn(7, 2, 5, 6), torch.randn(7, 2, 5, 6)
    first = step(KERNELS, x, grad, activation="gelu")
    assert_equal(step(KERNELS, x.clone(), grad.clone(), activation="gelu"), first)


def test_the_backward_is_on_the_forwards_side_of_the_kink():
    """z within a rounding of 0: where y is positive the gradient passes, and nowhere else."""
    x = torch.randn(64, 8)
    grad = torch.ones_like(x)
    one = torch.ones(8, dtype=torch.float64)
    mean, invstd = 0.3 + 0.1 * torch.randn(8, dtype=torch.float64), one * 1.7
    bias = (-(x[0].double() - mean) * invstd).float()  # the first row is at the kink, give or take a rounding
    y = KERNELS.normalize(x, mean, invstd, None, bias, None, None, "relu")[0]
    saved = (grad, x, mean, invstd, None, bias, None, None, None, "relu")
    dz = KERNELS.grad_input(*saved, one[0], one * 0, one * 0, True)[1]
    assert torch.equal(dz > 0, y > 0)
