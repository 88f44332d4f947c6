"""Modes: mixed ones, frozen by half, and statistics that are not kept."""

from __future__ import annotations

import pytest
from torch import nn

import batchnorm as bn


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))


def found(examine, model, code):
    return [(finding.layer, finding.severity) for finding in examine(model, code)]


def test_train_inside_eval_is_an_error(examine):
    model = net().eval()
    model[2][1].train()
    assert found(examine, model, "BN101") == [("2.1", "error")]
    (sign,) = examine(model, "BN101")
    assert "predictions depend on their batch" in sign.message


def test_eval_inside_train_is_a_warning(examine):
    model = net()
    model[1].eval()
    (sign,) = examine(model, "BN101")
    assert (sign.layer, sign.severity) == ("1", "warning")
    assert sign.message == "in eval mode inside a model in train mode: the next model.train() unfreezes it"
    assert "bn.freeze(model, '1')" in sign.remedy


def test_a_whole_branch_in_eval_is_an_info(examine):
    model = net()
    model[2].eval()
    assert found(examine, model, "BN101") == [("2.1", "info")]


class KeepsEval(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def test_what_stays_frozen_is_no_finding(examine):
    assert not examine(KeepsEval(*net()).train(), "BN101")
    assert not examine(nn.Sequential(nn.Conv2d(3, 4, 3), bn.nn.FrozenBatchNorm2d(4).eval()), "BN101")
    held = net()
    held[1].train = lambda _=True: held[1]  # the way of bn.freeze
    held[1].training = False
    assert not examine(held, "BN101")


@pytest.mark.parametrize("mode", [True, False])
def test_one_mode_for_all_is_fine(examine, mode):
    assert not examine(net().train(mode), "BN101")
    assert not examine(nn.BatchNorm2d(4).train(mode), "BN101")


def test_without_statistics_the_mode_does_not_matter(examine):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    model[1].train()
    assert not examine(model, "BN101")


def test_the_names_inside_a_wrapper_are_the_wrappers(examine):
    model = nn.DataParallel(net())
    model.module[1].eval()
    assert found(examine, model, "BN101") == [("module.1", "warning")]


# BN102


def test_frozen_parameters_and_moving_statistics(examine):
    model = net()
    model[1].requires_grad_(False)
    (sign,) = examine(model, "BN102")
    assert (sign.layer, sign.severity) == ("1", "warning")
    assert sign.remedy == "bn.freeze(model, '1')"


def half(change):
    model = net()
    change(model[1])
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.weight.requires_grad_(False),  # beta learns
        lambda norm: norm.requires_grad_(False).eval(),
        lambda norm: norm.eval(),  # statistics frozen, gamma and beta learn
        lambda norm: (norm.requires_grad_(False), setattr(norm, "momentum", 0.0)),
        lambda norm: (norm.requires_grad_(False), norm.__dict__.update(batchnorm_frozen={"affine": {}})),
    ],
)
def test_halves_that_are_no_fault(examine, change):
    assert not examine(half(change), "BN102")


def test_layers_without_gamma_cannot_freeze_it(examine):
    assert not examine(nn.Sequential(nn.BatchNorm1d(4, affine=False)), "BN102")
    assert not examine(nn.Sequential(bn.nn.FrozenBatchNorm1d(4)), "BN102")


# BN103


def test_layers_without_running_statistics(examine):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    (sign,) = examine(model, "BN103")
    assert (sign.layer, sign.severity) == ("1", "warning")
    assert "in eval mode too" in sign.message


def test_the_flag_that_does_not_do_what_it_seems_to(examine):
    model = net()
    model[1].track_running_stats = False
    (sign,) = examine(model, "BN103")
    assert sign.message.startswith("track_running_stats is False but the buffers are there: eval uses them")


def test_a_momentum_of_zero(examine):
    model = net()
    model[1].momentum = 0.0
    (sign,) = examine(model, "BN103")
    assert (sign.layer, sign.numbers) == ("1", {"momentum": 0.0})
    assert not examine(model.eval(), "BN103")


def test_what_keeps_its_statistics_is_fine(examine):
    assert not examine(net(), "BN103")
    assert not examine(nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.InstanceNorm1d(4)), "BN103")
    asked = net()
    asked[1].track_running_stats = False
    asked[1].__dict__["batchnorm_frozen"] = {"update": True}
    assert not examine(asked, "BN103")


@pytest.mark.parametrize("parts", [{}, {"affine": False}, {"use": False}, {"update": False, "use": False}])
@pytest.mark.parametrize("mode", [True, False])
def test_what_bn_freeze_was_asked_for_is_no_finding(examine, parts, mode):
    model = bn.freeze(net(), **parts).train(mode)
    assert not examine(model, "BN1")
