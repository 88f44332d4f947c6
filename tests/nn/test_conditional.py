"""Gamma and beta of each sample (conditional batch norm), and inference weighted with the sample itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import batchnorm as bn
from batchnorm.nn.functional import batch_norm
from oracles import batch_norm as oracle

SHAPES = [(5, 3), (5, 3, 4), (4, 3, 2, 5), (3, 3, 2, 2, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
LAYERS = {2: bn.nn.BatchNorm1d, 3: bn.nn.BatchNorm1d, 4: bn.nn.BatchNorm2d, 5: bn.nn.BatchNorm3d}


def spread(coefficients, x):
    """(N, C) as broadcast over x."""
    return coefficients.reshape(*x.shape[:2], *[1] * (x.ndim - 2))


@shapes
@both_modes
@pytest.mark.parametrize("shift", [0.0, 1e4], ids=["easy", "mean 1e4"])
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_values(shape, training, masked, shift):
    layer = LAYERS[len(shape)](3, affine=False, activation="silu").train(training)
    layer.running_mean.normal_().add_(shift)
    layer.running_var.uniform_(0.5, 2)
    x, residual = torch.randn(shape) + shift, torch.randn(shape)
    gamma, beta = torch.randn(shape[:2]), torch.randn(shape[:2])
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if masked else None
    if masked:
        x[~mask.unsqueeze(1).expand(shape)] = float("nan")
    real = None if mask is None else mask.numpy()
    if training:
        x_hat, *_ = oracle.forward(x.numpy(), np.ones(3), np.zeros(3), eps=1e-5, mask=real)
    else:
        column = (1, 3, *[1] * (len(shape) - 2))
        mean, var = (t.double().numpy().reshape(column) for t in (layer.running_mean, layer.running_var))
        x_hat = (x.double().numpy() - mean) / np.sqrt(var + 1e-5)
    y = layer(x, weight=gamma, bias=beta, residual=residual, mask=mask)
    z = spread(gamma.double().numpy(), x) * x_hat + spread(beta.double().numpy(), x) + residual.double().numpy()
    expected = oracle.activate(z, "silu")
    if masked:
        expected = np.where(np.broadcast_to(mask.unsqueeze(1).numpy(), shape), expected, 0)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_moves_the_averages_as_without():
    layer, twin = bn.nn.BatchNorm1d(3), bn.nn.BatchNorm1d(3)
    x, mask = torch.randn(5, 3, 4), torch.rand(5, 4) > 0.4
    for kwargs in ({}, {"mask": mask}, {"mask": torch.zeros_like(mask)}):
        layer(x, weight=torch.rand(5, 3), **kwargs)
        twin(x, **kwargs)
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@both_modes
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gradients_of_both_orders(training, masked, alpha):
    x, residual = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma, beta = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).bool() if masked else None
    running = (torch.randn(2).double(), torch.rand(2).double() + 0.5)

    def function(x, gamma, beta, residual):
        mean, var = (tensor.clone() for tensor in running)
        return batch_norm(
            x, mean, var, gamma, beta, training, mask=mask, residual=residual, activation="silu", inference_weight=alpha
        )

    assert gradcheck(function, (x, gamma, beta, residual))
    assert gradgradcheck(function, (x, gamma, beta, residual))


@both_modes
def test_one_of_the_two(training):
    x, gamma, beta = torch.randn(4, 3, 5), torch.randn(4, 3), torch.randn(4, 3)
    layer = bn.nn.BatchNorm1d(3).train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3.0, 4.0]))
        layer.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    plain = copy.deepcopy(layer)
    plain.weight = plain.bias = None
    x_hat = plain(x)
    torch.testing.assert_close(layer(x, weight=gamma), gamma[..., None] * x_hat + layer.bias[:, None])
    torch.testing.assert_close(layer(x, bias=beta), layer.weight[:, None] * x_hat + beta[..., None])
    torch.testing.assert_close(layer(x, weight=gamma[0]), gamma[0][:, None] * x_hat + layer.bias[:, None])


@both_modes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_formats_and_narrow_types(training, memory_format, dtype):
    x = torch.randn(4, 3, 2, 5).to(dtype).contiguous(memory_format=memory_format)
    gamma = torch.randn(4, 3)
    layer = bn.nn.BatchNorm2d(3).train(training)
    y = layer(x, weight=gamma)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    expected = copy.deepcopy(layer).double()(x.double(), weight=gamma.double())
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@both_modes
def test_gamma_from_a_layer_under_autocast(training):
    x, embed = torch.randn(4, 3, 5), torch.nn.Linear(2, 3)
    layer = bn.nn.BatchNorm1d(3, affine=False).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        gamma = embed(torch.randn(4, 2))
        y = layer(x, weight=gamma)
    assert gamma.dtype == torch.bfloat16
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, copy.deepcopy(layer)(x, weight=gamma.float()))
    y.pow(3).sum().backward()
    assert embed.weight.grad.abs().sum() > 0


@both_modes
def test_compiles_exports_and_transforms(training):
    layer = bn.nn.BatchNorm1d(3, inference_weight=0.2).train(training)
    x, gamma = torch.randn(4, 3, 5), torch.randn(4, 3)
    expected = copy.deepcopy(layer)(x, weight=gamma)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")(x, weight=gamma), expected
    )
    program = torch.export.export(copy.deepcopy(layer), (x,), {"weight": gamma})
    torch.testing.assert_close(program.module()(x, weight=gamma), expected)
    torch._dynamo.reset()
    mean, var = torch.zeros(3), torch.ones(3)

    def loss(gamma):
        buffers = (mean.clone(), var.clone())
        return batch_norm(x, *buffers, gamma, None, training, inference_weight=0.2).pow(3).sum()

    _, forward = jvp(loss, (gamma,), (x[..., 0],))
    torch.testing.assert_close(forward, (grad(loss)(gamma) * x[..., 0]).sum())
    many = vmap(lambda g: batch_norm(x, None, None, g, training=True))(torch.stack([gamma, 2 * gamma]))
    torch.testing.assert_close(many[1], 2 * many[0])


@both_modes
def test_an_empty_batch(training):
    layer = bn.nn.BatchNorm1d(3, inference_weight=0.2).train(training)
    assert layer(torch.randn(0, 3, 4), weight=torch.randn(0, 3)).shape == (0, 3, 4)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_wrong_number_of_samples_is_refused(name):
    layer = bn.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match=f"{name} should contain 3 elements not 6"):
        layer(torch.randn(4, 3), **{name: torch.randn(2, 3)})
    assert layer.num_batches_tracked == 0


# --- inference weighted with the sample itself ------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("shift", [0.0, 1e4], ids=["easy", "mean 1e4"])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_inference_weight(shape, alpha, shift, masked):
    """Summers & Dinneen (2020), section 3.1, as they write it: second moments, in float64 about the shift."""
    layer = LAYERS[len(shape)](3, inference_weight=alpha).eval()
    layer.running_mean.normal_().add_(shift)
    layer.running_var.uniform_(0.5, 2)
    x = torch.randn(shape) * 2 + shift
    mask = torch.rand(shape[0], *shape[2:]) > 0.4
    mask[0] = False
    expected = np.zeros(shape)
    for n in range(shape[0]):
        real = mask[n].numpy() if masked else np.ones(shape[2:], dtype=bool)
        if not real.any():
            continue
        for c in range(3):
            values = x[n, c].double().numpy()[real] - shift
            mean, var = layer.running_mean[c].double().item() - shift, layer.running_var[c].double().item()
            mu = alpha * values.mean() + (1 - alpha) * mean
            second = alpha * (values**2).mean() + (1 - alpha) * (var + mean**2)
            expected[n, c, ...][real] = (values - mu) / np.sqrt(second - mu**2 + layer.eps)
    y = layer(x, mask=mask if masked else None)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=2e-5, atol=2e-5)


def test_inference_weight_says_nothing_in_training():
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(bn.nn.BatchNorm1d(3, inference_weight=0.5)(x), bn.nn.BatchNorm1d(3)(x))


def test_functional_refuses_another_weight():
    with pytest.raises(bn.InputError, match="expected inference_weight from 0 to 1, got 2"):
        batch_norm(torch.ones(4, 3), torch.zeros(3), torch.ones(3), inference_weight=2)
