"""What the optimizer does to gamma and beta, and batches that are spread over processes."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn, optim

import batchnorm as bn


def net(norm=None):
    return nn.Sequential(nn.Linear(3, 4), norm or nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))


def split(model, decay=1e-4):
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def test_several_optimizers_are_looked_at_together(examine):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    apart = [optim.SGD(model[0].parameters(), lr=0.1), optim.SGD(model[1].parameters(), lr=0.1, weight_decay=0.1)]
    (found,) = examine(model, "BN107", optimizer=apart)
    assert found.numbers["group"] == 1
    # One optimizer holds the layer's neighbour, the other the layer.
    assert not examine(model, "BN110", optimizer=apart)
    assert examine(model, "BN110", optimizer=apart[:1])
    with pytest.raises(bn.InputError, match=r"expected optimizer= to be a torch.optim.Optimizer, got int"):
        bn.diagnose(model, optimizer=[apart[0], 1])


def test_weight_decay_is_one_finding_for_a_group(examine):
    model = net()
    (found,) = examine(model, "BN107", optimizer=optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01))
    assert (found.layer, found.severity) == ("", "info")
    assert found.numbers == {"group": 0, "weight_decay": 0.01, "layers": 2}
    assert found.message == "gamma or beta of 2 batch norms are in parameter group 0 with weight_decay 0.01 (1, 3)"


def test_no_decay_no_finding(examine):
    model = net()
    assert not examine(model, "BN107", optimizer=optim.SGD(model.parameters(), lr=0.1))
    assert not examine(model, "BN107", optimizer=optim.SGD(split(model), lr=0.1))
    model.requires_grad_(False)  # torch's optimizers pass over what has no gradient
    assert not examine(model, "BN107", optimizer=optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4))


def test_a_frozen_gamma_with_a_gradient_goes_on_moving(examine):
    model = net()
    optimizer = optim.SGD(split(model), lr=0.1, momentum=0.9)
    model(torch.randn(8, 3)).pow(2).sum().backward()
    model[1].weight.requires_grad_(False)
    (found,) = examine(model, "BN107", optimizer=optimizer)
    assert (found.layer, found.severity, found.numbers["group"]) == ("1", "warning", 1)
    before = model[1].weight.clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    model[1].weight.grad = None
    assert not examine(model, "BN107", optimizer=optimizer)


def test_without_an_optimizer_the_rules_say_what_they_need():
    diagnosis = bn.diagnose(net())
    assert diagnosis.skipped["BN107"] == diagnosis.skipped["BN110"] == "needs optimizer"


def test_a_layer_that_was_put_in_after_the_optimizer(examine):
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    assert not examine(model, "BN110", optimizer=optimizer)
    model[1] = nn.BatchNorm1d(4)
    (found,) = examine(model, "BN110", optimizer=optimizer)
    assert (found.layer, found.severity, found.numbers) == ("1", "warning", {"parameters": ["weight", "bias"]})
    model[1].requires_grad_(False)
    assert not examine(model, "BN110", optimizer=optimizer)


def test_training_of_the_head_alone_is_no_finding(examine):
    model = nn.ModuleDict({"trunk": net(), "head": nn.Linear(4, 2)})
    assert not examine(model, "BN110", optimizer=optim.SGD(model["head"].parameters(), lr=0.1))
    alone = nn.BatchNorm1d(4)
    assert not examine(alone, "BN110", optimizer=optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 2 if group is None else 1)


@pytest.mark.usefixtures("two_processes")
def test_layers_by_themselves_in_several_processes(examine):
    (found,) = examine(net(), "BN108")
    assert (found.layer, found.severity, found.numbers) == ("", "info", {"world_size": 2, "layers": 2})
    assert found.message == (
        "2 batch norms are not synchronised over the 2 processes (1, 3): each normalizes with its own part of the batch"
    )
    assert 'to="sync"' in found.remedy


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(("size", "severity"), [(8, "warning"), (9, "info")])
def test_small_parts_are_a_warning(examine, size, severity):
    (found,) = examine(net(), "BN108", batches=[torch.randn(size, 3)])
    assert (found.severity, found.numbers["batch"]) == (severity, size)


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(4),
        bn.nn.SyncBatchNorm(4),
        bn.nn.GhostBatchNorm1d(4, virtual_batch_size=2),
        bn.nn.BatchRenorm1d(4),
        bn.nn.FrozenBatchNorm1d(4),
        nn.BatchNorm1d(4).eval(),
    ],
)
def test_layers_that_are_fine_in_several_processes(examine, norm):
    assert not examine(nn.Sequential(nn.Linear(3, 4), norm), "BN108")


def test_one_process_is_whole(examine):
    assert not examine(net(), "BN108")
    assert not examine(nn.DataParallel(net()), "BN108")


def test_devices_of_data_parallel(examine):
    model = nn.DataParallel(net())
    model.device_ids = [0, 1]
    (found,) = examine(model, "BN108")
    assert "over the 2 devices (module.1, module.3)" in found.message
