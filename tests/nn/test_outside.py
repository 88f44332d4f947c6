"""Normalization outside the gradient: how it fails, and the re-expression that does not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from batchnorm.nn import NormOutsideGradient, WhitenedLinear
from oracles import whitening as oracle

KINDS = {"mean": {}, "mean-variance": {}, "whitening": {"group_size": 2}}
kinds = pytest.mark.parametrize("kind", KINDS)


def matrices(kind, cov, eps=1e-5):
    return [np.eye(len(each)) if kind == "mean" else oracle.zca(each, eps, 1e-6) for each in cov]


@kinds
def test_statistics_are_of_the_batch_and_constant(kind):
    layer = NormOutsideGradient(4, kind, **KINDS[kind])
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-1, 1)
    gamma, beta = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    x = (torch.randn(9, 4, 3) * torch.tensor([1, 2, 3, 4.0]).view(-1, 1) + 7).requires_grad_()
    rows = x.detach().double().movedim(1, -1).reshape(-1, 4).numpy()
    mean, cov = oracle.statistics(rows, 2 if kind == "whitening" else 1)
    w = matrices(kind, cov)
    y = layer(x)
    expected = oracle.apply(x.detach().double().numpy(), mean, w, gamma, beta)
    torch.testing.assert_close(y.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(x)
    y.backward(dy)
    # W is symmetric: the gradient is W (gamma dy), and the statistics have no part in it.
    back = oracle.apply((dy * layer.weight.detach().view(-1, 1)).double().numpy(), 0, w, 1, 0)
    torch.testing.assert_close(x.grad.double(), torch.from_numpy(back), rtol=1e-5, atol=1e-5)


@kinds
def test_statistics_are_held_between_refreshes(kind):
    layer = NormOutsideGradient(4, kind, every=3, affine=False, **KINDS[kind])
    batches = [torch.randn(8, 4) + step for step in range(7)]
    running_mean = np.zeros(4)
    for step, x in enumerate(batches):
        y = layer(x)
        source = batches[step - step % 3].double().numpy()
        mean, cov = oracle.statistics(source, layer.group_size)
        expected = oracle.apply(x.double().numpy(), mean, matrices(kind, cov), 1, 0)
        torch.testing.assert_close(y.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
        if step % 3 == 0:
            running_mean = 0.9 * running_mean + 0.1 * mean
    assert layer.num_batches_tracked == 7
    torch.testing.assert_close(layer.running_mean.double(), torch.from_numpy(running_mean), rtol=1e-6, atol=1e-6)
    x = torch.randn(5, 4)
    expected = oracle.apply(
        x.double().numpy(), layer.running_mean.numpy(), matrices(kind, layer.running_cov.double().numpy()), 1, 0
    )
    torch.testing.assert_close(layer.eval()(x).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_held_statistics_under_vmap():
    """Where a batch is a refresh is then a question for each model."""
    layers = [NormOutsideGradient(2, every=2) for _ in range(2)]
    layers[1](torch.randn(6, 2))  # the next batch of this one is no refresh
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(6, 2) + 3
    y = torch.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(y[i], layer(x))
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer)


@pytest.mark.parametrize("layer", [NormOutsideGradient(1, "mean", affine=False), None], ids=["outside", "inside"])
def test_a_bias_before_a_constant_mean_grows_without_bound(layer):
    """Ioffe & Szegedy (2015), section 2: b + (-mean(u + b)) does not depend on b, and its gradient says it does."""
    u, target = torch.randn(100, 1), torch.randn(100, 1) + 2
    b = torch.zeros(1, requires_grad=True)
    history, losses = [], []
    for _ in range(500):
        x = u + b
        y = x - x.mean() if layer is None else layer(x)
        loss = mse_loss(y, target)
        (gradient,) = torch.autograd.grad(loss, b)
        with torch.no_grad():
            b -= 0.1 * gradient
        history.append(b.item())
        losses.append(loss.item())
    assert max(losses) - min(losses) < 1e-4 * losses[0]
    if layer is None:
        assert abs(history[-1]) < 1e-4  # the gradient knows the mean: nothing to gain, nothing moves
    else:
        # The same step each time: 0.1 * 2 * the mean difference, which no step makes smaller.
        step = 0.2 * float(target.mean())
        np.testing.assert_allclose([history[0], history[9], history[499]], [step, 10 * step, 500 * step], rtol=1e-3)


def test_options_are_checked():
    with pytest.raises(ValueError, match="expected kind to be one of 'mean', 'mean-variance', 'whitening', got 'var'"):
        NormOutsideGradient(4, "var")
    with pytest.raises(ValueError, match="expected every to be 1 or more, got 0"):
        NormOutsideGradient(4, every=0)
    with pytest.raises(ValueError, match='expected group_size with kind="whitening" alone, got 2'):
        NormOutsideGradient(4, "mean", group_size=2)
    with pytest.raises(ValueError, match="expected momentum to be a number, got None"):
        NormOutsideGradient(4, momentum=None)
    layer = NormOutsideGradient(4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 4))
    assert layer.num_batches_tracked == 0
    assert "kind='mean-variance', every=1" in repr(layer)


def ill_conditioned(samples, width):
    """Inputs with deviations from 0.03 to 3, correlated, about a mean of 5."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return torch.randn(samples, width, generator=generator) * torch.logspace(-1.5, 0.5, width) @ mix + 5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(500, 6), (20, 25, 6)])
