"""Complex batch norm against float64 NumPy, whose inverse root comes from an eigendecomposition."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn

LAYERS = [
    (bn.nn.ComplexBatchNorm1d, (16, 2)),
    (bn.nn.ComplexBatchNorm1d, (6, 2, 5)),
    (bn.nn.ComplexBatchNorm2d, (5, 2, 3, 4)),
    (bn.nn.ComplexBatchNorm3d, (4, 2, 3, 2, 2)),
]
layers = pytest.mark.parametrize(("cls", "shape"), LAYERS, ids=["1d", "1d-L", "2d", "3d"])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def data(*shape, dtype=torch.complex64):
    """Parts that differ in deviation and are correlated, about a mean that is neither's."""
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    return torch.complex(3 * a + 2, a - 0.5 * b - 7).to(dtype)


def randomise(layer):
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
                if name in ("running_covar", "weight"):
                    tensor[:, :2] += 1
    return layer


def symmetric(three):
    rr, ii, ri = np.asarray(three, dtype=np.float64)
    return np.array([[rr, ri], [ri, ii]])


def oracle(x, layer, training, mask=None):
    """y, and the mean and unbiased covariance of the batch."""
    x, y, means, covariances = x.numpy().astype(complex), np.zeros(x.shape, dtype=complex), [], []
    real = np.ones((x.shape[0], *x.shape[2:]), dtype=bool) if mask is None else mask.numpy()
    for c in range(x.shape[1]):
        z = np.stack([x[:, c][real].real, x[:, c][real].imag])
        mean, covariance = z.mean(axis=1), np.cov(z, ddof=0)
        means.append(mean)
        covariances.append(np.cov(z)[[0, 1, 0], [0, 1, 1]])
        if not training:
            mean, covariance = layer.running_mean[c].double().numpy(), symmetric(layer.running_covar[c])
        values, vectors = np.linalg.eigh(covariance + layer.eps * np.eye(2))
        root = vectors @ np.diag(values**-0.5) @ vectors.T
        out = (
            symmetric(layer.weight.detach()[c]) @ root @ (z - mean[:, None])
            + layer.bias.detach()[c].double().numpy()[:, None]
        )
        y[:, c][real] = out[0] + 1j * out[1]
    return y, np.array(means), np.array(covariances)


