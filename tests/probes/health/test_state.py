"""Statistics that were never updated, are not finite, or are another model's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import batchnorm as bn


def net(layers=2):
    parts = [part for _ in range(layers) for part in (nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU())]
    return nn.Sequential(*parts)


def ran(model, times=3, learn=False):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).pow(2).mean().backward()
        if learn:
            optimizer.step()
    return model


def fresh_norm(model, index=4):
    model[index].reset_running_stats()
    return model


def signs(found):
    return [(finding.layer, finding.severity) for finding in found]


# BN201


def test_one_layer_that_never_ran(examine):
    model = fresh_norm(ran(net())).eval()
    (found,) = examine(model, "BN201")
    assert (found.layer, found.severity, found.numbers) == ("4", "warning", {"never_updated": 1, "updated": 1})
    assert found.message == (
        "the running statistics were never updated, while 1 of 2 in the model were updated: "
        "eval normalizes with mean 0 and variance 1"
    )
    assert "bn.recalibrate(model, batches)" in found.remedy
    assert signs(examine(model.train(), "BN201")) == [("4", "info")]  # or it is new


def test_learned_weights_without_their_statistics(examine):
    model = ran(net(4), learn=True).eval()
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
    assert signs(examine(model, "BN201")) == [(str(i), "warning") for i in (1, 4, 7, 10)]
    assert not examine(model.train(), "BN201")


def test_a_new_model_is_told_once_in_eval_and_never_in_train(examine):
    assert not examine(net(), "BN201")
    (found,) = examine(net().eval(), "BN201")
    assert (found.layer, found.severity, found.numbers) == ("", "info", {"never_updated": 2, "updated": 0})


def test_random_betas_are_not_learned_ones(examine):
    torch.manual_seed(0)
    model = net(6).eval()
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.normal_(layer.bias, std=0.1)
    assert signs(examine(model, "BN201")) == [("", "info")]


def test_statistics_without_a_count_are_statistics(examine):
    model = ran(net()).eval()
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            layer.num_batches_tracked.zero_()  # as states from Caffe and Keras have it
    assert not examine(model, "BN201")


def test_constant_layers_may_have_0_and_1(examine):
    assert not examine(nn.Sequential(bn.nn.FrozenBatchNorm1d(4), nn.Linear(4, 4), ran(net())).eval(), "BN201")


@pytest.mark.parametrize("layer", [bn.nn.DecorrelatedBatchNorm(4, group_size=2), bn.nn.IterNorm(4, group_size=2)])
def test_layers_with_a_covariance_are_looked_at_too(examine, layer):
    layer.reset_running_stats()
    model = nn.Sequential(layer, nn.BatchNorm1d(4))
    model[1](torch.randn(8, 4))
    assert signs(examine(model.eval(), "BN201")) == [("0", "warning")]
    model.train()(torch.randn(64, 4))
    assert not examine(model.eval(), "BN201")


# BN204


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(examine, name, value):
    model = ran(net())
    with torch.no_grad():
        getattr(model[4], name)[[0, 2]] = value
    (found,) = examine(model, "BN204")
    nans = 2 if value != value else 0
    assert (found.layer, found.severity) == ("4", "error")
    assert found.numbers == {"tensor": name, "nan": nans, "inf": 2 - nans}
    assert found.message == f"{name} has 2 {'NaN' if nans else 'inf'} among 4 values (0, 2)"


def test_the_channels_that_are_listed_are_few(examine):
    model = nn.Sequential(nn.BatchNorm1d(20))
    model[0].running_mean.fill_(float("nan"))
    (found,) = examine(model, "BN204")
    assert found.message.endswith("(0, 1, 2, 3, 4, 5, 6, 7 and 12 more)")


def test_covariances_and_frozen_layers_count(examine):
    model = nn.Sequential(bn.nn.IterNorm(4, group_size=2), bn.nn.FrozenBatchNorm1d(4))
    model[0].running_cov[1, 0, 1] = float("nan")
    model[1].weight[3] = float("inf")
    assert [(f.layer, f.numbers["tensor"]) for f in examine(model, "BN204")] == [("0", "running_cov"), ("1", "weight")]


def test_large_numbers_are_finite(examine):
    model = ran(net())
    model[1].running_var.fill_(3e38)
    assert not examine(model, "BN204")


# BN206


def averaged(model, times=5, **options):
    torch.manual_seed(0)
    twin = AveragedModel(model, **options)
    for _ in range(times):
        ran(model, 1, learn=True)
        twin.update_parameters(model)
    return twin


def test_averaged_weights_with_the_last_statistics(examine):
    model = averaged(ran(net()))
    (found,) = examine(model, "BN206")
    assert (found.layer, found.severity, found.numbers) == ("", "warning", {"averaged": 5, "layers": 2})
    assert "those of the model that came last" in found.message
    assert not examine(copy.deepcopy(model).to("meta"), "BN2")
    inside = nn.ModuleDict({"swa": model, "swap": ran(net())})
    assert signs(examine(inside, "BN206")) == [("swa", "warning")]


def test_equal_averages_of_statistics_are_foreign_too(examine):
    (found,) = examine(averaged(ran(net()), use_buffers=True), "BN206")
    assert found.severity == "info"
    assert "averages over the models" in found.message


def test_averages_that_have_their_own(examine):
    recomputed = averaged(ran(net()))
    update_bn([torch.randn(16, 4) for _ in range(4)], recomputed)
    assert not examine(recomputed, "BN206")  # 4 batches counted, 5 models averaged
    assert not examine(averaged(ran(net()), times=0), "BN206")
    ema = averaged(ran(net()), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    assert not examine(ema, "BN206")


def test_a_copy_of_the_statistics_beside_other_weights(examine):
    online = ran(net(), learn=True)
    ema = copy.deepcopy(online)
    assert not examine(nn.ModuleDict({"online": online, "ema": ema}), "BN206")  # a whole copy is right
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(0.99)
    (found,) = examine(nn.ModuleDict({"online": online, "ema": ema}), "BN206")
    assert (found.layer, found.numbers) == ("ema", {"layers": 2, "same_as": "online"})
    ran(ema, 1)
    assert not examine(nn.ModuleDict({"online": online, "ema": ema}), "BN206")


def test_two_layers_on_one_input_have_the_same_statistics_rightly(examine):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = net(), net()

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Branches()
    model.a[0], model.b[0] = nn.Identity(), nn.Identity()  # both first batch norms see x
    ran(model, learn=True)
    assert torch.equal(model.a[1].running_var, model.b[1].running_var)
    assert not examine(model, "BN206")


@pytest.mark.parametrize(("count", "found"), [(12.5, True), (12.0, False), (float("nan"), True)])
def test_a_counter_that_was_averaged(examine, count, found):
    model = ran(net())
    model[1].num_batches_tracked = torch.tensor(count)
    assert signs(examine(model, "BN206")) == ([("1", "warning")] if found else [])


@pytest.mark.parametrize("held", ["freeze", "class", "untracked"])
@pytest.mark.parametrize(
    ("code", "value"), [("BN204", float("nan")), ("BN202", -1.0), ("BN309", float("nan")), ("BN309", -1.0)]
)
def test_the_remedy_of_a_held_layer_says_what_lets_it_move(examine, code, value, held):
    model, batches = ran(net()).eval(), [torch.randn(16, 4) for _ in range(3)]
    model[1].running_var[2] = value
    if held == "freeze":
        bn.freeze(model, "1")
    elif held == "class":
        bn.convert(model, "frozen", layers="1")
    else:
        model[1].track_running_stats = False
    (found,) = examine(model, code, batches=batches)
    assert "bn.recalibrate(model, batches)" in found.remedy
    if held == "freeze":
        assert "bn.unfreeze(model, '1')" in found.remedy
        bn.unfreeze(model, "1")
    elif held == "class":
        assert """bn.convert(model, to="torch", layers='1')""" in found.remedy
        bn.convert(model, to="torch", layers="1")
    else:
        assert "set its track_running_stats to True" in found.remedy
        model[1].track_running_stats = True
    bn.recalibrate(model, batches)
    assert not examine(model, code, batches=batches)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_recalibration_ends_the_finding_until_weights_are_averaged_again(examine, decay):
    model = ran(net())
    averaged = bn.surgery.averaged_model(model, decay=decay)
    for _ in range(3):
        averaged.update_parameters(ran(model, learn=True))
    batches = [torch.randn(16, 4) for _ in range(8)]
    (found,) = examine(averaged, "BN206")
    assert found.severity == "warning"
    bn.recalibrate(averaged, batches, layers="module.1")
    assert examine(averaged, "BN206")
    bn.recalibrate(averaged, batches)
    assert not examine(averaged, "BN206")
    assert not examine(copy.deepcopy(averaged), "BN206")
    averaged.update_parameters(ran(model, learn=True))
    assert examine(averaged, "BN206")


def test_our_averages_of_statistics_are_called_averages(examine):
    for decay in (None, 0.9):
        model = ran(net())
        averaged = bn.surgery.averaged_model(model, decay=decay, buffers="average")
        for _ in range(3):
            averaged.update_parameters(ran(model, learn=True))
        found = examine(averaged, "BN206")
        assert [(each.severity, "averages over the models" in each.message) for each in found] == (
            [("info", True)] if decay is None else []
        )