def test_reprojection_changes_no_output_and_whitens_the_input(bias, shape):
    layer = WhitenedLinear(6, 4, bias, momentum=None)
    x = ill_conditioned(500, 6).reshape(shape)
    before = layer(x)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(before, plain)
    for _ in range(2):  # the second time from coordinates that are no longer the canonical ones
        layer.reproject()
        torch.testing.assert_close(layer.eval()(x), plain, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(layer.to_linear()(x), plain, rtol=1e-5, atol=1e-4)
        layer.train()(x + 1)
    if not bias:
        assert torch.equal(layer.center, torch.zeros(6))
        return
    layer = WhitenedLinear(6, 4, momentum=None)
    layer(x)
    layer.reproject()
    white = ((x - layer.center) @ layer.whitening).double().reshape(-1, 6).numpy()
    mean, (cov,) = oracle.statistics(white, 6)
    np.testing.assert_allclose(mean, 0, atol=1e-3)
    np.testing.assert_allclose(cov, np.eye(6), atol=0.02)
    _, (original,) = oracle.statistics(x.double().reshape(-1, 6).numpy(), 6)
    assert np.linalg.cond(original) > 1000 * np.linalg.cond(cov)


def test_reprojection_leaves_directions_without_variance_alone():
    layer = WhitenedLinear(4, 3, momentum=None)
    x = torch.randn(50, 4)
    x[:, 2] = 1.0
    before = layer(x)
    layer.reproject()
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.whitening[2], torch.tensor([0, 0, 1.0, 0]))


def test_running_statistics_of_the_input():
    layer = WhitenedLinear(3, 2)
    mean, cov = np.zeros(3), np.eye(3)
    for step in range(3):
        x = torch.randn(4, 5, 3) + step
        mask = torch.rand(4, 5) > 0.3
        y = layer(torch.where(mask.unsqueeze(-1), x, torch.nan), mask=mask)
        assert torch.equal(y.ne(0).any(-1), mask)
        m, (s,) = oracle.statistics(x[mask].double().numpy(), 3)
        mean, cov = 0.9 * mean + 0.1 * m, 0.9 * cov + 0.1 * s
    torch.testing.assert_close(layer.running_mean.double(), torch.from_numpy(mean), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_cov.double(), torch.from_numpy(cov), rtol=1e-6, atol=1e-6)
    layer.eval()(torch.randn(4, 3))
    assert layer.num_batches_tracked == 3


def steps_to_learn(layer, rate, every=None, limit=2000):
    """Plain SGD on full batches of a linear problem with ill-conditioned input, until the loss is 1e-3 of its first."""
    x = ill_conditioned(256, 8)
    target = x @ torch.linspace(-1, 1, 8).unsqueeze(1) * 0.5 + x[:, :1]
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    first = None
    for step in range(limit):
        loss = mse_loss(layer(x), target)
        first = loss.item() if first is None else first
        if loss.item() < 1e-3 * first:
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if every and step % every == 0:
            layer.reproject()
    return limit


def test_training_takes_fewer_steps_in_white_coordinates():
    torch.manual_seed(0)
    start = torch.nn.Linear(8, 1)
    # The best of a grid for plain SGD; one ordinary rate for white input.
    plain = min(steps_to_learn(copy.deepcopy(start), rate) for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2))
    white = WhitenedLinear.from_linear(start, momentum=None)
    white(ill_conditioned(256, 8))
    white.reproject()
    ours = steps_to_learn(white, 0.3, every=20)
    assert ours < 100
    assert plain > 5 * ours


def test_conversions_keep_the_function():
    plain = torch.nn.Linear(5, 3)
    layer = WhitenedLinear.from_linear(plain)
    x = torch.randn(7, 5)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.to_linear().state_dict(), dict(plain.state_dict()))


def test_bad_input_of_a_whitened_linear():
    layer = WhitenedLinear(3, 2)
    with pytest.raises(ValueError, match=r"expected an input of shape \(N, \*, 3\), got \[2, 4\]"):
        layer(torch.randn(2, 4))
    with pytest.raises(TypeError, match="expected a floating point input"):
        layer(torch.ones(2, 3, dtype=torch.int))
    with pytest.raises(TypeError, match="expected a boolean mask"):
        layer(torch.randn(2, 3), mask=torch.ones(2))
    with pytest.raises(ValueError, match=r"expected a mask broadcastable to \[2\], got \[3\]"):
        layer(torch.randn(2, 3), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected eps to be positive, got 0"):
        WhitenedLinear(3, 2, eps=0)
    assert layer.num_batches_tracked == 0
