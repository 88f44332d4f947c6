"""Parameter groups when gamma and beta come and go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, as those who keep weight decay from the norms have them."""
    norms = [p for layer in model if isinstance(layer, nn.BatchNorm1d) for p in layer.parameters()]
    others = [p for layer in model if isinstance(layer, nn.Linear) for p in layer.parameters()]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("to", ["sync", "ghost", "renorm", "ours", "torch", "group", "layer", "instance"])
def test_most_kinds_leave_the_optimizer_alone(to):
    model = network()
    optimizer = grouped(model)
    step(model, optimizer)
    before, state = held(optimizer), copy.deepcopy(optimizer.state_dict())
    bn.convert(model, to, optimizer=optimizer, **({"virtual_batch_size": 8} if to == "ghost" else {}))
    assert held(optimizer) == before
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("make", [grouped, lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)])
def test_frozen_parameters_leave_and_come_back_to_their_places_with_their_state(make):
    model = network()
    optimizer = make(model)
    step(model, optimizer)
    before, state = held(optimizer), copy.deepcopy(optimizer.state_dict())
    norms = {id(p) for layer in (model[1], model[3]) for p in layer.parameters()}
    bn.convert(model, "frozen", optimizer=optimizer)
    assert held(optimizer) == [[key for key in group if key not in norms] for group in before]
    assert not {id(p) for p in optimizer.state} & norms
    bn.revert(model, optimizer=optimizer)
    assert held(optimizer) == before
    for index, values in state["state"].items():
        for key, value in values.items():
            assert torch.equal(optimizer.state_dict()["state"][index][key], value)
    step(model, optimizer)


def test_training_goes_on_as_if_nothing_had_been():
    one, other = network(), network()
    other.load_state_dict(one.state_dict())
    optimizers = grouped(one), grouped(other)
    for model, optimizer in zip((one, other), optimizers, strict=True):
        step(model, optimizer)
        if model is other:
            bn.convert(model, "frozen", optimizer=optimizer)
            bn.revert(model, optimizer=optimizer)
        step(model, optimizer, seed=1)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [("1", "3"), ("3", "1")])
def test_one_after_the_other_in_any_order(order):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = held(optimizer)
    bn.convert(model, "frozen", "1", optimizer=optimizer)
    bn.convert(model, "frozen", "3", optimizer=optimizer)
    for name in order:
        bn.revert(model, name, optimizer=optimizer)
    assert held(optimizer) == before


def test_several_optimizers():
    model = network()
    first, second = (torch.optim.SGD(model[i : i + 2].parameters(), lr=0.1) for i in (0, 2))
    before = held(first), held(second)
    bn.convert(model, "frozen", optimizer=[first, second])
    assert [len(group["params"]) for each in (first, second) for group in each.param_groups] == [2, 2]
    bn.revert(model, optimizer=(second, first))
    assert (held(first), held(second)) == before


def test_a_parameter_that_another_module_has_stays():
    model = network()
    model[2].bias = model[1].bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bn.convert(model, "frozen", "1", optimizer=optimizer)
    assert any(p is model[2].bias for p in optimizer.param_groups[0]["params"])
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_new_parameters_take_the_place_of_the_old_ones():
    model = network()
    optimizer = grouped(model)
    bn.convert(model, lambda _, layer: nn.GroupNorm(1, layer.num_features), "1", optimizer=optimizer)
    group = optimizer.param_groups[1]["params"]
    assert [id(p) for p in group] == [id(p) for p in (*model[1].parameters(), *model[3].parameters())]
    bn.revert(model, optimizer=optimizer)
    assert {id(p) for p in group} == {id(p) for p in (*model[1].parameters(), *model[3].parameters())}


def test_without_a_place_nothing_is_done():
    frozen = nn.Sequential(nn.Linear(3, 3), bn.nn.FrozenBatchNorm1d(3))
    optimizer = torch.optim.SGD([{"params": [frozen[0].weight]}, {"params": [frozen[0].bias]}], lr=0.1)
    layer, before = frozen[1], held(optimizer)
    with pytest.raises(
        bn.SurgeryError, match="to which group the parameters of '1' belong, got one that never had them"
    ):
        bn.convert(frozen, "sync", "1", optimizer=optimizer)
    assert frozen[1] is layer
    assert held(optimizer) == before
    single = torch.optim.SGD(frozen.parameters(), lr=0.1)
    bn.convert(frozen, "sync", "1", optimizer=single)
    assert held(single) == [[id(p) for p in frozen.parameters()]]


def test_a_copy_of_the_model_with_an_optimizer_of_its_own():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bn.convert(model, "frozen", optimizer=optimizer)
    copied = copy.deepcopy(model)
    other = torch.optim.SGD(copied.parameters(), lr=0.1)
    bn.revert(copied, optimizer=other)
    assert {id(p) for p in other.param_groups[0]["params"]} == {id(p) for p in copied.parameters()}
