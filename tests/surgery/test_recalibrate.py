"""``recalibrate``: the population's statistics, whatever the batches, the layers and the calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from surgery.digits import accuracy, digits, network
from surgery.population_samples import assert_population, convolutional, images, in_training, inputs, norms


@pytest.mark.parametrize("sizes", [[53], [20, 20, 13], [26, 26, 1], [2] * 26 + [1]], ids=str)
def test_the_statistics_are_those_of_all_values(sizes):
    net, batches = convolutional(), images().split(sizes)
    values = in_training(net, [b for b in batches if len(b) > 1]) if 1 not in sizes else None
    assert bn.recalibrate(net, batches) is net
    if values is not None:
        assert_population(net, values)
    first = net[0](images()).movedim(1, -1).flatten(0, -2)  # what comes before any batch norm is known for any sizes
    torch.testing.assert_close(net[1].running_mean, first.mean(0))
    torch.testing.assert_close(net[1].running_var, first.var(0))
    assert [norm.num_batches_tracked.item() for norm in norms(net).values()] == [len(sizes)] * 3


def test_what_stays():
    net = convolutional().train()
    net[5].eval()
    kept = {name: tensor.clone() for name, tensor in net.state_dict().items() if "running" not in name}
    objects, momenta = [id(b) for b in net.buffers()], [norm.momentum for norm in norms(net).values()]
    random = torch.get_rng_state()
    bn.recalibrate(net, images().split(20))
    assert [id(b) for b in net.buffers()] == objects
    assert [norm.momentum for norm in norms(net).values()] == momenta == [0.1, 0.01, None]
    assert [m.training for m in net] == [index != 5 for index in range(len(net))]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(
        torch.equal(net.state_dict()[name], tensor) for name, tensor in kept.items() if "num_batches" not in name
    )
    assert not any(m._forward_pre_hooks for m in net)


def test_sequential_is_exact_at_inference():
    net, batches = convolutional().train(), images().split(20)
    bn.recalibrate(net, batches, method="sequential")
    seen = inputs(net.eval(), lambda: net(images()))
    assert_population(net, {name: torch.cat(rows) for name, rows in seen.items()})


def test_by_batch_is_not_what_inference_sees_where_batches_differ():
    """The reason that "sequential" exists; and the bound of how far off the first layer is: not at all."""
    net, batches = convolutional(), images().split(5)
    bn.recalibrate(net, batches)
    seen = {name: torch.cat(rows) for name, rows in inputs(net.eval(), lambda: net(images())).items()}
    torch.testing.assert_close(net[1].running_var, seen["1"].var(0))
    assert (net[5].running_var / seen["5"].var(0)).log().abs().max() > 0.1


def test_each_pass_of_sequential_shuffles_alike():
    net, seen = convolutional(), []
    loader = torch.utils.data.DataLoader(images(), 10, shuffle=True)
    bn.recalibrate(net, loader, lambda m, b: (seen.append(b), m(b)), method="sequential", num_batches=2)
    first, passes = seen[1:3], [seen[i : i + 2] for i in range(1, 7, 2)]  # seen[0] is for the wiring
    assert len(seen) == 7
    assert all(torch.equal(a, b) for each in passes for a, b in zip(each, first, strict=True))


def test_passes_of_sequential_are_the_longest_chain():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.never = (nn.BatchNorm1d(4).double() for _ in range(4))

        def forward(self, x):
            return self.c(torch.relu(self.a(x)) * torch.sigmoid(self.b(x**2)))

    net, x, calls = Branches(), torch.randn(40, 4, dtype=torch.float64), []
    with pytest.warns(RuntimeWarning, match="no batch reached 'never'"):
        bn.recalibrate(net, x.split(15), method="sequential", progress=lambda *of: calls.append(of))
    assert calls == [(i, 6) for i in range(1, 7)]  # a and b together, then c
    seen = inputs(net.eval(), lambda: net(x))
    for name in "abc":
        torch.testing.assert_close(norms(net)[name].running_var, seen[name][0].var(0))
    assert "2 passes" in str(bn.changes(net))


def test_sequential_measures_what_the_first_batch_does_not_reach():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.small, self.large = (nn.BatchNorm1d(3).double() for _ in range(3))

        def forward(self, x):
            y = torch.relu(self.first(x))
            return self.large(y) if x.mean() > 5 else self.small(y)

    net, x = Routed(), torch.randn(20, 3, dtype=torch.float64)
    bn.recalibrate(net, [x, x + 10, x + 11], method="sequential")
    y = torch.relu(net.eval().first(torch.cat([x + 10, x + 11])))
    torch.testing.assert_close(net.large.running_var, y.var(0))
    assert net.large.num_batches_tracked == 2


def test_more_calls_than_are_pooled_at_once():
    layer, x = nn.BatchNorm1d(3).double(), torch.randn(500, 3, dtype=torch.float64) + 1e3
    bn.recalibrate(layer, x.split(6))
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-11, atol=0)
    assert layer.num_batches_tracked == 84


@pytest.mark.parametrize("kind", ["tensor", "pair", "list", "mapping", "several", "forward_fn", "generator", "loader"])
def test_any_batch_structure(kind):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3).double()

        def forward(self, x, scale=1.0):
            return self.norm(x * scale)

    net, x, y = Named(), torch.randn(20, 3, dtype=torch.float64), torch.zeros(20)
    cuts = list(zip(x.split(8), y.split(8), strict=True))
    batches = {
        "tensor": [a for a, _ in cuts],
        "pair": cuts,
        "list": [[a, b] for a, b in cuts],
        "mapping": [{"x": a, "scale": 1.0} for a, _ in cuts],
        "several": [((a, 1.0), b) for a, b in cuts],
        "forward_fn": [{"image": a} for a, _ in cuts],
        "generator": (a for a, _ in cuts),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, shuffle=True),
    }[kind]
    bn.recalibrate(net, batches, (lambda m, b: m(b["image"])) if kind == "forward_fn" else None)
    torch.testing.assert_close(net.norm.running_var, x.var(0))


def test_layers_that_are_chosen_and_those_that_are_left():
    net, batches = convolutional(), images().split(20)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net[5].track_running_stats = False
    net.append(nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64))
    net.append(bn.nn.FrozenBatchNorm1d(4, dtype=torch.float64))
    bn.recalibrate(net, batches)
    told = str(bn.changes(net))
    assert "5: left as it was: its running statistics are not to move" in told
    assert "12: left as it was: it keeps no running statistics" in told
    assert "2 of 2 batch norms have the statistics of 3 batches" in told
    assert torch.equal(net[5].running_mean, before["5.running_mean"])
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])

    # Those that are not chosen go on with the statistics that they have, and what is behind them sees that.
    net = convolutional()
    bn.recalibrate(net, batches, layers="9")
    assert torch.equal(net[1].running_mean, before["1.running_mean"])
    seen = torch.cat(inputs(net.eval(), lambda: net(images()))["9"])
    torch.testing.assert_close(net[9].running_var, seen.var(0))


def test_num_batches_takes_no_more_than_it_needs():
    layer, x = nn.BatchNorm1d(3).double(), torch.randn(40, 3, dtype=torch.float64)
    rest, calls = iter(x.split(8)), []
    bn.recalibrate(layer, rest, num_batches=3, progress=lambda *of: calls.append(of))
    torch.testing.assert_close(layer.running_var, x[:24].var(0))
    assert len(list(rest)) == 2
    assert calls == [(1, 3), (2, 3), (3, 3)]
    bn.recalibrate(layer, x.split(8), num_batches=9, progress=lambda *of: calls.append(of))
    assert calls[3:] == [(i, 5) for i in range(1, 6)]


def test_until_stops_when_statistics_have_settled():
    def draws(spread):
        generator = torch.Generator().manual_seed(3)
        while True:
            shift = spread * torch.randn(1, 3, generator=generator, dtype=torch.float64)
            yield torch.randn(50, 3, generator=generator, dtype=torch.float64) + shift

    used = {}
    for tolerance, spread in ((0.1, 0), (0.02, 0), (0.1, 1)):
        layer = nn.BatchNorm1d(3).double()
        bn.recalibrate(layer, draws(spread), until=tolerance)
        used[tolerance, spread] = layer.num_batches_tracked.item()
        assert abs(layer.running_mean).max() < 3 * tolerance * (1 + spread**2) ** 0.5
        assert f"({tolerance} was asked for)" in str(bn.changes(layer))
    # A standard error of .1 of a deviation takes 100 independent values, two batches: the least that is looked at. One
    # of .02 takes 2500. Where batches have means of their own, what counts is their number, not that of their values.
    assert used[0.1, 0] == 8
    assert used[0.02, 0] >= 64
    assert used[0.1, 1] >= 64


@pytest.mark.parametrize(("batches", "said"), [(6, "fewer than 8"), (20, "converged to")])
def test_until_that_is_not_reached_is_told(batches, said):
    layer = nn.BatchNorm1d(3).double()
    with pytest.warns(RuntimeWarning, match=f"not converged: .*{said}"):
        bn.recalibrate(layer, torch.randn(batches * 5, 3, dtype=torch.float64).split(5), until=1e-4)


def test_a_repair_of_statistics_that_are_not_finite():
    layer, x = nn.BatchNorm1d(3).double(), torch.randn(40, 3, dtype=torch.float64)
    layer.running_var[1] = torch.nan
    bn.recalibrate(layer, [x])
    torch.testing.assert_close(layer.running_var, x.var(0))
    assert "they were not finite before" in str(bn.changes(layer))


def test_what_is_said():
    layer = nn.BatchNorm1d(2, eps=0).double()
    x = torch.tensor([[1.0, -4.0], [3.0, 4.0]], dtype=torch.float64)  # means 2 and 0, unbiased variances 2 and 32
    bn.recalibrate(layer, [x])
    summary, told = str(bn.changes(layer)).splitlines()
    assert summary == "the model: 1 of 1 batch norms have the statistics of 1 batch"
    # 2 in units of sqrt(1); a biased deviation of 4 where there was 1.
    assert told.endswith(
        "2 values a channel (1 call): means moved by up to 2 deviations, deviations by a factor of up to 4"
    )


def test_where_it_matters_and_where_it_does_not():
    """A running average that lags behind costs accuracy; at momentum .1 after 400 steps there is nothing to gain."""
    x, y, _, _ = digits()
    gain = {}
    for momentum, steps in ((0.01, 20), (0.001, 400), (0.1, 400)):
        torch.manual_seed(0)
        net = network(momentum)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(steps):
            batch = torch.randperm(1000)[:60]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        before = accuracy(net)
        bn.recalibrate(net, x.split(100))
        gain[momentum, steps] = accuracy(net) - before
        assert accuracy(net) > 0.93
    assert gain[0.01, 20] > 0.1
    assert gain[0.001, 400] > 0.05
    assert abs(gain[0.1, 400]) < 0.02
