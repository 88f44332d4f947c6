"""Averaged weights: whose statistics they have, and what that does to a network on digits."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm as bn
from batchnorm.surgery import averaged_model
from surgery.digits import accuracy, digits, network
from surgery.population_samples import norms


def trained(model, steps, *averages, every=1):
    """A few steps on noise, with the averages updated."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4) + step).square().sum().backward()
        optimizer.step()
        if step % every == 0:
            for average in averages:
                average.update_parameters(model)


def small():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_copy_is_what_torch_does(decay):
    net = small()
    ours = averaged_model(net, decay=decay)
    theirs = AveragedModel(net, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    trained(net, 7, ours, theirs)
    assert isinstance(ours, AveragedModel)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(ours.module[1].running_mean, net[1].running_mean)


@pytest.mark.parametrize("decay", [None, 0.8])
def test_average_is_the_weighted_mean_of_statistics_and_copies_the_counter(decay):
    net = small()
    average = averaged_model(net, decay=decay, buffers="average")
    seen = []
    net[1].register_forward_hook(lambda m, *_: seen.append((m.running_mean.clone(), m.running_var.clone())))
    trained(net, 5, average)
    weights = torch.full((5,), 0.2) if decay is None else 0.2 * 0.8 ** torch.arange(4, -1, -1.0)
    if decay is not None:
        weights[0] = 0.8**4
    for index, buffer in enumerate((average.module[1].running_mean, average.module[1].running_var)):
        expected = sum(w * values[index] for w, values in zip(weights, seen, strict=True))
        torch.testing.assert_close(buffer, expected)
    assert average.module[1].num_batches_tracked == 5 == average.n_averaged
    with torch.no_grad():
        assert not torch.equal(average.module[1].running_var, net[1].running_var)


def test_bad_arguments():
    with pytest.raises(bn.InputError, match="buffers"):
        averaged_model(small(), buffers="mean")
    with pytest.raises(bn.InputError, match=r"expected decay, the weight of the old value, between 0 and 1, got 1.5"):
        averaged_model(small(), decay=1.5)


@functools.cache
def averaged_on_digits(decay, first, every):
    """The averages after 6 epochs, 102 steps, of 3 x 100 ReLU units at learning rate 1, by policy."""
    x, y, _, _ = digits()
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    averages = {policy: averaged_model(net, decay=decay, buffers=policy) for policy in ("copy", "average")}
    step = 0
    for _ in range(6):
        for batch in torch.randperm(1000).split(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            step += 1
            if step >= first and step % every == 0:
                for average in averages.values():
                    average.update_parameters(net)
    found = {"model": net, **averages}
    found["initial"] = copy.deepcopy(averages["copy"])
    for norm in norms(found["initial"]).values():
        norm.reset_running_stats()
    found["recalibrated"] = bn.recalibrate(copy.deepcopy(averages["copy"]), x.split(100), method="sequential")
    return found


def distance(model, right):
    """How far statistics are from ``right``: the mean over channels, in deviations, of the worst layer."""
    apart = []
    for ours, theirs in zip(norms(model).values(), norms(right).values(), strict=True):
        deviation = theirs.running_var.sqrt()
        apart += [((ours.running_mean - theirs.running_mean).abs() / deviation).mean().item()]
        apart += [(ours.running_var / theirs.running_var).log().div(2).abs().mean().item()]
    return max(apart)


def test_an_average_that_lags_behind_needs_recalibration():
    """EMA .99 over 102 steps: with anybody else's statistics it is useless, with its own as good as the model."""
    found = averaged_on_digits(0.99, 1, 1)
    scores = {name: accuracy(model) for name, model in found.items()}
    assert scores["model"] > 0.95
    assert scores["recalibrated"] > 0.95
    for policy in ("initial", "copy", "average"):
        assert scores[policy] < 0.9, policy
        assert distance(found[policy], found["recalibrated"]) > 0.3, policy


def test_an_equal_average_of_the_end_is_nearest_with_averaged_statistics():
    """SWA over every 15th step from the 30th: copies are further off than averages, and all classify alike."""
    found = averaged_on_digits(None, 30, 15)
    scores = {name: accuracy(model) for name, model in found.items()}
    assert scores["initial"] < 0.9
    assert min(scores[policy] for policy in ("copy", "average", "recalibrated")) > 0.95
    copied, averaged = (distance(found[policy], found["recalibrated"]) for policy in ("copy", "average"))
    assert averaged < copied


def test_the_spread_between_means_does_not_belong_to_averaged_weights():
    """Of a linear layer the average's outputs are the average outputs: their variance is below the mean variance."""
    x = torch.randn(500, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64) + 1
    nets = [nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double() for _ in range(5)]
    average = averaged_model(nets[0], buffers="average")
    means = []
    for net in nets:
        bn.recalibrate(net, [x])
        average.update_parameters(net)
        means.append(net[1].running_mean.clone())
    averaged = average.module[1].running_var.clone()
    spread = torch.stack(means).var(0, correction=0)
    bn.recalibrate(average, [x])
    right = average.module[1].running_var
    torch.testing.assert_close(average.module[1].running_mean, torch.stack(means).mean(0))
    assert (right < averaged).all()
    assert (averaged < averaged + spread).all()
