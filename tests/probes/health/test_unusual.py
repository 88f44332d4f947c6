"""No rule fails on unusual layers, and none changes them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import batchnorm as bn


class Subclass(nn.BatchNorm1d):
    """Somebody's own, with a fused activation."""

    def forward(self, x):
        return super().forward(x).relu()


LAYERS = {
    "torch": lambda: nn.BatchNorm1d(4),
    "sync": lambda: nn.SyncBatchNorm(4),
    "subclass": lambda: Subclass(4),
    "plain": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "no channels": lambda: nn.BatchNorm1d(0),
    "one channel": lambda: nn.BatchNorm1d(1),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "lazy": lambda: nn.LazyBatchNorm1d(),
    "our lazy": lambda: bn.nn.LazyBatchNorm1d(),
    "ours": lambda: bn.nn.BatchNorm1d(4, activation="relu"),
    "our sync": lambda: bn.nn.SyncBatchNorm(4),
    "without beta": lambda: bn.nn.BatchNorm1d(4, bias=False),
    "frozen": lambda: bn.nn.FrozenBatchNorm1d(4),
    "frozen, not affine": lambda: bn.nn.FrozenBatchNorm1d(4, affine=False),
    "ghost": lambda: bn.nn.GhostBatchNorm1d(4, virtual_batch_size=2),
    "renorm": lambda: bn.nn.BatchRenorm1d(4),
    "decorrelated": lambda: bn.nn.DecorrelatedBatchNorm(4, group_size=2),
    "iternorm": lambda: bn.nn.IterNorm(4, group_size=2),
    "outside": lambda: bn.nn.NormOutsideGradient(4, kind="whitening"),
    "complex": lambda: bn.nn.ComplexBatchNorm1d(4),
    "quantized": lambda: torch.ao.nn.quantized.BatchNorm2d(4),
    "parametrized": lambda: parametrizations.weight_norm(nn.BatchNorm1d(4), dim=None),
}
FORMS = {
    "as it is": lambda layer: layer,
    "eval": lambda layer: layer.eval(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "float16": lambda layer: layer.half(),
    "meta": lambda layer: layer.to("meta"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_rule_takes_every_layer(examine, name, form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: lazy modules are new, tensors without elements
        layer = FORMS[form](LAYERS[name]())
        model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), layer)
        if form == "meta" and not any(torch.nn.parameter.is_lazy(p) for p in model.parameters()):
            model.to("meta")
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=1e-4)
    for given in (model, layer, nn.DataParallel(model)):
        examine(given, optimizer=optimizer)
        if form != "as it is":
            break


@pytest.mark.parametrize("name", ["torch", "ours", "ghost", "renorm", "iternorm", "frozen", "subclass", "cumulative"])
def test_with_an_example(examine, name):
    examine(nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), LAYERS[name]()), example=torch.randn(6, 4))


def test_lazy_and_meta_models_are_not_run(examine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU())
    assert not examine(lazy, example=torch.randn(5, 3))  # of a layer with a hook nothing is said
    assert isinstance(lazy[0], nn.LazyLinear)
    meta = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.BatchNorm1d(4, device="meta"), nn.ReLU())
    assert [finding.code for finding in examine(meta, example=torch.randn(5, 3))] == ["BN001"]


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Linear(2, 2), nn.ModuleDict()])
def test_models_without_batch_norm(examine, model):
    assert not examine(model)
    assert bn.diagnose(model).layers == 0


def test_a_compiled_and_a_quantization_aware_model(examine):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(model)
    (found,) = examine(compiled, "BN001")
    assert found.layer == "_orig_mod.0"
    qat = torch.ao.nn.intrinsic.qat.ConvBn2d(3, 4, 1, qconfig=qconfig())
    assert not examine(nn.Sequential(copy.deepcopy(qat).freeze_bn_stats()).train(), "BN101")
    examine(nn.Sequential(qat), example=torch.randn(2, 3, 4, 4))


def qconfig():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.get_default_qat_qconfig("x86")
