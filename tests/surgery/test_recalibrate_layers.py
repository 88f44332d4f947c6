"""``recalibrate`` of every kind of layer, and of models that call them in ways of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from oracles.model_zoo import Architecture, image, timm_model
from surgery.population_samples import assert_population, convolutional, images, in_training


@pytest.mark.parametrize("given", ["mask", "lengths", "nested"])
def test_padding_does_not_count(given):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.nn.BatchNorm1d(3, dtype=torch.float64)

        def forward(self, x, lengths):
            if given == "nested":
                rows = [row[:, :n].T for row, n in zip(x, lengths.tolist(), strict=True)]
                return self.norm(torch.nested.nested_tensor(rows, layout=torch.jagged))
            if given == "lengths":
                return self.norm(x, lengths=lengths)
            return self.norm(x, mask=torch.arange(x.size(2)) < lengths[:, None])

    x, lengths = torch.randn(12, 3, 7, dtype=torch.float64), torch.tensor([7, 1, 3, 5, 2, 6, 4, 4, 1, 7, 2, 3])
    real = torch.arange(7) < lengths[:, None]
    x = torch.where(real[:, None], x, torch.nan)
    net = Padded()
    bn.recalibrate(net, [{"x": x[i : i + 5], "lengths": lengths[i : i + 5]} for i in (0, 5, 10)])
    values = x.movedim(1, -1)[real]
    torch.testing.assert_close(net.norm.running_mean, values.mean(0))
    torch.testing.assert_close(net.norm.running_var, values.var(0))
    assert f"{len(values)} values a channel (3 calls)" in str(bn.changes(net))


def test_a_batch_that_is_all_padding_is_no_call():
    net = bn.nn.BatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64)
    masks = [torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)]
    bn.recalibrate(net, list(zip([x, x + 9], masks, strict=True)), lambda m, b: m(b[0], mask=b[1]))
    torch.testing.assert_close(net.running_mean, x.mean(0))
    assert net.num_batches_tracked == 1


@pytest.mark.parametrize(
    "layer",
    [
        bn.nn.BatchNorm2d(4),
        bn.nn.BatchNorm2d(4, ddof=0),
        bn.nn.GhostBatchNorm2d(4, virtual_batch_size=4),
        bn.nn.BatchRenorm2d(4),
        bn.nn.SyncBatchNorm(4),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, affine=False),
    ],
    ids=lambda layer: str(layer).split(",")[0] + (" ddof=0" if "ddof" in str(layer) else ""),
)
@pytest.mark.parametrize("training", [True, False])
def test_layers_with_a_variance(layer, training):
    layer = copy.deepcopy(layer).double().train(training)
    x = 100 + torch.randn(31, 4, 3, 2, dtype=torch.float64)
    bn.recalibrate(layer, x.split(10))
    rows = x.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(layer.running_mean, rows.mean(0))
    torch.testing.assert_close(layer.running_var, rows.var(0, correction=getattr(layer, "ddof", 1)))
    assert layer.training is training


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_complex_layer(ddof):
    layer = bn.nn.ComplexBatchNorm1d(3, ddof=ddof, dtype=torch.float64)
    x = torch.randn(25, 3, 2, dtype=torch.complex128) * (2 + 1j) + torch.arange(25).reshape(-1, 1, 1)
    bn.recalibrate(layer, x.split(9))
    for channel in range(3):
        parts = torch.view_as_real(x[:, channel]).reshape(-1, 2)
        torch.testing.assert_close(layer.running_mean[channel], parts.mean(0))
        cov = torch.cov(parts.T, correction=ddof)
        torch.testing.assert_close(layer.running_covar[channel], torch.stack([cov[0, 0], cov[1, 1], cov[0, 1]]))


@pytest.mark.parametrize("kind", ["dbn", "iternorm", "outside"])
def test_whitening_layers_get_the_covariance(kind):
    make = {
        "dbn": lambda: bn.nn.DecorrelatedBatchNorm(6, 3),
        "iternorm": lambda: bn.nn.IterNorm(6, 3),
        "outside": lambda: bn.nn.NormOutsideGradient(6, "whitening", group_size=3),
    }
    layer = make[kind]().double()
    x = torch.randn(40, 6, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    x = x + torch.arange(40).reshape(-1, 1, 1) * torch.linspace(-1, 1, 6)[:, None]
    bn.recalibrate(layer, x.split(11))
    rows = x.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(layer.running_mean, rows.mean(0))
    for group in range(2):
        cov = torch.cov(rows[:, 3 * group : 3 * group + 3].T)
        torch.testing.assert_close(layer.running_cov[group], cov, rtol=1e-10, atol=1e-10)


def test_a_subclass_with_an_activation():
    """timm's BatchNormAct2d has its activation inside: what counts is its input."""
    architecture = Architecture("efficientnet_b0", 32)
    net = timm_model(architecture.name).double()
    batches = [image(architecture, n, seed).double() for seed, n in enumerate((3, 4))]
    values = in_training(net, batches)
    bn.recalibrate(net, batches)
    assert len(values) > 40
    assert_population(net, values, rtol=1e-9)


