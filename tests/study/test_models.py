"""The networks: the same weights under every normalization, and noise where it belongs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.study import models


@pytest.mark.parametrize("norm", ["none", "batch", "batch-plain", "noisy", "renorm", "ghost", "group"])
def test_variants_with_one_seed_begin_with_the_same_weights(norm):
    plain = models.mlp(64, 10, seed=3)
    other = models.mlp(64, 10, seed=3, norm=norm, noise=(1.0, 0.5))

    def pick(model):
        return [part.weight for part in model if isinstance(part, nn.Linear)]

    assert len(pick(plain)) == 4
    assert all(torch.equal(a, b) for a, b in zip(pick(plain), pick(other), strict=True))
    assert not torch.equal(pick(plain)[0], pick(models.mlp(64, 10, seed=4))[0])


def test_making_a_net_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    models.mlp(4, 2, seed=0, norm="noisy", noise=(1.0, 1.0))(torch.ones(3, 4))
    models.mlp(4, 2, seed=0, norm="reprojected")
    models.convnet(1, 2, seed=0, norm="batch")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_papers_net():
    model = models.mlp(64, 10, seed=0, norm="batch")
    assert [type(part) for part in model] == [nn.Linear, batchnorm.nn.BatchNorm1d, nn.Sigmoid] * 3 + [nn.Linear]
    first = model[0].weight
    assert first.std().item() == pytest.approx(math.sqrt(2 / 164), rel=0.05)
    assert all(part.bias.abs().max() == 0 for part in model if isinstance(part, nn.Linear))
    assert torch.equal(models.mlp(64, 10, seed=0, gain=4.0)[0].weight, 4 * first)
    assert models.mlp(64, 10, seed=0, activation="relu")[0].weight.std().item() == pytest.approx(
        math.sqrt(2 / 64), rel=0.05
    )
    assert models.last_hidden_activation(model) is model[8]
    assert not models.mlp(64, 10, seed=0, norm="batch-plain")[1].affine


def test_noise_is_drawn_at_each_training_step_and_for_each_unit():
    layer = models.NoisyBatchNorm1d(5, 2.0, 0.5, torch.Generator().manual_seed(0))
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    plain = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    slopes, shifts = [], []
    for _ in range(200):
        y = layer(x)
        shift = y.mean(0)
        slope = (y - shift).pow(2).mean(0).sqrt()
        torch.testing.assert_close(y, plain * slope + shift, rtol=1e-3, atol=1e-3)
        slopes.append(slope)
        shifts.append(shift)
    slopes, shifts = torch.stack(slopes), torch.stack(shifts)
    assert slopes.min() >= 0.499
    assert slopes.max() <= 1.501
    assert slopes.min() < 0.6
    assert slopes.max() > 1.4
    assert shifts.abs().max() <= 2.001
    assert shifts.abs().max() > 1.8
    assert shifts.std(0).min() > 0.5  # every unit by itself


def test_noise_in_eval_mode_only_when_asked():
    layer = nn.Sequential(models.NoisyBatchNorm1d(5, 2.0, 0.5, torch.Generator().manual_seed(0))).eval()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x, rtol=1e-4, atol=1e-4)
    models.shake(layer, True)
    assert not torch.equal(layer(x), layer(x))
    models.shake(layer, False)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("norm", ["none", "batch", "batch-plain"])
def test_the_convnet_learns(norm):
    model = models.convnet(1, 2, seed=0, width=4, norm=norm)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    # Two textures of the same brightness.
    stripes = torch.stack([torch.eye(8).roll(int(k), 0) if k % 2 else torch.eye(8).flip(0) for k in labels])
    x = stripes[:, None] + 0.1 * torch.randn(40, 1, 8, 8, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model(x).shape == (40, 2)
    assert losses[-1] < 0.5 * losses[0]
    assert any(isinstance(part, batchnorm.nn.BatchNorm2d) for part in model) == (norm != "none")


def test_normalizations_for_small_batches():
    options = {"seed": 0, "layers": 1, "width": 20}
    renorm = models.mlp(4, 2, norm="renorm", momentum=0.01, **options)[1]
    ghost = models.mlp(4, 2, norm="ghost", ghost=5, momentum=0.01, **options)[1]
    group = models.mlp(4, 2, norm="group", groups=4, **options)[1]
    batch = models.mlp(4, 2, norm="batch", momentum=0.01, **options)[1]
    assert isinstance(renorm, batchnorm.nn.BatchRenorm1d)
    assert isinstance(ghost, batchnorm.nn.GhostBatchNorm1d)
    assert ghost.virtual_batch_size == 5
    assert [layer.momentum for layer in (renorm, ghost, batch)] == [0.01] * 3
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    by_hand = x.reshape(6, 4, 5)
    by_hand = (by_hand - by_hand.mean(2, keepdim=True)) / (by_hand.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(group(x), by_hand.reshape(6, 20))


def test_normalizations_outside_the_gradient_and_by_whitening():
    options = {"seed": 0, "layers": 1, "width": 20}
    plain = models.mlp(4, 2, norm="outside", refresh=3, **options)[1]
    white = models.mlp(4, 2, norm="outside-whitening", group_size=5, **options)[1]
    assert isinstance(plain, batchnorm.nn.NormOutsideGradient)
    assert (plain.kind, plain.every) == ("mean-variance", 3)
    assert (white.kind, white.every, white.group_size) == ("whitening", 1, 5)
    for norm, kind in (
        ("iternorm", batchnorm.nn.IterNorm),
        ("decorrelated", batchnorm.nn.DecorrelatedBatchNorm),
    ):
        layer = models.mlp(4, 2, norm=norm, group_size=4, **options)[1]
        assert isinstance(layer, kind)
        assert layer.group_size == 4


def test_a_net_that_is_reprojected_computes_what_the_plain_one_does():
    plain = models.mlp(4, 2, seed=3, layers=2, width=20)
    model = models.mlp(4, 2, seed=3, layers=2, width=20, norm="reprojected", damping=0.25)
    layers = [part for part in model if isinstance(part, batchnorm.nn.WhitenedLinear)]
    assert [layer.eps for layer in layers] == [0.25] * 3
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), plain(x))
    for layer in layers:
        layer.reproject()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(layers[0].weight, plain[0].weight)