@layers
@both_modes
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
def test_values(cls, shape, training, dtype, masked):
    layer = randomise(cls(2, momentum=1.0, dtype=dtype)).train(training)
    x = data(*shape, dtype=dtype)
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if masked else None
    if masked:
        x[~mask.unsqueeze(1).expand(shape)] = complex("nan")
    expected, mean, covariance = oracle(x, layer, training, mask)
    before = copy.deepcopy(layer.state_dict())
    y = layer(x, mask=mask)
    rounding = 50 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=rounding, atol=rounding)
    if training:
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=rounding)
        np.testing.assert_allclose(layer.running_covar.numpy(), covariance, rtol=rounding, atol=rounding)
        assert layer.num_batches_tracked == 1
    else:
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_a_new_layer_gives_white_numbers_of_power_one():
    y = bn.nn.ComplexBatchNorm1d(2, dtype=torch.float64)(data(4000, 2, dtype=torch.complex128)).detach()
    torch.testing.assert_close(y.mean(0), torch.zeros(2, dtype=torch.complex128), rtol=0, atol=1e-12)
    torch.testing.assert_close((y * y.conj()).real.mean(0), torch.ones(2).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close((y * y).mean(0), torch.zeros(2, dtype=torch.complex128), rtol=0, atol=1e-4)


def test_a_large_mean_costs_no_accuracy():
    x = data(50, 2, dtype=torch.complex128)
    far = (x + complex(1e4, -1e4)).to(torch.complex64)
    layer = bn.nn.ComplexBatchNorm1d(2)
    expected, *_ = oracle(far.to(torch.complex128), layer, True)
    np.testing.assert_allclose(layer(far).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [torch.ones(8, 2), torch.arange(16.0).reshape(8, 2), torch.arange(16.0).reshape(8, 2) * 1e4],
    ids=["constant", "real numbers", "large real numbers"],
)
@pytest.mark.parametrize("direction", [1, 1j, 1 + 1j], ids=str)
def test_parts_that_depend_on_each_other(x, direction):
    """A covariance without inverse: eps alone keeps it finite, in the gradient too."""
    leaf = (x.to(torch.complex128) * direction).requires_grad_()
    layer = bn.nn.ComplexBatchNorm1d(2, dtype=torch.float64)
    y = layer(leaf)
    expected, *_ = oracle(leaf.detach(), layer, True)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    y.abs().square().sum().backward()
    assert leaf.grad.isfinite().all()


def test_a_nan_stays_in_its_channel():
    x = data(8, 2)
    x[0, 0] = complex("nan")
    y = bn.nn.ComplexBatchNorm1d(2)(x)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isfinite().all()


@both_modes
@pytest.mark.parametrize("masked", [False, True], ids=["all real", "masked"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["own", "of each sample"])
def test_gradients_of_both_orders(training, masked, per_sample):
    layer = randomise(bn.nn.ComplexBatchNorm1d(2, dtype=torch.float64, activation="silu")).train(training)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool() if masked else None
    leading = (3, 2) if per_sample else (2,)
    leaves = [data(3, 2, 3, dtype=torch.complex128), data(3, 2, 3, dtype=torch.complex128)]
    leaves += [torch.randn(*leading, 3).double(), torch.randn(*leading, 2).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(x, residual, weight, bias):
        return copy.deepcopy(layer)(x, residual=residual, weight=weight, bias=bias, mask=mask)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([data(3, 2), data(1, 2)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"expected a dense complex input .*, got a nested torch.complex64"):
        bn.nn.ComplexBatchNorm1d(2)(x)


@pytest.mark.parametrize("policy", ["raise", "running", "skip"])
@pytest.mark.parametrize("masked", [False, True], ids=["one row", "one real row"])
def test_a_single_value(policy, masked):
    layer = randomise(bn.nn.ComplexBatchNorm1d(2, on_single_value=policy))
    x, kwargs = (data(2, 2), {"mask": torch.tensor([True, False])}) if masked else (data(1, 2), {})
    before = copy.deepcopy(layer.state_dict())
    if policy == "raise":
        with pytest.raises(ValueError, match=r"Expected more than 1 (real )?value per channel"):
            layer(x, **kwargs)
    elif policy == "running":
        torch.testing.assert_close(layer(x, **kwargs), copy.deepcopy(layer).eval()(x, **kwargs))
    else:
        rr, ii, ri = layer.weight.unbind(-1)
        z = torch.complex(rr * x[0].real + ri * x[0].imag, ri * x[0].real + ii * x[0].imag)
        torch.testing.assert_close(layer(x, **kwargs)[0], z + torch.view_as_complex(layer.bias))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_options_and_copies():
    plain = bn.nn.ComplexBatchNorm2d(2, affine=False, track_running_stats=False)
    assert list(plain.state_dict()) == []
    x = data(4, 2, 3, 3)
    torch.testing.assert_close(plain.eval()(x), plain.train()(x))
    layer = randomise(bn.nn.ComplexBatchNorm2d(2, bias=False, decay=0.75, activation="relu"))
    assert list(layer.state_dict()) == ["weight", "running_mean", "num_batches_tracked", "running_covar"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin.eval()(x), layer.eval()(x))
    assert (layer(x).real >= 0).all()
    assert (layer(x).imag >= 0).all()


REFUSED = {
    "real": (torch.randn(4, 2), {}, TypeError, "expected a complex input, got torch.float32: BatchNorm layers are for"),
    "channels": (data(4, 3), {}, ValueError, r"expected an input with 2 channels, got \[4, 3\]"),
    "weight": (data(4, 2), {"weight": torch.ones(2)}, ValueError, r"expected weight of shape \(2, 3\) or \(4, 2, 3\)"),
    "residual": (data(4, 2), {"residual": torch.ones(4, 2)}, ValueError, "expected a complex residual of the input's"),
    "rank": (data(4, 2, 3, 3), {}, ValueError, r"expected 2D or 3D input \(got 4D input\)"),
}


@pytest.mark.parametrize(("x", "kwargs", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_counted(x, kwargs, kind, words):
    layer = bn.nn.ComplexBatchNorm1d(2)
    with pytest.raises(kind, match=words):
        layer(x, **kwargs)
    assert layer.num_batches_tracked == 0
