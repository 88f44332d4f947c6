"""Values and gradients against the NumPy oracle, and exactness against float64 where torch's own layer is the
yardstick."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm.nn.functional import batch_norm
from batchnorm.ops.schema import ACTIVATIONS
from oracles import batch_norm as oracle

EPS = 1e-3
SHAPES = {"(N, C)": (9, 4), "(N, C, L)": (5, 4, 7), "(N, C, H, W)": (3, 4, 5, 2), "(N, C, D, H, W)": (2, 4, 3, 2, 3)}

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def draw(shape, dtype=torch.float64):
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    return {
        "x": x.to(dtype),
        "gamma": torch.rand(shape[1], dtype=torch.float64).add(0.5).to(dtype),
        "beta": torch.randn(shape[1], dtype=torch.float64).to(dtype),
        "residual": torch.randn(shape, dtype=torch.float64).to(dtype),
        "mask": torch.rand(shape[0], *shape[2:]) > 0.3,
        "dy": torch.randn(shape, dtype=torch.float64).to(dtype),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_and_backward_equal_the_paper(shape, with_mask, with_residual, activation):
    data = draw(shape)
    residual = data["residual"].requires_grad_() if with_residual else None
    mask = data["mask"] if with_mask else None
    leaves = {name: data[name].requires_grad_() for name in ("x", "gamma", "beta")}
    y = batch_norm(
        leaves["x"],
        None,
        None,
        leaves["gamma"],
        leaves["beta"],
        training=True,
        eps=EPS,
        mask=mask,
        residual=residual,
        activation=None if activation == "none" else activation,
    )
    y.backward(data["dy"])

    numpy = {name: tensor.detach().numpy() for name, tensor in data.items()}
    about = {
        "eps": EPS,
        "residual": numpy["residual"] if with_residual else None,
        "mask": numpy["mask"] if with_mask else None,
        "activation": activation,
    }
    expected_y, _, _ = oracle.forward(numpy["x"], numpy["gamma"], numpy["beta"], **about)
    dx, dgamma, dbeta, dresidual = oracle.backward(numpy["dy"], numpy["x"], numpy["gamma"], numpy["beta"], **about)
    np.testing.assert_allclose(y.detach(), expected_y, rtol=1e-12, atol=1e-12)
    # The oracle differentiates smooth activations numerically.
    tolerance = {"rtol": 1e-7, "atol": 1e-7}
    np.testing.assert_allclose(leaves["x"].grad, dx, **tolerance)
    np.testing.assert_allclose(leaves["gamma"].grad, dgamma, **tolerance)
    np.testing.assert_allclose(leaves["beta"].grad, dbeta, **tolerance)
    if residual is not None:
        np.testing.assert_allclose(residual.grad, dresidual, **tolerance)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4], ids=["mean 0", "mean 3", "mean 1e4"])
def test_no_further_from_float64_than_torch(mean, dtype, memory_format):
    data = draw((8, 6, 5, 5))
    x = (data["x"] + mean).to(dtype).contiguous(memory_format=memory_format)
    dy = data["dy"].to(dtype).contiguous(memory_format=memory_format)
    parameter = torch.float32 if dtype.itemsize < 4 else dtype
    gamma, beta = data["gamma"].to(parameter), data["beta"].to(parameter)
    exact_y, _, _ = oracle.forward(x.double().numpy(), gamma.double().numpy(), beta.double().numpy(), eps=1e-5)
    exact_dx, *_ = oracle.backward(
        dy.double().numpy(), x.double().numpy(), gamma.double().numpy(), beta.double().numpy(), eps=1e-5
    )

    errors = {}
    for name, function in {"ours": batch_norm, "torch": torch.nn.functional.batch_norm}.items():
        leaf = x.clone().requires_grad_()
        y = function(leaf, None, None, gamma, beta, training=True)
        assert y.dtype == dtype
        y.backward(dy)
        errors[name] = (
            np.abs(y.detach().double().numpy() - exact_y).max(),
            np.abs(leaf.grad.double().numpy() - exact_dx).max(),
        )
    # A rounding of the output type, or torch's own error where that is larger. In float64 the yardstick rounds too, and
    # so do sums of 200 values, by a few units that depend on the order in which an instruction set adds them up.
    floor = torch.finfo(dtype).eps * np.abs(exact_y).max() * (16 * (1 + mean) if dtype == torch.float64 else 1)
    assert errors["ours"][0] <= max(errors["torch"][0], floor)
    assert errors["ours"][1] <= max(errors["torch"][1], floor)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def test_a_large_mean_costs_no_accuracy(memory_format):
    x = (torch.randn(16, 8, 6, 6) + 1e4).contiguous(memory_format=memory_format)
    dy = torch.randn(16, 8, 6, 6)
    leaf = x.clone().requires_grad_()
    y = batch_norm(leaf, None, None, training=True)
    y.backward(dy)
    ones, zeros = np.ones(8), np.zeros(8)
    exact_y, _, _ = oracle.forward(x.double().numpy(), ones, zeros, eps=1e-5)
    exact_dx, *_ = oracle.backward(dy.double().numpy(), x.double().numpy(), ones, zeros, eps=1e-5)
    assert np.abs(y.detach().double().numpy() - exact_y).max() < 1e-6 * np.abs(exact_y).max()
    assert np.abs(leaf.grad.double().numpy() - exact_dx).max() < 1e-6 * np.abs(exact_dx).max()


def test_padding_cannot_be_felt():
    """Masked positions may hold anything, NaN too, and give what the unpadded rows give."""
    rows = [torch.randn(4, length) for length in (7, 3, 5)]
    padded = torch.full((3, 4, 7), float("nan"))
    for i, row in enumerate(rows):
        padded[i, :, : row.size(1)] = row
    lengths = torch.tensor([7, 3, 5])
    running = (torch.zeros(4), torch.ones(4))
    y = batch_norm(padded.requires_grad_(), *running, training=True, lengths=lengths)
    packed = torch.cat(rows, dim=1).T.contiguous().requires_grad_()  # (15, 4): the real positions alone
    running_packed = (torch.zeros(4), torch.ones(4))
    expected = batch_norm(packed, *running_packed, training=True)

    real = torch.arange(7) < lengths.unsqueeze(1)
    assert torch.equal(y.isnan(), torch.zeros_like(y, dtype=torch.bool))
    torch.testing.assert_close(y.transpose(1, 2)[real], expected)
    assert y.transpose(1, 2)[~real].abs().sum() == 0
    torch.testing.assert_close(running, running_packed)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.transpose(1, 2)[real])
    torch.testing.assert_close(padded.grad.transpose(1, 2)[real], packed.grad)
    assert padded.grad.transpose(1, 2)[~real].abs().sum() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_stays_in_its_channel(bad):
    x = torch.randn(6, 3, 4)
    clean = batch_norm(x, None, None, training=True)
    x[2, 1, 0] = bad
    y = batch_norm(x, None, None, training=True)
    assert torch.equal(y[:, [0, 2]], clean[:, [0, 2]])
    assert y[:, 1].isnan().any()


def test_a_constant_channel_is_zero_and_finite():
    x = torch.randn(5, 2, 3)
    x[:, 0] = 7.25
    x.requires_grad_()
    y = batch_norm(x, None, None, training=True)
    (y * torch.randn_like(y)).sum().backward()
    assert torch.equal(y[:, 0], torch.zeros(5, 3))
    assert x.grad.isfinite().all()


def test_gamma_and_beta_restore_the_identity():
    """Paper, section 3: gamma = sqrt(var + eps), beta = mean."""
    x = torch.randn(32, 5, dtype=torch.float64) * 3 + 4
    var, mean = torch.var_mean(x, 0, correction=0)
    y = batch_norm(x, None, None, torch.sqrt(var + 1e-5), mean, training=True, eps=1e-5)
    torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("steps", [0, 1, 2, 10, 1000])
@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, 0.0, None])
def test_running_statistics_follow_their_closed_form(momentum, steps):
    x = torch.randn(12, 3, dtype=torch.float64) * 2 + 5
    mean, var = x.mean(0), x.var(0, correction=1)
    running = (torch.full((3,), 2.0, dtype=torch.float64), torch.full((3,), 3.0, dtype=torch.float64))
    seen = torch.tensor(0)
    for _ in range(steps):
        batch_norm(x, *running, training=True, momentum=momentum, num_batches_tracked=seen)
    kept = (1 - momentum) ** steps if momentum is not None else (1.0 if steps == 0 else 0.0)
    torch.testing.assert_close(running[0], kept * 2.0 + (1 - kept) * mean)
    torch.testing.assert_close(running[1], kept * 3.0 + (1 - kept) * var)
    assert seen == steps


def test_cumulative_average_is_the_mean_over_batches():
    batches = [torch.randn(6, 2, dtype=torch.float64) + i for i in range(4)]
    running, seen = (torch.zeros(2).double(), torch.ones(2).double()), torch.tensor(0)
    for batch in batches:
        batch_norm(batch, *running, training=True, momentum=None, num_batches_tracked=seen)
    torch.testing.assert_close(running[0], torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(running[1], torch.stack([b.var(0) for b in batches]).mean(0))


def test_ddof_chooses_the_running_variance():
    x = torch.randn(5, 2, dtype=torch.float64)
    biased, unbiased = torch.ones(2).double(), torch.ones(2).double()
    batch_norm(x, torch.zeros(2).double(), biased, training=True, momentum=1.0, ddof=0)
    batch_norm(x, torch.zeros(2).double(), unbiased, training=True, momentum=1.0, ddof=1)
    torch.testing.assert_close(biased, x.var(0, correction=0))
    torch.testing.assert_close(unbiased, x.var(0, correction=1))


def test_a_batch_without_real_positions_teaches_nothing():
    running, seen = (torch.full((3,), 2.0), torch.full((3,), 5.0)), torch.tensor(0)
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = batch_norm(x, *running, training=True, mask=torch.zeros(2, 4, dtype=torch.bool), num_batches_tracked=seen)
    y.sum().backward()
    assert y.abs().sum() == 0
    assert x.grad.abs().sum() == 0
    assert torch.equal(running[0], torch.full((3,), 2.0))
    assert torch.equal(running[1], torch.full((3,), 5.0))


def test_a_single_real_value_teaches_the_mean_only():
    """Where the device alone knows the count, and nobody can refuse."""
    running = (torch.zeros(2), torch.full((2,), 5.0))
    x = torch.arange(8.0).reshape(2, 2, 2)
    mask = torch.tensor([[False, True], [False, False]])
    torch.ops.batchnorm.train_step(x, None, None, None, mask, *running, 1e-5, 0.5, None, 1, "none")
    assert torch.equal(running[0], torch.tensor([0.5, 1.5]))
    assert torch.equal(running[1], torch.full((2,), 5.0))


def test_eval_uses_the_population_statistics():
    """Algorithm 2, step 10: y = gamma (x - E[x]) / sqrt(Var[x] + eps) + beta."""
    x, mean, var = torch.randn(4, 3, 5), torch.randn(3), torch.rand(3) + 0.1
    gamma, beta = torch.randn(3), torch.randn(3)
    y = batch_norm(x, mean, var, gamma, beta, eps=1e-2)
    column = (3, 1)
    expected = gamma.view(column) * (x - mean.view(column)) / torch.sqrt(var.view(column) + 1e-2) + beta.view(column)
    torch.testing.assert_close(y, expected)


def test_an_eval_forward_survives_a_later_training_step():
    """pytorch #175024: the backward of the first forward must not notice that the buffers have moved."""
    x, running = torch.randn(4, 3, requires_grad=True), (torch.zeros(3), torch.ones(3))
    y = batch_norm(x, *running)
    batch_norm(torch.randn(4, 3), *running, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4, 3), 1 / (1 + 1e-5) ** 0.5))
