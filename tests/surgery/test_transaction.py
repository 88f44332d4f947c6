"""A model stays as it was where an operation on it fails; and what was done is told."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import batchnorm as bn
from batchnorm.surgery.changes import Change, remember
from batchnorm.surgery.changes import _history as history
from batchnorm.surgery.transaction import unchanged_on_error
from oracles.model_zoo import randomize_statistics


def described(model):
    """All that a user could tell apart."""
    return {
        name: (
            type(module),
            module.training,
            {key: id(child) for key, child in module._modules.items()},
            {key: id(parameter) for key, parameter in module._parameters.items()},
            {key: id(buffer) for key, buffer in module._buffers.items()},
            [parameter.requires_grad for parameter in module.parameters(recurse=False)],
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            {key for key in module.__dict__ if not key.startswith("_")},
        )
        for name, module in model.named_modules()
    }


def test_everything_is_as_it_was_after_a_failure():
    model = randomize_statistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4))))
    model[1].eval()
    handle = model[1].register_forward_hook(lambda *_: None)
    before, values = described(model), copy.deepcopy(model.state_dict())

    def operate():
        model[0].weight.data.zero_()
        model[1].running_mean.add_(1)
        model[1].register_forward_pre_hook(lambda *_: None)
        model[2][0] = nn.Identity()
        model.append(nn.ReLU())
        model.train()
        model[0].bias.requires_grad_(False)
        model.extra = 1
        parametrizations.weight_norm(model[0])
        handle.remove()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), unchanged_on_error(model, parameters=True):
        operate()
    assert described(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    handle.remove()
    assert not model[1]._forward_hooks


def test_without_a_failure_nothing_is_undone():
    model = nn.Sequential(nn.BatchNorm1d(2))
    with unchanged_on_error(model):
        model[0] = nn.Identity()
    assert isinstance(model[0], nn.Identity)


def test_changes_are_kept_beside_the_model_and_printed(caplog):
    model = nn.Sequential(nn.Linear(2, 2))
    assert str(bn.changes(model)) == "nothing was changed"
    with caplog.at_level(logging.INFO, "batchnorm.surgery"):
        done = remember(model, "convert", [Change("0", "a became b", lost="its name"), Change("", "moved")])
    assert str(done) == "0: a became b (lost: its name)\nthe model: moved"
    assert [record.message for record in caplog.records] == [f"convert: {change}" for change in done]
    remember(model, "fold", [Change("1", "folded into 0")])
    assert bn.changes(model).to_list() == [{"layer": "1", "what": "folded into 0", "lost": ""}]
    assert [change.layer for change in bn.changes(model, last=False)] == ["0", "", "1"]
    assert [change.layer for change in bn.changes(model, last=False).lost] == ["0"]
    assert bn.changes(copy.deepcopy(model)) == ()
    assert set(model.__dict__) == set(nn.Sequential().__dict__)


def test_a_new_root_has_the_history_of_the_old():
    old, new = nn.Linear(1, 1), nn.Linear(1, 1)
    remember(old, "convert", [Change("", "first")])
    remember(new, "fold", [Change("", "second")], before=old)
    assert [change.what for change in bn.changes(new, last=False)] == ["first", "second"]
    assert [change.what for change in bn.changes(old, last=False)] == ["first"]


def test_models_are_not_kept_alive():
    gc.collect()  # what earlier tests left
    gc.collect()  # models of other tests
    before = len(history)
    model = nn.Linear(1, 1)
    remember(model, "convert", [Change("", "first")])
    del model
    gc.collect()
    assert len(history) == before


def test_wrappers_make_no_difference_to_what_is_known():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    bn.convert(model, "ours")
    compiled = torch.compile(model, backend="eager")
    assert len(bn.changes(compiled)) == 1
    bn.freeze(nn.DataParallel(model))
    assert [change.layer for change in bn.changes(model)] == ["module.1"]
    folded = bn.fold(compiled.eval(), torch.randn(4, 2))
    assert len(bn.changes(folded, last=False)) == 4
