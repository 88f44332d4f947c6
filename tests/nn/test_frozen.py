"""Frozen batch norm: constant in every mode, torch's keys, gradient to x alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from nn.random_state import randomise
from oracles import batch_norm as oracle

PAIRS = [
    (bn.nn.FrozenBatchNorm1d, torch.nn.BatchNorm1d, (6, 3)),
    (bn.nn.FrozenBatchNorm1d, torch.nn.BatchNorm1d, (6, 3, 4)),
    (bn.nn.FrozenBatchNorm2d, torch.nn.BatchNorm2d, (4, 3, 5, 2)),
    (bn.nn.FrozenBatchNorm3d, torch.nn.BatchNorm3d, (3, 3, 2, 4, 3)),
]
pairs = pytest.mark.parametrize(("frozen", "theirs", "shape"), PAIRS, ids=["1d", "1d-L", "2d", "3d"])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pairs
@both_modes
def test_it_is_torchs_layer_in_eval(frozen, theirs, shape, training):
    reference = randomise(theirs(3)).eval()
    reference.num_batches_tracked.fill_(7)
    layer = frozen(3).train(training)
    layer.load_state_dict(reference.state_dict(), strict=True)
    x, dy = torch.randn(shape), torch.randn(shape)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(leaf), reference(twin)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(leaf.grad, twin.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.state_dict(), reference.state_dict(), rtol=0, atol=0)
    back = theirs(3)
    back.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(back.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_train_does_not_unfreeze_it():
    """pytorch #86590"""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), randomise(bn.nn.FrozenBatchNorm1d(3)))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model.train()
    model.requires_grad_(True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3) * 3).square().sum().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("1."), name


def test_states_of_others_frozen_layers():
    """torchvision and detectron2 write no num_batches_tracked."""
    donor = randomise(bn.nn.FrozenBatchNorm2d(3))
    state = {name: tensor for name, tensor in donor.state_dict().items() if name != "num_batches_tracked"}
    model = torch.nn.Sequential(bn.nn.FrozenBatchNorm2d(3))
    model.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, strict=True)
    torch.testing.assert_close(model[0].state_dict(), donor.state_dict())
    assert "num_batches_tracked" not in state
    with pytest.raises(RuntimeError, match=r"Missing key.*running_var"):
        model.load_state_dict({"0.weight": torch.ones(3)}, strict=True)


@pytest.mark.parametrize("rank", range(2, 8))
def test_any_rank(rank):
    layer = randomise(bn.nn.FrozenBatchNorm(3))
    x = torch.randn(2, 3, *[2] * (rank - 2))
    flat = torch.nn.functional.batch_norm(
        x.flatten(2) if rank > 2 else x, layer.running_mean, layer.running_var, layer.weight, layer.bias
    )
    torch.testing.assert_close(layer(x), flat.reshape(x.shape))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_x_and_the_residual(activation, masked):
    layer = randomise(bn.nn.FrozenBatchNorm1d(3, activation=activation))
    x, residual, dy = (torch.randn(5, 3, 4) for _ in range(3))
    mask = torch.rand(5, 4) < 0.6 if masked else None
    if masked:
        x[~mask[:, None].expand_as(x)] = float("nan")
    x.requires_grad_()
    residual.requires_grad_()
    y = layer(x, mask=mask, residual=residual)
    y.backward(dy)
    real = None if mask is None else mask.numpy()
    rows, extra = oracle.positions(x.detach().numpy(), real), oracle.positions(residual.detach().numpy(), real)
    scale = layer.weight.double().numpy() / np.sqrt(layer.running_var.double().numpy() + 1e-5)
    z = (rows - layer.running_mean.double().numpy()) * scale + layer.bias.double().numpy() + extra
    name = activation or "none"
    dz = oracle.positions(dy.numpy(), real) * oracle.slope(z, name)
    for found, expected in ((y.detach(), oracle.activate(z, name)), (x.grad, dz * scale), (residual.grad, dz)):
        np.testing.assert_allclose(found, oracle.restore(expected, dy.numpy(), real), rtol=1e-5, atol=1e-5)


