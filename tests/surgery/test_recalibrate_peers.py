"""Beside fvcore's ``update_bn_stats`` and torch's ``update_bn``: where all agree, and who is right elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from surgery.population_samples import convolutional, images, in_training, norms


def fvcore(model, batches):
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    precise.update_bn_stats(model, batches, num_iters=len(batches))


def by_all(net, batches):
    """Each's copy of ``net`` after its pass, with dropout off and batch norms in training mode for all."""
    found = {}
    for name, update in (("fvcore", fvcore), ("torch", lambda m, b: update_bn(b, m)), ("ours", bn.recalibrate)):
        found[name] = copy.deepcopy(net).train()
        update(found[name], batches)
    return found


def without_dropout(dtype):
    net = convolutional(dtype)
    net[3] = nn.Identity()
    return net


def test_equal_batches():
    """fvcore: the same but for Bessel's correction. torch: the same mean; its variance lacks the spread of means."""
    net, batches = without_dropout(torch.float64), images(60).split(20)
    found = by_all(net, batches)
    values = in_training(net, batches)
    for name, ours in norms(found["ours"]).items():
        theirs, torchs = norms(found["fvcore"])[name], norms(found["torch"])[name]
        n = len(values[name])
        torch.testing.assert_close(theirs.running_mean, ours.running_mean)
        torch.testing.assert_close(theirs.running_var * n / (n - 1), ours.running_var)
        torch.testing.assert_close(torchs.running_mean, ours.running_mean)
        rows = values[name].reshape(3, n // 3, -1)
        spread = rows.mean(1).sub(values[name].mean(0)).square().mean(0)
        within = torchs.running_var * (n / 3 - 1) / (n / 3)
        torch.testing.assert_close((within + spread) * n / (n - 1), ours.running_var)
    # Behind a batch norm the means of batches are alike; the data's own are not.
    assert (norms(found["ours"])["1"].running_var / norms(found["torch"])["1"].running_var).max() > 1.1


def test_unequal_batches_and_a_large_mean():
    """float32, as it comes: ours is nearest to the float64 statistics of the whole, and as near as float32 allows."""
    x = (torch.randn(100, 4, 6, 6) * torch.linspace(0.5, 2, 4).reshape(-1, 1, 1) + 300).float()
    x += torch.linspace(0, 3, 100).reshape(-1, 1, 1, 1)
    batches = x.split([40, 40, 17, 3])
    found = by_all(nn.Sequential(nn.BatchNorm2d(4)), batches)
    rows = x.double().movedim(1, -1).flatten(0, -2)
    errors = {}
    for name, net in found.items():
        mean = (net[0].running_mean.double() - rows.mean(0)).abs() / rows.std(0)
        var = (net[0].running_var.double() / rows.var(0) - 1).abs()
        errors[name] = mean.max().item(), var.max().item()
    assert errors["ours"][0] < 4e-5  # a float32 mean of 300, in deviations of .5 and more, is rounded so
    assert errors["ours"][1] < 1e-7
    for name in ("fvcore", "torch"):
        assert errors[name][0] >= errors["ours"][0]
        assert errors[name][1] > 100 * errors["ours"][1]
    assert errors["torch"][0] > 0.1  # four batches of equal weight
    assert errors["torch"][1] > 0.1  # without the spread


def test_what_they_leave_behind_when_a_batch_fails():
    """The defects that ours is tested for not having, as they are: should a peer mend them, this says so."""
    net, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(20, 3)
    for update in (fvcore, lambda m, b: update_bn(b, m)):
        broken = copy.deepcopy(net)
        with pytest.raises(ValueError, match="got 4D input"):
            update(broken, [x, torch.randn(2, 3, 4, 4)])
        assert broken[0].momentum != 0.1
    with pytest.raises(ValueError, match="got 4D input"):
        bn.recalibrate(net, [x, torch.randn(2, 3, 4, 4)])
    assert net[0].momentum == 0.1


def test_fvcore_refuses_a_layer_that_is_reused():
    layer = nn.BatchNorm1d(3)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(AssertionError, match="reused"):
        fvcore(copy.deepcopy(net), [torch.randn(9, 3)])
    bn.recalibrate(net, [torch.randn(9, 3)])
    assert layer.num_batches_tracked == 2
