"""The way back from a conversion: everything is as it was."""

from __future__ import annotations

import copy
import io
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from nn.random_state import randomise
from surgery.description import describe

KINDS = {
    "sync": {},
    "ghost": {"virtual_batch_size": 2},
    "renorm": {"r_max": 2.0},
    "frozen": {},
    "ours": {},
    "torch": {},
    "group": {},
    "layer": {},
    "instance": {},
}


class Tagged(nn.BatchNorm2d):
    """A user's, with nothing but a class attribute."""

    decay = 0.0


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def layer(draw: st.DrawFn, rank: int) -> nn.Module:
    C = draw(st.sampled_from([1, 4, 6]))
    torchs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    ours = (bn.nn.BatchNorm1d, bn.nn.BatchNorm2d, bn.nn.BatchNorm3d)[rank - 1]
    ghost = (bn.nn.GhostBatchNorm1d, bn.nn.GhostBatchNorm2d, bn.nn.GhostBatchNorm3d)[rank - 1]
    renorm = (bn.nn.BatchRenorm1d, bn.nn.BatchRenorm2d, bn.nn.BatchRenorm3d)[rank - 1]
    frozen = (bn.nn.FrozenBatchNorm1d, bn.nn.FrozenBatchNorm2d, bn.nn.FrozenBatchNorm3d)[rank - 1]
    sync = [nn.SyncBatchNorm, bn.nn.SyncBatchNorm]
    kind = draw(st.sampled_from([torchs, torchs, ours, ours, ghost, renorm, frozen, *sync, Tagged]))
    options = {
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
        "affine": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
    }
    if kind is not frozen:
        options["momentum"] = draw(st.sampled_from([0.1, 0.3, None]))
    if kind is not Tagged:
        options["bias"] = draw(st.booleans())
    if kind in (ours, ghost, renorm, frozen, bn.nn.SyncBatchNorm):
        options["activation"] = draw(st.sampled_from([None, "relu", "gelu"]))
    if kind in (ours, ghost):
        options["ddof"] = draw(st.sampled_from([0, 1]))
    if kind is ghost:
        options["virtual_batch_size"] = 3
    made = randomise(kind(C, **options))
    if draw(st.booleans()):
        made.eval()
    if draw(st.booleans()):
        made.register_forward_hook(hook)
        made.register_forward_pre_hook(hook, with_kwargs=True)
        made.register_full_backward_hook(hook)
        made.register_state_dict_pre_hook(hook)
        made.register_load_state_dict_pre_hook(load_hook)
    if draw(st.booleans()):
        made.note = ["mine"]
        made.helper = nn.Linear(2, 2)
        made.register_buffer("seen", torch.ones(2), persistent=False)
    if isinstance(made.weight, nn.Parameter):
        made.weight.requires_grad_(draw(st.booleans()))
        if draw(st.integers(0, 3)) == 0:
            parametrize.register_parametrization(made, "weight", Squared())
    return made


def hook(*_):
    return None


def load_hook(module, *_):
    assert isinstance(module, nn.Module)


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """A few containers with batch norms of random kinds, some of them at several places."""
    layers = [layer(draw, draw(st.integers(1, 3))) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.integers(0, 7)) == 0:
        return layers[0]
    pick = st.sampled_from(layers)
    inner = nn.ModuleDict({"a": draw(pick), "b": nn.ModuleList([draw(pick), nn.ReLU()])})
    root = nn.Sequential(draw(pick), inner, nn.Linear(2, 3), draw(pick))
    root.kept = draw(pick)
    root.train(draw(st.booleans())) if draw(st.booleans()) else None
    return root


CHOICES = st.sampled_from([None, lambda *_: True, lambda name, _: "b" in name, nn.BatchNorm2d])


@settings(max_examples=120)
@given(trees(), st.lists(st.tuples(st.sampled_from(list(KINDS)), CHOICES), min_size=1, max_size=3))
def test_whatever_was_converted_comes_back(model, kinds):
    before = describe(model)
    converted = model
    for kind, layers in kinds:
        now = describe(converted)
        try:
            converted = bn.convert(converted, kind, layers, **KINDS[kind])
        except bn.SurgeryError:  # a parametrized gamma to be frozen, an unknown rank
            assert describe(converted) == now
    if any(hasattr(module, "_converted_from") for module in converted.modules()):
        converted = bn.revert(converted)
    assert describe(converted) == before


@pytest.mark.parametrize("to", KINDS)
def test_what_training_gave_is_kept(to):
    model = randomise(nn.Sequential(nn.BatchNorm2d(4, momentum=None)))
    bn.convert(model, to, **KINDS[to])
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if to != "torch":  # which it already was
        bn.revert(model)
    after = model.state_dict()
    assert {key for key in state if torch.equal(state[key], after[key])} == set(state)
    assert model[0].momentum is None


