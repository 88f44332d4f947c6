"""Choosing layers by name, glob, class and predicate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.selection import select


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn1 = nn.BatchNorm2d(2)
        self.bn2 = bn.nn.BatchNorm2d(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm2d(2)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer10 = nn.Sequential(Block())
        self.frozen = bn.nn.FrozenBatchNorm2d(2)
        self.again = self.layer1[0].bn1
        self.head = nn.BatchNorm1d(2)


ALL = [
    "stem",
    "layer1.0.bn1",
    "layer1.0.bn2",
    "layer1.1.bn1",
    "layer1.1.bn2",
    "layer10.0.bn1",
    "layer10.0.bn2",
    "head",
]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (None, ALL),
        ("stem", ["stem"]),
        ("layer1", ALL[1:5]),  # not layer10
        ("layer1.1", ALL[3:5]),
        ("", ALL),
        ("again", ["layer1.0.bn1"]),
        ("layer1.*", ALL[1:5]),
        ("*.bn?", ALL[1:7]),
        ("*.bn[2]", [ALL[2], ALL[4], ALL[6]]),
        (["head", "layer10.0.bn2"], ["layer10.0.bn2", "head"]),
        (nn.BatchNorm1d, ["head"]),
        (bn.nn.BatchNorm2d, [ALL[2], ALL[4], ALL[6]]),
        ((nn.BatchNorm1d, "stem"), ["stem", "head"]),
        (nn.SyncBatchNorm, []),
        (lambda name, layer: "1.1" in name and isinstance(layer, bn.nn.BatchNorm2d), ["layer1.1.bn2"]),
        (lambda name, _: name == "again", ["layer1.0.bn1"]),
    ],
)
def test_what_is_chosen(layers, names):
    assert [layer.name for layer in select(Net(), layers)] == names


def test_a_shared_layer_is_there_once_with_all_its_names():
    (layer,) = select(Net(), ["again", "layer1.0.bn1"])
    assert layer.names == ("layer1.0.bn1", "again")


def test_frozen_layers_on_request():
    assert [layer.name for layer in select(Net(), frozen=True)] == [*ALL[:-1], "frozen", "head"]
    assert [layer.name for layer in select(Net(), "frozen", frozen=True)] == ["frozen"]
    with pytest.raises(bn.InputError, match="at or below 'frozen', got FrozenBatchNorm2d"):
        select(Net(), "frozen")


def test_other_modules_on_request():
    found = select(Net(), "layer1", among=lambda module: isinstance(module, nn.Conv2d))
    assert [layer.name for layer in found] == ["layer1.0.conv", "layer1.1.conv"]


def test_the_model_itself_may_be_the_layer():
    layer = nn.BatchNorm1d(2)
    assert [found.module for found in select(layer)] == [layer]
    assert [found.names for found in select(layer, "")] == [("",)]


def test_a_wrapper_is_looked_through():
    wrapped = nn.DataParallel(Net())
    assert [layer.name for layer in select(wrapped, "stem")] == ["module.stem"]
    assert [layer.name for layer in select(wrapped, "module.layer1.0")] == [
        "module.layer1.0.bn1",
        "module.layer1.0.bn2",
    ]
    compiled = torch.compile(Net())
    assert [layer.name for layer in select(compiled, "layer1.1.bn*")] == [
        "_orig_mod.layer1.1.bn1",
        "_orig_mod.layer1.1.bn2",
    ]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer1.0.bn3", r"got 'layer1.0.bn3', which none has: is it 'layer1.0.bn\d', 'layer1.0.bn\d', '.*'\?"),
        ("zzz*", "got 'zzz\\*', which none has: is it 'stem', 'layer1.0.bn1', 'again'"),
        (["stem", "haed"], "got 'haed', which none has: is it 'head'"),
        ("layer1.0.conv", "expected a batch norm at or below 'layer1.0.conv', got Conv2d"),
        (3, "expected layers to be names, globs, classes of modules or a predicate of name and module, got 3"),
        (
            nn.ReLU(),
            "expected layers to be names, globs, classes of modules or a predicate of name and module, got ReLU",
        ),
        ([3], "expected the name, glob or class of layers, got 3"),
        (int, "expected the name, glob or class of layers, got <class 'int'>"),
    ],
)
def test_what_finds_nothing(layers, message):
    with pytest.raises(bn.InputError, match=message):
        select(Net(), layers)


def test_nothing_to_choose_from():
    assert select(nn.Linear(2, 2)) == []
    with pytest.raises(bn.InputError, match="got 'bn', which none has: the model has none"):
        select(nn.Linear(2, 2), "bn")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "operation",
    [
        bn.freeze,
        bn.unfreeze,
        lambda model: bn.recalibrate(model, [torch.randn(5, 3)]),
        bn.adapt,
        lambda model: bn.adapt(model, method="tent"),
    ],
)
def test_what_is_scripted_is_not_passed_by_in_silence(operation):
    script = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)).eval())
    with pytest.raises(bn.SurgeryError, match="expected modules of Python, got the scripted Sequential at ''"):
        operation(script)
    model = nn.Sequential(nn.BatchNorm1d(3), script)
    with pytest.raises(bn.SurgeryError, match=r"the scripted BatchNorm1d at '1.0': script it .* others by layers="):
        operation(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_beside_what_is_scripted_others_can_be_chosen():
    model = nn.Sequential(nn.BatchNorm1d(3), torch.jit.script(nn.BatchNorm1d(3)))
    assert [layer.name for layer in select(model, "0")] == ["0"]
    assert [layer.name for layer in select(model, "*")] == ["0"]
    harmless = nn.Sequential(nn.BatchNorm1d(3), torch.jit.script(nn.InstanceNorm1d(3, track_running_stats=True)))
    assert [layer.name for layer in select(harmless)] == ["0"]