def test_a_layer_that_is_called_twice_pools_its_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()

        def forward(self, x):
            return self.norm(x[:, :4]) + self.norm(3 * x[:, 4:] + 1)

    net, x = Shared(), torch.randn(30, 8, dtype=torch.float64)
    bn.recalibrate(net, x.split(7))
    both = torch.cat([x[:, :4], 3 * x[:, 4:] + 1])
    torch.testing.assert_close(net.norm.running_mean, both.mean(0))
    torch.testing.assert_close(net.norm.running_var, both.var(0))
    assert net.norm.num_batches_tracked == 10
    assert "60 values a channel (10 calls)" in str(bn.changes(net))


def test_a_large_mean_costs_nothing():
    layer = nn.BatchNorm1d(5)
    x = (1e4 + torch.randn(1000, 5, dtype=torch.float64)).float()
    bn.recalibrate(layer, x.split(90))
    torch.testing.assert_close(layer.running_var.double(), x.double().var(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_mean.double(), x.double().mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_in_narrow_buffers_are_rounded_once(dtype):
    layer = nn.BatchNorm2d(3).to(dtype)
    x = (torch.randn(50, 3, 4, 4) * 3 + 2).to(dtype)
    bn.recalibrate(layer, x.split(8))
    rows = x.double().movedim(1, -1).flatten(0, -2)
    # Sums of narrow values may be begun in float32.
    torch.testing.assert_close(layer.running_var, rows.var(0).to(dtype))
    torch.testing.assert_close(layer.running_mean, rows.mean(0).to(dtype))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_the_model(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    def with_a_backward(model, x):
        with torch.enable_grad():
            model(x.clone().requires_grad_()).sum().backward()

    net, x = Checkpointed().double(), torch.randn(30, 4, dtype=torch.float64)
    values = net.block[0](x).detach()
    for forward_fn in (None, with_a_backward):
        bn.recalibrate(net, [b.requires_grad_() for b in x.split(8)], forward_fn)
        torch.testing.assert_close(net.block[1].running_var, values.var(0))
        assert net.block[1].num_batches_tracked == 4


def test_compiled_and_wrapped_models_run_as_they_are_inside():
    net = convolutional(torch.float32)
    batches = images(dtype=torch.float32).split(20)
    expected = bn.recalibrate(copy.deepcopy(net), batches).state_dict()
    compiled = torch.compile(net, backend="eager")
    compiled(batches[0])
    assert bn.recalibrate(compiled, batches, lambda m, b: m(b) if m is net else pytest.fail("wrapped")) is compiled
    inside = copy.deepcopy(net)
    inside[4].compile(backend="eager")
    for found in (net, bn.recalibrate(inside, batches), bn.recalibrate(nn.DataParallel(copy.deepcopy(net)), batches)):
        found = found.module if isinstance(found, nn.DataParallel) else found
        for name, tensor in expected.items():
            if "running" in name:
                torch.testing.assert_close(found.state_dict()[name], tensor)


@pytest.mark.parametrize("method", ["batch", "sequential"])
def test_in_inference_mode(method):
    net, x = convolutional(), images()
    expected = bn.recalibrate(copy.deepcopy(net), x.split(20), method=method).state_dict()
    with torch.inference_mode():
        bn.recalibrate(net, (x + 0).split(20), method=method)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    net.train()(x).sum().backward()  # its buffers are ordinary tensors as before


def test_under_autocast_statistics_are_of_what_the_layer_is_given():
    net, x = convolutional(torch.float32), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        bn.recalibrate(net, x.split(20))
        rows = net[0](x)
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(net[1].running_var, rows.double().movedim(1, -1).flatten(0, -2).var(0).float())