@pytest.mark.parametrize("to", ["sync", "frozen", "group"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"])
def test_the_way_back_survives_copies_and_pickles(to, how):
    model = nn.Sequential(randomise(bn.nn.BatchNorm2d(4, activation="gelu", momentum=0.3)), randomise(Tagged(4)))
    expected, x = copy.deepcopy(model).eval(), torch.randn(3, 4, 2, 2)
    bn.convert(model, to)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        copied = how(model)
    bn.revert(copied)
    assert [type(layer) for layer in copied] == [bn.nn.BatchNorm2d, Tagged]
    assert (copied[0].activation, copied[0].momentum) == ("gelu", 0.3)
    assert torch.equal(copied.eval()(x), expected(x))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    assert type(bn.revert(model)[1]) is Tagged


@pytest.mark.parametrize("to", ["sync", "frozen", "ghost"])
def test_a_state_dict_goes_to_a_model_that_was_converted_likewise(to):
    def fresh() -> nn.Module:
        return bn.convert(nn.Sequential(nn.BatchNorm2d(4)), to, **KINDS[to])

    trained, other = randomise(fresh()), fresh()
    other.load_state_dict(trained.state_dict())
    bn.revert(trained)
    bn.revert(other)
    assert type(other[0]) is nn.BatchNorm2d
    for key, tensor in trained.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    plain = nn.Sequential(nn.BatchNorm2d(4))
    plain.load_state_dict(other.state_dict())  # torch's keys all along


def test_a_pickle_of_what_became_torchs_needs_nothing_of_this_package():
    model = bn.convert(nn.Sequential(bn.nn.BatchNorm2d(3, ddof=0, momentum=0.2)), "torch")
    assert b"batchnorm.nn" not in pickle.dumps(model).replace(b"batchnorm.nn.batch_norm:BatchNorm2d", b"")
    assert b"batchnorm.surgery" not in pickle.dumps(model)
    back = bn.revert(pickle.loads(pickle.dumps(model)))
    assert type(back[0]) is bn.nn.BatchNorm2d
    assert (back[0].ddof, back[0].momentum) == (0, 0.2)


def test_other_precision_and_devices():
    model = randomise(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    model[1].half()
    model[1].running_mean = model[1].running_mean.float()
    bn.convert(model, "group")
    model[0].double()
    bn.revert(model)
    assert {tensor.dtype for key, tensor in model[0].state_dict().items() if key != "num_batches_tracked"} == {
        torch.float64
    }
    assert model[0].num_batches_tracked.dtype == torch.int64
    assert (model[1].weight.dtype, model[1].running_mean.dtype) == (torch.float16, torch.float32)
    bn.convert(model, "frozen", "0")
    model[0].to(torch.bfloat16)
    bn.revert(model)
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.dtype == torch.bfloat16


def test_settings_that_were_changed_meanwhile():
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(4), bn.nn.BatchNorm2d(4)), "sync")
    model[0].momentum, model[0].eps = 0.01, 1e-2
    model[0].activation = model[1].activation = "relu"
    bn.revert(model)
    assert (model[0].momentum, model[0].eps) == (0.01, 1e-2)
    assert model[1].activation == "relu"
    assert bn.changes(model)[0].lost == "activation='relu'"  # torch's layer has none


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].bias = model[0].bias
    weight, bias = model[0].weight, model[0].bias
    bn.convert(model, "frozen", ["0", "1"])
    with torch.no_grad():
        bias.fill_(7)  # trained on, in the linear layer
    assert model[0].bias.tolist() == [0, 0, 0]
    bn.revert(model)
    assert model[0].weight is model[1].weight is weight
    assert model[0].bias is model[2].bias is bias
    assert bias.tolist() == [7, 7, 7]


def test_a_frozen_layer_does_not_move_with_its_parameter():
    model = nn.Sequential(nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    model(torch.randn(4, 3)).square().sum().backward()
    bn.convert(model, "frozen")  # without the optimizer, which steps on
    optimizer.step()
    assert model[0].weight.tolist() == [1, 1, 1]
    assert bn.revert(model)[0].weight.tolist() == [1, 1, 1]


def test_what_the_statistics_are_worth_afterwards_is_told():
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(4)), "group")
    bn.revert(model)
    assert bn.changes(model)[0].lost == "running statistics are those from before it was converted: recalibrate"
    bn.convert(model, "frozen")
    bn.revert(model)
    assert str(bn.changes(model)) == "0: bn.nn.FrozenBatchNorm2d(4) became torch.nn.BatchNorm2d(4)"


def test_what_was_never_converted():
    model = nn.Sequential(nn.BatchNorm2d(4), bn.nn.SyncBatchNorm(4))
    with pytest.raises(bn.InputError, match="expected a model with layers that were converted, got none"):
        bn.revert(model)
    bn.convert(model, "sync", "0")
    with pytest.raises(bn.InputError, match="expected a converted layer at or below '1', got SyncBatchNorm"):
        bn.revert(model, "1")
    assert type(bn.revert(model, ["0"])[0]) is nn.BatchNorm2d


def test_some_layers_only():
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), "sync")
    bn.revert(model, "1")
    assert [type(layer) for layer in model] == [bn.nn.SyncBatchNorm, nn.BatchNorm2d]
    bn.convert(model, "torch")
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(bn.InputError, match="got none"):
        bn.revert(model)


def test_buffers_that_are_not_saved():
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].register_buffer("running_mean", torch.ones(4), persistent=False)
    before = describe(model)
    for to in ("sync", "frozen", "group"):
        bn.convert(model, to)
        assert "0.running_mean" not in model.state_dict()
    bn.revert(model)
    assert describe(model) == before