def test_a_large_mean_costs_no_accuracy():
    """A shift of 1e4 * scale in float32 would be wrong by 5e-4 deviations and more."""
    layer = bn.nn.FrozenBatchNorm1d(2)
    layer.running_mean.fill_(1e4)
    x = 1e4 + torch.randn(64, 2)
    torch.testing.assert_close(layer(x).double(), (x.double() - 1e4) / np.sqrt(1 + 1e-5), rtol=1e-6, atol=1e-6)


def test_a_changed_buffer_counts_however_it_was_changed():
    layer, x = bn.nn.FrozenBatchNorm1d(2), torch.randn(4, 2)
    for change in (
        lambda: layer.running_mean.add_(1),
        lambda: layer.weight.data.mul_(2),
        lambda: setattr(layer.running_var, "data", torch.tensor([4.0, 0.25])),
        lambda: layer.load_state_dict(randomise(bn.nn.FrozenBatchNorm1d(2)).state_dict()),
        layer.double,
    ):
        before = layer(x.to(layer.weight.dtype)).clone()
        change()
        expected = torch.nn.functional.batch_norm(
            x.to(layer.weight.dtype), layer.running_mean, layer.running_var, layer.weight, layer.bias
        )
        y = layer(x.to(layer.weight.dtype).requires_grad_())
        torch.testing.assert_close(y, expected)
        assert y.dtype != before.dtype or not torch.allclose(y, before)


class Calls(TorchDispatchMode):
    """The names of the package's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "batchnorm":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_the_backward_takes_no_sums():
    """They are the gradients of gamma and beta, and cost a pass over the data."""
    x = torch.randn(4, 3, requires_grad=True)
    with Calls() as calls:
        randomise(bn.nn.FrozenBatchNorm1d(3))(x).sum().backward()
    assert "grad_input" in calls.names
    assert "grad_sums" not in calls.names


def test_programs_that_look_for_batch_norm_do_not_find_it():
    layer = randomise(bn.nn.FrozenBatchNorm1d(3))
    assert not isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    assert list(layer.parameters()) == []
    model = torch.nn.Sequential(layer)
    before = copy.deepcopy(layer.state_dict())
    torch.optim.swa_utils.update_bn([torch.randn(8, 3)], model)
    assert torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)[0] is layer
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kwargs", [{"affine": False}, {"bias": False}], ids=str)
def test_without_gamma_or_beta(kwargs):
    layer = randomise(bn.nn.FrozenBatchNorm1d(3, **kwargs))
    reference = torch.nn.BatchNorm1d(3, **kwargs).eval()
    reference.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), reference(x))


def test_nested_input():
    rows = [torch.randn(length, 3) for length in (4, 2, 5)]
    layer = randomise(bn.nn.FrozenBatchNorm1d(3, activation="relu"))
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    y = layer(nested, residual=nested)
    for ours, row in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(ours, layer(row, residual=row))
    with pytest.raises(ValueError, match="expected no mask or lengths with a nested input"):
        layer(nested, lengths=torch.tensor([4, 2, 5]))


def test_eps_of_zero():
    layer = bn.nn.FrozenBatchNorm1d(2, eps=0)
    layer.running_var.fill_(4)
    assert torch.equal(layer(torch.tensor([[2.0, -4.0]])), torch.tensor([[1.0, -2.0]]))


def test_meta_device():
    layer = bn.nn.FrozenBatchNorm2d(3, device="meta", dtype=torch.float64)
    assert layer(torch.empty(2, 3, 4, 4, device="meta", dtype=torch.float64)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bn.nn.FrozenBatchNorm2d(3, eps=-1), "expected eps of 0 or more, got -1"),
        (lambda: bn.nn.FrozenBatchNorm2d(3, eps=float("nan")), "expected eps of 0 or more, got nan"),
        (lambda: bn.nn.FrozenBatchNorm2d(3, activation="tanh"), "expected activation to be one of 'relu'"),
        (lambda: bn.nn.FrozenBatchNorm2d(3)(torch.ones(2, 3)), r"expected 4D input \(got 2D input\)"),
        (lambda: bn.nn.FrozenBatchNorm1d(3)(torch.ones(2, 3, 1, 1)), r"expected 2D or 3D input \(got 4D input\)"),
        (lambda: bn.nn.FrozenBatchNorm(3)(torch.ones(2, 4)), "running_mean should contain 4 elements not 3"),
        (lambda: bn.nn.FrozenBatchNorm(3)(torch.ones(3)), "expected an input of shape"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
