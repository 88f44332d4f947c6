"""Layers of other packages, of users, and what cannot be converted."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from nn.random_state import randomise
from oracles.absent_torchvision import stand_in
from surgery.description import describe


class Scaled(nn.BatchNorm2d):
    """Not torch's ways."""

    def __init__(self, channels: int, scale: float = 2.0) -> None:
        super().__init__(channels)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class Silent(nn.BatchNorm2d):
    """Torch's ways, and frozen by train()."""

    def train(self, mode: bool = True) -> Silent:
        return super().train(mode and False)


class Described(nn.BatchNorm2d):
    family = "norms"

    def extra_repr(self) -> str:
        return "mine"


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 write it."""

    def __init__(self, channels: int, eps: float | None = 1e-5) -> None:
        super().__init__()
        if eps is not None:
            self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + getattr(self, "eps", 1e-5)).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class HalvedFrozenBatchNorm2d(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_a_class_of_unknown_ways_is_refused_by_its_name_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Scaled(3)))
    before = describe(model)
    message = r"""got Scaled at '1.0', which defines __init__, forward: unknown="skip" .* takes it for a BatchNorm2d"""
    with pytest.raises(bn.SurgeryError, match=message):
        bn.convert(model, "sync")
    assert describe(model) == before


def test_unknown_classes_are_skipped_on_request():
    model = nn.Sequential(nn.BatchNorm2d(3), Scaled(3), bn.nn.IterNorm(4, 2))
    bn.convert(model, "sync", unknown="skip")
    assert [type(layer) for layer in model] == [bn.nn.SyncBatchNorm, Scaled, bn.nn.IterNorm]
    assert len(bn.changes(model)) == 1


def test_unknown_classes_are_taken_for_their_base_on_request():
    model = nn.Sequential(Scaled(3, 5.0), Silent(3))
    bn.convert(model, "frozen", unknown="base")
    assert [change.lost for change in bn.changes(model)] == [
        "what Scaled defines: __init__, forward",
        "what Silent defines: train",
    ]
    assert model[0].scale == 5.0
    bn.revert(model)
    assert [type(layer) for layer in model] == [Scaled, Silent]
    assert model[0].scale == 5.0


def test_what_has_no_base_that_is_known():
    model = nn.Sequential(bn.nn.IterNorm(4, 2))
    for unknown in ("refuse", "base"):
        with pytest.raises(
            bn.SurgeryError, match="got IterNorm at '0', of which nothing is known: choose other layers"
        ):
            bn.convert(model, "frozen", unknown=unknown)


def test_a_subclass_that_computes_nothing_else_is_its_base():
    model = bn.convert(nn.Sequential(Described(3)), "ghost", virtual_batch_size=4)
    assert type(model[0]) is bn.nn.GhostBatchNorm2d
    assert type(bn.revert(model)[0]) is Described


def test_a_forward_that_was_replaced_on_the_layer():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].forward = model[0]._check_input_dim
    with pytest.raises(bn.SurgeryError, match="got BatchNorm2d at '0', which defines forward"):
        bn.convert(model, "sync")
    bn.convert(model, "sync", unknown="base")
    assert "forward" not in vars(model[0])
    bn.revert(model)
    assert model[0].forward.__self__ is model[0]


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm2d, bn.nn.LazyBatchNorm2d])
def test_lazy_layers(kind):
    model = nn.Sequential(nn.Sequential(kind()), nn.LazyConv2d(2, 1))
    with pytest.raises(
        bn.SurgeryError, match=r"got LazyBatchNorm2d at '0.0', which has not seen an input yet: run the"
    ):
        bn.convert(model, "sync")
    model(torch.randn(2, 3, 2, 2))
    bn.convert(model, "sync")
    assert type(bn.revert(model)[0][0]) is kind.cls_to_become


@pytest.mark.parametrize("eps", [1e-5, 1e-2, None])
def test_frozen_layers_of_others(eps):
    model = randomise(nn.Sequential(FrozenBatchNorm2d(3, eps), nn.BatchNorm2d(3))).eval()
    x = torch.randn(2, 3, 4, 4)
    expected, before = model(x), describe(model)
    bn.convert(model, "sync")
    assert type(model[0]) is FrozenBatchNorm2d  # as it was not chosen
    bn.convert(model, "ours")
    assert type(model[0]) is bn.nn.FrozenBatchNorm2d
    torch.testing.assert_close(model(x), expected)
    bn.revert(model)
    assert describe(model) == before
    bn.convert(model, "renorm", "0")
    torch.testing.assert_close(model(x), expected)
    assert model[0].weight.requires_grad
    bn.revert(model)
    assert describe(model) == before


def test_a_frozen_layer_that_computes_something_else():
    model = randomise(nn.Sequential(HalvedFrozenBatchNorm2d(3)))
    with pytest.raises(bn.SurgeryError, match="got HalvedFrozenBatchNorm2d at '0', of which nothing is known"):
        bn.convert(model, "ours")


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 3, 2, 2))], ids=["script", "trace"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_modules(make):
    inner = make(nn.Sequential(nn.BatchNorm2d(3)).eval())
    with pytest.raises(
        bn.SurgeryError, match="expected modules of Python, got the scripted Sequential at '0': script it"
    ):
        bn.convert(nn.Sequential(inner, nn.BatchNorm2d(3)), "sync")


class FullyShardedDataParallel(nn.Sequential):
    """By its name, which is what counts."""


class Replicated(nn.parallel.DistributedDataParallel):
    def __init__(self, module: nn.Module) -> None:  # without processes
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("wrap", [FullyShardedDataParallel, Replicated])
@pytest.mark.parametrize("operation", [lambda model: bn.convert(model, "sync"), bn.revert])
def test_wrapped_models(wrap, operation):
    with pytest.raises(
        bn.SurgeryError, match=r"got (Ful|Dis)\w+ at '1', which holds on to .*: convert the model, then wrap"
    ):
        operation(nn.Sequential(nn.ReLU(), wrap(nn.BatchNorm2d(3))))


@pytest.fixture(scope="module")
def timm():
    stand_in()
    return pytest.importorskip("timm.layers")


ACTS = {
    "relu": (nn.ReLU, "relu"),
    "silu": (nn.SiLU, "silu"),
    "gelu": (nn.GELU, "gelu"),
    "hardswish": (nn.Hardswish, "hardswish"),
    "none": (None, None),
    "tanh": (nn.Tanh, "unfused"),
    "mish": (nn.Mish, "unfused"),
    "slope": (lambda **_: nn.LeakyReLU(0.2), "unfused"),
}


@pytest.mark.parametrize("to", ["sync", "ghost", "renorm", "frozen", "ours", "torch"])
@pytest.mark.parametrize(("act", "fused"), ACTS.values(), ids=list(ACTS))
def test_timms_fused_activations(timm, to, act, fused):
    layer = timm.BatchNormAct2d(3, apply_act=act is not None, act_layer=act or nn.ReLU, inplace=False)
    model = randomise(nn.Sequential(layer)).eval()
    x = torch.randn(2, 3, 4, 4)
    expected, before = model(x), describe(model)
    bn.convert(model, to, **({"virtual_batch_size": 2} if to == "ghost" else {}))
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == before["keys"] or to == "frozen"
    if fused != "unfused" and to != "torch":
        assert model[0].activation == fused
        assert list(model[0].children()) == []
    elif fused is not None:
        assert type(model[0]).__name__.endswith("Act")
        assert model[0].act is layer.act
    assert bn.changes(model).lost == ()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    bn.revert(model)
    assert describe(model) == before


@pytest.mark.parametrize("to", ["group", "layer", "instance"])
def test_other_norms_keep_the_activation(timm, to):
    for layer in (timm.BatchNormAct2d(4), bn.nn.BatchNorm2d(4, activation="relu")):
        model = bn.convert(randomise(nn.Sequential(layer)), to)
        y = model(torch.randn(2, 4, 3, 3))
        assert (y == 0).any()
        assert (y >= 0).all()
        assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])


def test_ours_with_an_activation_becomes_torchs_with_one():
    model = randomise(nn.Sequential(bn.nn.BatchNorm2d(4, activation="hardswish"))).eval()
    x = torch.randn(2, 4, 3, 3)
    expected, keys = model(x), list(model.state_dict())
    bn.convert(model, "torch")
    assert isinstance(model[0], nn.BatchNorm2d)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_timms_drop_is_kept(timm):
    model = randomise(nn.Sequential(timm.BatchNormAct2d(3, drop_layer=lambda: nn.Dropout(0.5)))).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x.clone())
    bn.convert(model, "ours")
    torch.testing.assert_close(model(x.clone()), expected)
    model.train()
    assert model[0].drop.training
    assert (model(torch.rand(8, 3, 8, 8)) == 0).float().mean() > 0.5


def test_timms_own_frozen_and_synchronised_layers(timm):
    frozen, sync = timm.norm_act.FrozenBatchNormAct2d(3), timm.norm_act.SyncBatchNormAct(3)
    sync.act, sync.drop = nn.ReLU(), nn.Identity()
    model = randomise(nn.Sequential(frozen, sync)).eval()
    x = torch.randn(2, 3, 4, 4)
    expected, before = model(x.clone()), describe(model)
    bn.convert(model, "ours")
    assert [type(layer) for layer in model] == [bn.nn.FrozenBatchNorm2d, bn.nn.SyncBatchNorm]
    assert [layer.activation for layer in model] == ["relu", "relu"]
    torch.testing.assert_close(model(x.clone()), expected)
    bn.revert(model)
    assert describe(model) == before


def test_an_activation_with_hooks_stays_a_module(timm):
    model = nn.Sequential(timm.BatchNormAct2d(3))
    seen: list[str] = []
    model[0].act.register_forward_hook(lambda *_: seen.append("act"))
    bn.convert(model, "ours")
    model(torch.randn(2, 3, 4, 4))
    assert seen == ["act"]


def test_the_mode_reaches_a_fused_activation_on_the_way_back(timm):
    model = bn.convert(nn.Sequential(timm.BatchNormAct2d(3)), "ours").eval()
    bn.revert(model)
    assert [module.training for module in model.modules()] == [False] * 4


@pytest.mark.parametrize("part", ["affine", "update", "use"])
def test_what_freeze_holds_is_to_be_thawed_first(part):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    freezing = {name: name == part for name in ("affine", "update", "use")}
    bn.freeze(model, "1", **freezing)
    before = describe(model)
    with pytest.raises(bn.SurgeryError, match="not held by freeze, got BatchNorm2d at '1': unfreeze it first"):
        bn.convert(model, "sync")
    assert describe(model) == before
    bn.convert(model, "sync", "0")
    bn.freeze(model, "0", **freezing)
    with pytest.raises(bn.SurgeryError, match="got SyncBatchNorm at '0': unfreeze it first"):
        bn.revert(model)
    bn.revert(bn.unfreeze(model))
    assert type(model[0]) is nn.BatchNorm2d
