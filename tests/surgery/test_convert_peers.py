"""Side by side with those who do a part of the same, and on well-known architectures."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

import batchnorm as bn
from nn.random_state import randomise
from oracles import composer_surgery
from oracles.model_zoo import ARCHITECTURES, Architecture, image, timm_model, trained_like
from surgery.description import describe

# Small ones of different makes: plain, fused activations, several branches, a transformer with batch norm.
FEW = ("resnet18", "lcnet_050", "repvgg_a0", "efficientformer_l1")
ALL = os.environ.get("BATCHNORM_TEST_ZOO") == "1"


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if ALL or a.name in FEW], ids=lambda a: a.name)
def test_architectures_compute_the_same_and_come_back(architecture: Architecture):
    # In float64: some of them magnify the rounding of float32 ten thousand times.
    model = trained_like(architecture).double()
    x = image(architecture, seed=5).double()
    before = describe(model)
    with torch.no_grad():
        expected = model(x)
        for to in ("sync", "frozen", "ours"):
            model = bn.convert(model, to)
            assert len(bn.changes(model).lost) == 0
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
        model = bn.revert(model)
        assert describe(model) == before
        assert torch.equal(model(x), expected)


def like_torchs(theirs: nn.Module, ours: nn.Module) -> None:
    for name, layer in theirs.named_modules():
        if isinstance(layer, nn.SyncBatchNorm):
            other = ours.get_submodule(name)
            assert type(other) is bn.nn.SyncBatchNorm
            for key in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
                assert getattr(other, key) == getattr(layer, key), (name, key)
            for key, tensor in layer.state_dict(keep_vars=True).items():
                assert other.state_dict(keep_vars=True)[key] is tensor


def test_torchs_conversion_where_that_is_right():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None, eps=1e-3), nn.Sequential(nn.BatchNorm3d(2))
    )
    model[2].eval()
    like_torchs(nn.SyncBatchNorm.convert_sync_batchnorm(copy.copy(model)), bn.convert(model, "sync"))


@pytest.mark.parametrize("theirs", ["torch", "timm"])
def test_what_other_conversions_lose(theirs):
    """pytorch #41081, timm #1254: they drop hooks, attributes, our activation, a missing bias; timm keeps its own."""
    layer = bn.nn.BatchNorm2d(4, activation="relu", ddof=0)
    layer.tag = "mine"
    called: list[str] = []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    model = randomise(nn.Sequential(layer)).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    called.clear()
    if theirs == "torch":
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    else:
        timm_model("resnet18")  # lets timm be imported
        convert = pytest.importorskip("timm.layers").convert_sync_batchnorm
    lossy = convert(copy.deepcopy(model))
    assert not hasattr(lossy[0], "tag")
    assert (lossy(x) < 0).any()
    assert called == []
    bn.convert(model, "sync")
    torch.testing.assert_close(model(x), expected)
    assert (model[0].tag, called) == ("mine", ["hook"])


class Subclass(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("theirs", ["torch", "timm"])
def test_what_other_conversions_take_apart_or_flatten(theirs):
    timm_model("resnet18")
    timm = pytest.importorskip("timm.layers").convert_sync_batchnorm
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if theirs == "torch" else timm
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.Sequential(shared), Subclass(4))
    flat = convert(copy.deepcopy(model))
    assert flat[0] is not flat[1][0]
    assert type(flat[2]) is nn.SyncBatchNorm
    with pytest.raises(bn.SurgeryError, match="got Subclass at '2', which defines forward"):
        bn.convert(model, "sync")
    ours = bn.convert(model, "sync", unknown="skip")
    assert ours[0] is ours[1][0]
    assert type(ours[2]) is Subclass


def test_timms_freezing_of_its_own_layers():
    timm_model("resnet18")
    layers, functions = pytest.importorskip("timm.layers"), pytest.importorskip("timm.utils.model")
    model = randomise(nn.Sequential(layers.BatchNormAct2d(4, inplace=False, momentum=None))).eval()
    model[0].num_batches_tracked.fill_(7)
    weight, x = model[0].weight, torch.randn(2, 4, 3, 3)
    theirs = functions.freeze_batch_norm_2d(copy.deepcopy(model))
    ours = bn.convert(model, "frozen")
    torch.testing.assert_close(ours(x), theirs(x))
    thawed, back = functions.unfreeze_batch_norm_2d(theirs), bn.revert(ours)
    assert (thawed[0].momentum, int(thawed[0].num_batches_tracked)) == (0.1, 0)  # forgotten
    assert (back[0].momentum, int(back[0].num_batches_tracked)) == (None, 7)
    assert back[0].weight is weight
    assert type(back[0]) is layers.BatchNormAct2d


def test_composers_replacement():
    """It finds shared layers too; it makes new parameters, whose values and places in a group a policy must see to."""
    surgery = composer_surgery.module_surgery()

    def network() -> nn.Module:
        shared = nn.BatchNorm2d(8)
        return randomise(nn.Sequential(shared, nn.Sequential(nn.Conv2d(8, 8, 1), shared), nn.BatchNorm2d(8)))

    model = network()
    group = {nn.BatchNorm2d: lambda layer, _: nn.GroupNorm(4, layer.num_features)}
    theirs = copy.deepcopy(model)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    pairs = surgery.replace_module_classes(theirs, group, optimizers=optimizer)
    ours = bn.convert(model, "group", num_groups=4, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(pairs) == len(bn.changes(ours)) == 2
    assert theirs[0] is theirs[1][1]
    assert ours[0] is ours[1][1]
    assert theirs[0].weight.tolist() == [1] * 8  # Opacus #319: gamma is gone
    assert ours[0].weight.tolist() != [1] * 8
    assert [id(p) for p in optimizer.param_groups[0]["params"]][2:] == [
        id(p) for new in pairs.values() for p in new.parameters()
    ]
    functions = bn.convert(network(), lambda _, layer: nn.GroupNorm(4, layer.num_features))
    assert [type(layer) for layer in functions.modules()] == [type(layer) for layer in theirs.modules()]
