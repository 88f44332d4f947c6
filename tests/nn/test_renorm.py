"""Batch renormalization: against the paper in float64, its bounds, schedules, warm-up, and others' cases."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from oracles import renorm

LAYERS = {2: bn.nn.BatchRenorm1d, 3: bn.nn.BatchRenorm1d, 4: bn.nn.BatchRenorm2d, 5: bn.nn.BatchRenorm3d}


def made(shape, **kwargs):
    layer = LAYERS[len(shape)](shape[1], **kwargs)
    with torch.no_grad():
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name or "weight" in name else -0.5))
    return layer


def hard(shape, kind):
    x = torch.randn(shape)
    if kind == "mean 1e4":
        x = x + 1e4
    elif kind == "constant channel":
        x[:, 0] = 3.0
    elif kind == "shifted":
        x = 4 * x + 3
    return x


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 2, 5), (3, 3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", ["easy", "shifted", "constant channel", "mean 1e4"])
@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.1, 0.2)], ids=["wide", "narrow"])
def test_the_paper_in_float64(shape, kind, r_max, d_max):
    layer = made(shape, r_max=r_max, d_max=d_max)
    if kind == "mean 1e4":
        layer.running_mean.add_(1e4)
    for _ in range(3):
        x, dy = hard(shape, kind), torch.randn(shape)
        before = (layer.running_mean.numpy().copy(), layer.running_var.numpy().copy())
        gamma, beta = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        r, d = renorm.corrections(x.numpy(), *before, eps=1e-5, r_max=r_max, d_max=d_max)
        expected = renorm.forward(x.numpy(), gamma, beta, r, d, eps=1e-5)
        dx, dgamma, dbeta, _ = renorm.backward(dy.numpy(), x.numpy(), gamma, beta, r, d, eps=1e-5)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        np.testing.assert_allclose(y.detach(), expected, rtol=1e-5, atol=1e-5)
        scale = np.abs(dx).max()
        np.testing.assert_allclose(leaf.grad.numpy() / scale, dx / scale, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.weight.grad, dgamma, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(layer.bias.grad, dbeta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_masks_residual_and_activation(activation):
    shape = (5, 3, 4)
    layer = made(shape, activation=activation)
    x, dy, residual = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    lengths = torch.tensor([4, 2, 3, 0, 1])
    mask = np.arange(4) < lengths.numpy()[:, None]
    x[~torch.tensor(mask)[:, None].expand(shape)] = float("nan")
    before = (layer.running_mean.numpy().copy(), layer.running_var.numpy().copy())
    gamma, beta = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    r, d = renorm.corrections(x.numpy(), *before, eps=1e-5, r_max=3.0, d_max=5.0, mask=mask)
    options = {"eps": 1e-5, "mask": mask, "residual": residual.numpy(), "activation": activation}
    expected = renorm.forward(x.numpy(), gamma, beta, r, d, **options)
    gradients = renorm.backward(dy.numpy(), x.numpy(), gamma, beta, r, d, **options)
    x.requires_grad_()
    residual.requires_grad_()
    y = layer(x, lengths=lengths, residual=residual)
    y.backward(dy)
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-5, atol=1e-5)
    found = (x.grad, layer.weight.grad, layer.bias.grad, residual.grad)
    for ours, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_r_and_d_stay_within_their_bounds():
    """Elsewhere the clipped values were computed and thrown away."""
    layer = bn.nn.BatchRenorm1d(2, r_max=2.0, d_max=0.5, affine=False)
    layer.running_mean.copy_(torch.tensor([-1e6, 1e6]))
    layer.running_var.copy_(torch.tensor([1e-8, 1e8]))
    x = torch.randn(64, 2)
    x_hat = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
    torch.testing.assert_close(layer(x), x_hat * torch.tensor([2.0, 0.5]) + torch.tensor([0.5, -0.5]))


def test_within_the_bounds_training_is_what_eval_would_be():
    layer = made((8, 3), r_max=1e6, d_max=1e6)
    x = torch.randn(8, 3) * 2 + 1
    expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), expected)


def test_without_room_it_is_batch_normalization():
    layer, plain = made((8, 3), r_max=1.0, d_max=0.0), bn.nn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = torch.randn(8, 3) * 2 + 1
        torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"decay": 0.7, "ddof": 0}], ids=str)
def test_the_averages_are_the_base_layers(kwargs):
    layer, plain = bn.nn.BatchRenorm1d(3, **kwargs), bn.nn.BatchNorm1d(3, **kwargs)
    for _ in range(3):
        x = torch.randn(8, 3) * 2 + 1
        layer(x)
        plain(x)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.nn.BatchNorm1d(3).load_state_dict(layer.state_dict(), strict=True)
    assert isinstance(layer, torch.nn.BatchNorm1d)


def test_schedules_are_given_the_step_before_it_is_counted():
    steps = []

    def r_max(step):
        steps.append(int(step))
        return 1 + step

    layer = bn.nn.BatchRenorm1d(2, r_max=r_max, d_max=lambda step: 0.1 * step, affine=False)
    layer.running_var.fill_(1e-12)
    layer.momentum = 0.0
    x = torch.randn(64, 2) + 100
    x_hat = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
    for step in range(3):
        torch.testing.assert_close(layer(x), x_hat * (1 + step) + 0.1 * step, rtol=1e-4, atol=1e-4)
    layer.eval()(x)
    assert steps == [0, 1, 2]


def test_a_schedule_may_give_plain_numbers():
    layer = bn.nn.BatchRenorm1d(2, r_max=lambda _: 1.5, d_max=lambda _: 0.0, affine=False)
    layer.running_var.fill_(1e-12)
    x = torch.randn(64, 2)
    assert layer(x).std(0, correction=0).tolist() == pytest.approx([1.5, 1.5], rel=1e-4)


def test_warm_up_is_batch_normalization():
    layer, plain = made((8, 3), warmup_steps=2), bn.nn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict())
    same = []
    for _ in range(4):
        x = torch.randn(8, 3) * 2 + 1
        same.append(torch.allclose(layer(x), plain(x)))
    assert same == [True, True, False, False]


def test_the_papers_ramps():
    r_max, d_max = bn.nn.LinearRamp(1, 3, 5_000, 40_000), bn.nn.LinearRamp(0, 5, 5_000, 25_000)
    steps = torch.tensor([0, 5_000, 15_000, 22_500, 25_000, 40_000, 10**9])
    expected = [1, 1, 1 + 20 / 35, 2, 1 + 40 / 35, 3, 3]
    torch.testing.assert_close(torch.stack([r_max(step) for step in steps]), torch.tensor(expected))
    expected = [0, 0, 2.5, 4.375, 5, 5, 5]
    torch.testing.assert_close(torch.stack([d_max(step) for step in steps]), torch.tensor(expected, dtype=torch.float))


def test_nan_stays_in_its_channel():
    layer = made((8, 3))
    x = torch.randn(8, 3)
    clean = copy.deepcopy(layer)(x)
    x[2, 1] = float("nan")
    y = layer(x)
    assert y[:, 1].isnan().all()
    torch.testing.assert_close(y[:, [0, 2]], clean[:, [0, 2]])


def test_a_batch_without_anything_real_leaves_the_averages():
    layer = made((4, 3))
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.randn(4, 3), mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(y, torch.zeros(4, 3))
    for name in ("running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_second_derivatives_hold_r_and_d_constant():
    layer = made((5, 2)).double()
    state = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    x0 = torch.randn(5, 2, dtype=torch.double)
    with torch.no_grad():
        r, d = layer._correction(x0, None)

    def ours(x):
        layer.load_state_dict(state, strict=False)
        return layer(x)

    def with_constants(x):
        x_hat = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + layer.eps)
        return layer.weight * (x_hat * r + d) + layer.bias

    weights = torch.randn(5, 2, dtype=torch.double)
    products = []
    for function in (ours, with_constants):
        x = x0.clone().requires_grad_()
        (first,) = torch.autograd.grad((function(x).pow(3) * weights).sum(), x, create_graph=True)
        products.append(torch.autograd.grad(first, x, weights)[0])
    torch.testing.assert_close(*products)


@pytest.mark.parametrize(
    "kwargs",
    [{"momentum": None}, {"ddof": 0, "decay": 0.6}, {"warmup_steps": 2, "r_max": bn.nn.LinearRamp(1, 2, 0, 3)}],
    ids=["cumulative", "decay", "schedules"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_recomputation_has_the_r_and_d_of_the_first_run(kwargs, compiled):
    layer = made((8, 3), **kwargs)
    if layer.momentum is None:  # the first cumulative average forgets what it started from
        layer.reset_running_stats()
    twin = copy.deepcopy(layer)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for _ in range(4):
        x = torch.randn(8, 3) * 3 + 2
        gradients = []
        for forward in (lambda x: checkpoint(run, x, use_reentrant=False), twin):
            leaf = x.clone().requires_grad_()
            forward(leaf).pow(3).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    torch._dynamo.reset()


def test_with_unbiased_averages_r_settles_below_one():
    """As the docstring says: by sqrt((n - 1) / n), which ddof=0 avoids."""
    x = torch.randn(2, 3)
    for ddof, expected in ((1, 0.5**0.5), (0, 1.0)):
        layer = bn.nn.BatchRenorm1d(3, ddof=ddof, eps=1e-12, momentum=0.9)
        for _ in range(40):
            layer(x)
        r, _ = layer._correction(x, None)
        torch.testing.assert_close(r.float(), torch.full((3,), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("policy", ["running", "skip"])
def test_a_single_value_is_treated_as_by_the_base_layer(policy):
    layer = made((4, 3), on_single_value=policy)
    plain = bn.nn.BatchNorm1d(3, on_single_value=policy)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r_max": 0.5}, "expected r_max of 1 or more, or a callable of the step, got 0.5"),
        ({"r_max": float("nan")}, "expected r_max of 1 or more, or a callable of the step, got nan"),
        ({"d_max": -1}, "expected d_max of 0 or more, or a callable of the step, got -1"),
        ({"warmup_steps": -1}, "expected warmup_steps of 0 or more, got -1"),
        ({"track_running_stats": False}, "expected track_running_stats=True: batch renormalization refers to the"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        bn.nn.BatchRenorm1d(3, **kwargs)
    with pytest.raises(TypeError, match="r_mox"):
        bn.nn.BatchRenorm1d(3, r_mox=2)


def test_a_ramp_goes_forward():
    with pytest.raises(ValueError, match="expected a ramp's last step after its first, got first=5, last=5"):
        bn.nn.LinearRamp(0, 1, 5, 5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(1, 3), "Expected more than 1 value per channel when training"),
        (torch.randn(4, 2), "running_mean should contain 2 elements not 3"),
        (torch.randn(4, 3, 2, 2), "expected 2D or 3D input"),
        (torch.ones(4, 3, dtype=torch.int), "expected a floating point input"),
    ],
    ids=["single", "channels", "rank", "integers"],
)
def test_bad_input_is_refused_before_it_is_counted(x, message):
    layer = made((4, 3))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        layer(x)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_repr_tells_the_bounds():
    text = repr(bn.nn.BatchRenorm1d(3, r_max=bn.nn.LinearRamp(1, 3, 0, 9), warmup_steps=4))
    assert text.endswith("r_max=LinearRamp(start=1, stop=3, first=0, last=9), d_max=5.0, warmup_steps=4)")


# --- the cases of ludvb/batchrenorm, which adds eps to the deviation and averages that; neither matters in these


def test_ludvb_first_step_is_batch_normalization():
    ramps = {"r_max": bn.nn.LinearRamp(1, 3, 5_000, 40_000), "d_max": bn.nn.LinearRamp(0, 5, 5_000, 25_000)}
    for affine in (True, False):
        layer = bn.nn.BatchRenorm1d(10, eps=1e-12, momentum=0.01, affine=affine, **ramps)
        x = torch.randn(100, 10)
        expected = torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-12)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_ludvb_approaches_the_population():
    layer = bn.nn.BatchRenorm1d(5, eps=1e-12, momentum=0.01)
    xs = torch.randn(10, 5, 5) * 10
    mean, var = xs.mean((0, 1)), xs.var((0, 1), correction=0)
    errors = [
        torch.stack([layer(x) - torch.nn.functional.batch_norm(x, mean, var, training=False, eps=0.0) for x in xs])
        .abs()
        .mean()
        for _ in range(100)
    ]
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])


def test_ludvb_averages_of_deviations_agree_where_all_are_one():
    layer = bn.nn.BatchRenorm1d(3, eps=1e-12, momentum=0.01, ddof=0, affine=False)
    running_mean = np.zeros(3)
    for shift in itertools.chain([0.5, -2.0, 30.0], np.linspace(-1, 1, 5)):
        x = np.random.default_rng(3).normal(size=(50, 3))
        x = (x - x.mean(0)) / x.std(0) + shift
        d = np.clip(x.mean(0) - running_mean, -5, 5)
        expected = x - x.mean(0) + d
        running_mean = running_mean + 0.01 * (x.mean(0) - running_mean)
        np.testing.assert_allclose(layer(torch.tensor(x, dtype=torch.float)), expected, rtol=1e-5, atol=1e-5)
