"""What a survey of batches measures, on whatever model, and that it leaves no trace."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.probes.health import Subject, diagnose
from batchnorm.probes.health.survey import MAX_BATCHES, Survey
from oracles.digits import batches, convnet, mlp, train


def survey(model: nn.Module, data, **options) -> Survey:
    return Survey.take(Subject(model, data, **options))


def images(count: int = 4, size: int = 16, channels: int = 3) -> list[torch.Tensor]:
    return [torch.randn(size, channels, 6, 6) for _ in range(count)]


def test_populations_are_those_of_all_batches_in_each_mode():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).eval()
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    data = [*images(3), *images(1, size=7)]
    first, second = survey(model, data).layers
    with torch.no_grad():
        given = torch.cat([model[0](x) for x in data]).double()
        evaluated = torch.cat([model[:4](x) for x in data]).double()
        model[1].train().track_running_stats = False
        trained = torch.cat([model[:4](x) for x in data]).double()
    assert (first.name, second.name, first.place, second.place) == ("1", "4", 0, 1)
    for population, expected in ((first.evaluated, given), (first.trained, given), (second.evaluated, evaluated)):
        torch.testing.assert_close(population.moments.mean, expected.mean((0, 2, 3)))
        torch.testing.assert_close(population.var(), expected.var((0, 2, 3), correction=0))
    torch.testing.assert_close(second.trained.var(), trained.var((0, 2, 3), correction=0))
    assert first.evaluated.counts == [256, 256, 256, 7 * 16]
    torch.testing.assert_close(first.evaluated.high, given.amax((0, 2, 3)))
    means = torch.cat([model[0](x).detach().double().mean((2, 3)) for x in data])
    torch.testing.assert_close(first.evaluated.means.total.m2, means.var(0, correction=0) * len(means))


def test_masked_positions_count_nowhere():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.nn.BatchNorm1d(3)

        def forward(self, x, lengths):
            return self.norm(x, lengths=lengths)

    x, lengths = torch.randn(4, 3, 9), torch.tensor([9, 2, 5, 7])
    x[1, :, 2:] = 1e6
    (seen,) = survey(Masked(), [{"x": x, "lengths": lengths}]).layers
    values = torch.cat([row[:, :length] for row, length in zip(x, lengths, strict=True)], 1).double()
    torch.testing.assert_close(seen.evaluated.var(), values.var(1, correction=0))
    torch.testing.assert_close(seen.evaluated.high, values.amax(1))
    torch.testing.assert_close(
        seen.evaluated.means.total.mean[0],
        values.new_tensor(
            [float(row[0, :length].double().mean()) for row, length in zip(x, lengths, strict=True)]
        ).mean(),
    )
    assert seen.masked
    assert seen.evaluated.counts == [23]
    assert seen.units.count == 23


def test_the_distance_of_modes_is_that_of_the_outputs():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).eval()
    model[1].running_mean.normal_()
    data = [torch.randn(20, 5) for _ in range(3)]
    found = survey(model, data)
    apart = spread = noise = noise_spread = 0.0
    for x in data:
        with torch.no_grad():
            y = model[0](x).double()
            normal = lambda part: (part - part.mean(0)) / (part.var(0, correction=0) + 1e-5).sqrt()  # noqa: E731
            evaluated = (y - model[1].running_mean) / (model[1].running_var + 1e-5).sqrt()
            apart += float((normal(y) - evaluated).square().sum())
            spread += float((normal(y) - normal(y).mean(0)).square().sum())
            for start in (0, 1):
                noise += float((normal(y)[start::2] - normal(y[start::2])).square().sum())
            noise_spread += float((normal(y) - normal(y).mean(0)).square().sum())
    for parting in (found.outputs, found.layers[0].parting):
        assert parting.distance == pytest.approx((apart / spread) ** 0.5, rel=1e-4)
        assert parting.noise == pytest.approx((noise / noise_spread) ** 0.5, rel=1e-4)


def test_dropout_and_random_numbers_are_not_part_of_the_difference():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(5, 7), Noisy(), nn.Dropout(0.9), nn.BatchNorm1d(7, track_running_stats=False))
    assert survey(model, [torch.randn(20, 5)]).outputs.distance == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_was(training):
    model = nn.Sequential(convnet(), nn.Dropout(), nn.Linear(10, 3)).train(training)
    model[0][1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    diagnose(model, batches(16, 3), select=["BN3"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        survey(model, [torch.randn(8, 4), torch.randn(8, 5)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[1].training
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks


def test_a_generator_is_read_once_and_no_further_than_needed():
    read = []

    def stream():
        for number in range(MAX_BATCHES + 50):
            read.append(number)
            yield torch.randn(4, 3)

    found = survey(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), stream())
    assert len(found.sizes) == len(read) == MAX_BATCHES


def test_nothing_is_kept_of_a_batch():
    alive = []

    def stream():
        for _ in range(6):
            batch = torch.randn(8, 3, 6, 6)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(batch() is not None for batch in alive) <= 1

    found = survey(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), stream())
    assert len(found.sizes) == 6
    assert [batch() for batch in alive] == [None] * 6


def test_a_layer_that_its_user_put_in_eval_mode_does_not_learn():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    assert [seen.learns for seen in survey(model, [torch.randn(8, 3)]).layers] == [False, True]
    assert [seen.learns for seen in survey(model.eval(), [torch.randn(8, 3)]).layers] == [True, True]


def test_a_layer_that_stays_in_eval_mode_when_its_model_trains_does_not_learn():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            return self.head(self.norm(x))

    model = Backbone().eval()
    model.norm.running_mean.fill_(7)
    assert [seen.learns for seen in survey(model, [torch.randn(32, 3)]).layers] == [False, True]
    assert not model.training
    assert not model.head.training
    model.head.running_mean.fill_(-7)  # what it is given by the other, whose statistics are meant to be what they are
    assert not diagnose(model, [torch.randn(100, 3) for _ in range(3)], select=["BN3"])


def shared() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return {"a": self.norm(x), "b": [x.mean((2, 3)), None, 3]}


class Subclass(nn.BatchNorm2d):
    def forward(self, input, extra=None):
        return super().forward(input).relu(), extra


class Stubborn(nn.BatchNorm2d):
    def forward(self, input):
        if self.training:
            raise ValueError("not now")
        return super().forward(input)


UNUSUAL = {
    "ghost": lambda: bn.nn.GhostBatchNorm2d(3, virtual_batch_size=4),
    "renorm": lambda: bn.nn.BatchRenorm2d(3),
    "sync": lambda: bn.nn.SyncBatchNorm(3),
    "torch sync": lambda: nn.SyncBatchNorm(3),
    "iternorm": lambda: bn.nn.IterNorm(3, 3),
    "decorrelated": lambda: bn.nn.DecorrelatedBatchNorm(3, 3),
    "frozen": lambda: bn.nn.FrozenBatchNorm2d(3),
    "fused": lambda: bn.nn.BatchNorm2d(3, activation="relu"),
    "no affine": lambda: nn.BatchNorm2d(3, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "odd momentum": lambda: nn.BatchNorm2d(3, momentum=2.0),
    "instance": lambda: nn.InstanceNorm2d(3, track_running_stats=True),
    "nothing": lambda: nn.Identity(),
    "shared": shared,
    "outputs": Outputs,
    "subclass": lambda: Subclass(3),
    "stubborn": lambda: Stubborn(3),
    "bfloat16": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(torch.bfloat16),
    "half": lambda: nn.BatchNorm2d(3).half(),
    "parallel": lambda: nn.DataParallel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))),
    "checkpointed": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_layers_are_surveyed_or_left_alone(kind):
    model = UNUSUAL[kind]()
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.normal_()
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    before = copy.deepcopy(model.state_dict())
    data = [x.to(dtype) for x in images()]
    found = survey(model, data)
    diagnose(model, data, select=["BN3"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert bool(found.layers) != (kind in ("frozen", "instance", "nothing"))
    if kind in ("parallel", "compiled"):
        assert found.layers[0].name == {"parallel": "module.1", "compiled": "_orig_mod.1"}[kind]
    if kind in ("sync", "torch sync"):
        assert found.layers[0].parting.distance > 0


@pytest.mark.parametrize("make", [lambda: nn.LazyBatchNorm2d(), lambda: nn.BatchNorm2d(3, device="meta")])
def test_a_model_without_numbers_has_nothing_to_survey(make):
    model = nn.Sequential(make())
    assert survey(model, images()).layers == []
    assert type(model[0]) is type(make())


def test_complex_layers_are_run_and_not_compared():
    model = nn.Sequential(bn.nn.ComplexBatchNorm1d(3))
    data = [torch.randn(8, 3, dtype=torch.complex64)]
    assert survey(model, data).layers == []
    assert not diagnose(model, data, select=["BN3"])


def test_batches_of_any_structure():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, scale=1.0):
            return self.norm(x * scale)

    x = torch.randn(8, 3)
    expected = survey(Named(), [x]).layers[0].evaluated.moments.mean
    for data, forward in (([(x, torch.ones(8))], None), ([{"x": x}], None), ([((x, 1.0), 0)], None)):
        torch.testing.assert_close(survey(Named(), data, forward_fn=forward).layers[0].evaluated.moments.mean, expected)
    found = survey(Named(), [{"data": {"deep": x}}], forward_fn=lambda model, batch: model(batch["data"]["deep"]))
    torch.testing.assert_close(found.layers[0].evaluated.moments.mean, expected)
    assert found.layers[0].parting.noise > 0


def test_batches_that_cannot_be_cut_give_no_noise():
    def forward(model, batch):
        assert len(batch["x"]) == 8
        return model(batch["x"])

    found = survey(nn.Sequential(nn.BatchNorm1d(3)), [{"x": torch.randn(8, 3)}] * 3, forward_fn=forward)
    assert found.outputs.distance > 0
    assert found.outputs.noise != found.outputs.noise


def test_a_batch_of_one_value_is_not_run_in_batch_mode():
    found = survey(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(8, 3), torch.randn(1, 3), torch.randn(8, 3)])
    assert found.sizes == [8, 1, 8]
    assert found.layers[0].trained.counts == [8, 8]


def test_an_examination_of_a_trained_network_is_silent():
    torch.manual_seed(1)
    assert not diagnose(train(mlp(), 200), batches(60), select=["BN3"])


def test_a_large_mean_costs_no_accuracy():
    data = [torch.randn(64, 3, dtype=torch.float64) + 1e8 for _ in range(4)]
    before = [x.clone() for x in data]
    (seen,) = survey(nn.Sequential(nn.BatchNorm1d(3).double()), data).layers
    assert all(torch.equal(x, same) for x, same in zip(data, before, strict=True))
    expected = torch.cat(data).var(0, correction=0)
    torch.testing.assert_close(seen.evaluated.var(), expected)
    torch.testing.assert_close(seen.evaluated.squares.total.mean, expected, rtol=0.05, atol=0)


class Observer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.tensor([]))

    def forward(self, x):
        self.low.resize_(x.size(1)).copy_(x.amin((0, 2, 3)))
        return x


@pytest.mark.parametrize("part", [Observer, lambda: torch.jit.script(nn.Conv2d(3, 3, 1))])
def test_parts_of_other_kinds(part):
    model = nn.Sequential(part(), nn.BatchNorm2d(3), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    diagnose(model, images(), select=["BN3"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(survey(model, images()).layers) == 1


def test_nested_batches_are_run_and_not_measured():
    rows = [torch.randn(length, 3) for length in (5, 7, 9, 6)]
    data = [torch.nested.nested_tensor(rows, layout=torch.jagged)] * 2
    assert survey(nn.Sequential(bn.nn.BatchNorm1d(3)), data).layers == []
