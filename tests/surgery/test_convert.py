"""What layers become, what they compute then, and what is said about it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from nn.random_state import randomise

RANKS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CLASSES = {
    "sync": (bn.nn.SyncBatchNorm,) * 3,
    "ghost": (bn.nn.GhostBatchNorm1d, bn.nn.GhostBatchNorm2d, bn.nn.GhostBatchNorm3d),
    "renorm": (bn.nn.BatchRenorm1d, bn.nn.BatchRenorm2d, bn.nn.BatchRenorm3d),
    "frozen": (bn.nn.FrozenBatchNorm1d, bn.nn.FrozenBatchNorm2d, bn.nn.FrozenBatchNorm3d),
    "ours": (bn.nn.BatchNorm1d, bn.nn.BatchNorm2d, bn.nn.BatchNorm3d),
    "torch": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "group": (nn.GroupNorm,) * 3,
    "layer": (nn.GroupNorm,) * 3,
    "instance": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
}
SAME_IN_EVAL = ("sync", "ghost", "renorm", "frozen", "ours", "torch")
OPTIONS = {"ghost": {"virtual_batch_size": 8}, "renorm": {"r_max": 1.0, "d_max": 0.0}}


def batch(rank: int, n: int = 8, channels: int = 6) -> Tensor:
    return torch.randn(n, channels, *[4] * rank) * 2 + 1


def network(rank: int, ours: bool, **options: object) -> nn.Module:
    kind = CLASSES["ours"][rank - 1] if ours else RANKS[rank]
    return randomise(nn.Sequential(nn.Identity(), kind(6, **options)))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("to", CLASSES)
@pytest.mark.parametrize("ours", [False, True], ids=["torch's", "ours"])
def test_the_class_follows_the_rank_and_eval_is_the_same(to, rank, ours):
    model = network(rank, ours).eval()
    x = batch(rank)
    expected = model(x)
    converted = bn.convert(model, to, **OPTIONS.get(to, {}))
    assert converted is model
    assert type(model[1]) is CLASSES[to][rank - 1]
    assert not model[1].training
    if to in SAME_IN_EVAL:
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    if ours and to in ("sync", "ghost", "renorm", "ours", "frozen"):
        assert torch.equal(model(x), expected)  # the same operator


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("to", ["sync", "ghost", "renorm", "ours", "torch"])
@pytest.mark.parametrize("options", [{}, {"momentum": None, "eps": 1e-2}, {"affine": False}, {"bias": False}], ids=str)
def test_a_training_step_is_the_same(to, rank, options):
    # float64: what is left is another order of sums.
    model = network(rank, to == "torch", dtype=torch.float64, **options)
    converted = bn.convert(copy.deepcopy(model), to, **OPTIONS.get(to, {}))
    steps = []
    for net in (model, converted):
        x = batch(rank).double() if not steps else steps[0][0].detach().clone()
        x.requires_grad_()
        y = net(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        steps.append((x, y, x.grad, *(p.grad for p in net.parameters()), *net.buffers()))
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_a_frozen_layer_is_in_training_as_in_eval():
    model = network(2, False)
    x = batch(2)
    expected = copy.deepcopy(model).eval()(x)
    frozen = bn.convert(model, "frozen").train()
    torch.testing.assert_close(frozen(x), expected, rtol=1e-6, atol=1e-6)
    assert list(frozen.parameters()) == []


@pytest.mark.parametrize(("to", "groups"), [("group", 6), ("layer", 1), ("instance", 6)])
def test_gamma_and_beta_are_kept_where_statistics_are_not(to, groups):
    model = network(2, False)
    weight, bias = model[1].weight, model[1].bias
    x = batch(2)
    bn.convert(model, to)
    assert model[1].weight is weight
    assert model[1].bias is bias
    expected = nn.functional.group_norm(x, groups, weight, bias, model[1].eps)
    torch.testing.assert_close(model(x), expected)
    (change,) = bn.changes(model)
    assert "running statistics" in change.lost


@pytest.mark.parametrize(
    ("channels", "groups", "told"),
    [
        (64, 32, ""),
        (100, 25, ", in 25 groups of 4 channels"),
        (7, 7, ""),
        (31 * 2, 31, "in 31 groups of 2 channels"),
    ],
)
def test_the_default_number_of_groups(channels, groups, told):
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(channels)), "group")
    assert model[0].num_groups == groups
    assert told in bn.changes(model)[0].what
    assert f"torch.nn.GroupNorm({groups}, {channels})" in bn.changes(model)[0].what


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (256, 32), (6, 1), (7, 1), (100, 25)])
def test_behind_linear_layers_a_group_has_several_channels(channels, groups):
    # A group of one value is 0 whatever the input: the layer would let nothing through.
    model = bn.convert(nn.Sequential(nn.BatchNorm1d(channels)), "group")
    assert model[0].num_groups == groups
    x = torch.randn(8, channels)
    assert model(x).abs().mean() > 0.5


def test_options_reach_the_layer_and_come_before_what_was():
    model = nn.Sequential(nn.BatchNorm2d(8, momentum=0.3), nn.BatchNorm1d(8))
    bn.convert(model, "renorm", r_max=2.0, warmup_steps=5, momentum=0.01)
    assert (model[0].r_max, model[0].warmup_steps, model[0].momentum) == (2.0, 5, 0.01)
    bn.revert(model)
    assert model[0].momentum == 0.3
    assert bn.convert(model, "group", num_groups=4)[1].num_groups == 4
    bn.revert(model)
    assert bn.convert(model, "sync", process_group="a group")[0].process_group == "a group"


def test_only_what_was_chosen():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2)))
    bn.convert(model, "ours", "1")
    assert [type(found).__module__.split(".")[0] for found in (model[0], *model[1])] == [
        "torch",
        "batchnorm",
        "batchnorm",
    ]
    bn.convert(model, "frozen", nn.BatchNorm1d)
    assert type(model[1][1]) is bn.nn.FrozenBatchNorm1d
    bn.convert(model, "sync", lambda name, _: name == "0")
    assert type(model[0]) is bn.nn.SyncBatchNorm
    assert [change.layer for change in bn.changes(model)] == ["0"]


def test_what_already_is_that_is_left_alone():
    model = nn.Sequential(bn.nn.GhostBatchNorm2d(2, virtual_batch_size=4), bn.nn.IterNorm(4, 2), bn.nn.SyncBatchNorm(2))
    layers = list(model)
    bn.convert(model, "ours")
    assert list(model) == layers
    assert str(bn.changes(model)) == "nothing was changed"
    bn.convert(model, "ghost", ["0"], virtual_batch_size=4)
    assert list(model) == layers
    bn.convert(model, "ghost", ["0"], virtual_batch_size=2)
    assert model[0].virtual_batch_size == 2


def test_a_second_conversion_starts_from_what_the_layer_was():
    model = nn.Sequential(bn.nn.BatchNorm2d(2, activation="relu", ddof=0))
    bn.convert(bn.convert(model, "sync"), "ghost", virtual_batch_size=2)
    assert type(model[0]) is bn.nn.GhostBatchNorm2d  # of a rank that the synchronised layer had forgotten
    assert (model[0].activation, model[0].ddof) == ("relu", 0)
    assert "bn.nn.SyncBatchNorm(2) became bn.nn.GhostBatchNorm2d(2)" in str(bn.changes(model))
    bn.convert(model, "frozen")
    bn.revert(model)
    assert type(model[0]) is bn.nn.BatchNorm2d


def test_of_the_same_kind():
    model = nn.Sequential(nn.SyncBatchNorm(2, process_group="a group"), nn.BatchNorm1d(2))
    bn.convert(model, "ours")
    assert [type(layer) for layer in model] == [bn.nn.SyncBatchNorm, bn.nn.BatchNorm1d]
    assert model[0].process_group == "a group"
    model = nn.Sequential(bn.nn.SyncBatchNorm(2, process_group="a group"), bn.nn.BatchRenorm1d(2))
    bn.convert(model, "torch")
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, nn.BatchNorm1d]
    assert model[0].process_group == "a group"


def test_what_torch_has_not_is_told():
    layers = {
        "ddof": bn.nn.BatchNorm2d(2, ddof=0, on_single_value="skip", inference_weight=0.1),
        "ghost": bn.nn.GhostBatchNorm1d(2, virtual_batch_size=7),
        "renorm": bn.nn.BatchRenorm1d(2),
        "frozen": bn.nn.FrozenBatchNorm2d(2),
    }
    model = bn.convert(nn.ModuleDict(layers), "torch", list(layers))
    lost = {change.layer: change.lost for change in bn.changes(model).lost}
    call = "mask, lengths and residual of forward"
    assert lost == {
        "ddof": f"{call}, ddof=0, on_single_value='skip', inference_weight=0.1",
        "ghost": f"{call}, ghost batches of 7",
        "renorm": f"{call}, renormalization",
        "frozen": f"{call}, being constant",
    }


def test_frozen_layers_stay_so_unless_chosen():
    model = nn.Sequential(randomise(bn.nn.FrozenBatchNorm2d(3)), nn.BatchNorm2d(3)).eval()
    x = batch(2, channels=3)
    expected = model(x)
    bn.convert(model, "sync")
    assert type(model[0]) is bn.nn.FrozenBatchNorm2d
    bn.convert(model, "sync", "0")
    assert type(model[0]) is bn.nn.SyncBatchNorm
    assert [name for name, _ in model[0].named_parameters()] == ["weight", "bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    weight = model[0].weight
    with torch.no_grad():
        weight.mul_(2)
    bn.revert(model)
    assert type(model[0]) is bn.nn.FrozenBatchNorm2d
    assert torch.equal(model[0].weight, weight)
    assert [name for name, _ in model[0].named_parameters()] == []


def test_frozen_layers_are_not_chosen_by_the_name_of_what_holds_them():
    def network() -> nn.Module:
        return nn.Sequential(nn.ModuleDict({"a": bn.nn.FrozenBatchNorm2d(3), "b": nn.BatchNorm2d(3)}))

    for layers, kind in (("0", bn.nn.FrozenBatchNorm2d), (["0.a"], bn.nn.SyncBatchNorm), ("*.a", bn.nn.SyncBatchNorm)):
        assert type(bn.convert(network(), "sync", layers)[0]["a"]) is kind
    by_class = bn.convert(network(), "sync", (name for name in ("0.b", "0.a")))
    assert type(by_class[0]["a"]) is bn.nn.SyncBatchNorm


def test_what_frozen_layers_of_ours_do_not_take():
    model = bn.convert(nn.Sequential(bn.nn.BatchNorm2d(3)), "frozen")
    assert bn.changes(model)[0].lost == "weight and bias of forward"


class RootMeanSquare(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) / (x.square().mean(1, keepdim=True) + self.eps).sqrt()


def test_a_class_of_ones_own():
    model = network(2, False, dtype=torch.float64)
    weight, bias = model[1].weight, model[1].bias
    bn.convert(model, RootMeanSquare, eps=1e-3)
    assert model[1].weight is weight
    assert model[1].eps == 1e-3
    (change,) = bn.changes(model)
    assert change.what == "torch.nn.BatchNorm2d(6) became RootMeanSquare"
    bn.revert(model)
    assert model[1].bias is bias
    assert model[1].eps == 1e-5


def test_a_class_of_the_package_by_itself():
    model = nn.Sequential(nn.SyncBatchNorm(4))
    with pytest.raises(
        bn.SurgeryError, match=r"got SyncBatchNorm at '0': give the class as to=, one of GhostBatchNorm1d"
    ):
        bn.convert(model, "ghost", virtual_batch_size=2)
    bn.convert(model, bn.nn.GhostBatchNorm2d, virtual_batch_size=2)
    assert type(model[0]) is bn.nn.GhostBatchNorm2d
    assert type(bn.revert(model)[0]) is nn.SyncBatchNorm


def test_a_function_of_ones_own():
    def to(name: str, layer: nn.Module) -> nn.Module | None:
        return None if name == "0" else nn.GroupNorm(1, layer.num_features)

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(4).eval())
    untouched, weight = model[0], model[1].weight
    bn.convert(model, to)
    assert model[0] is untouched
    assert isinstance(model[1], nn.GroupNorm)
    assert not model[1].training
    assert model[1].weight is not weight  # the function's own
    assert bn.revert(model)[1].weight is weight
    with pytest.raises(
        bn.SurgeryError, match=r"expected a module that takes the place of '0', got torch\.nn\..*, which holds"
    ):
        bn.convert(model, lambda _, layer: nn.Sequential(layer, nn.ReLU()))
    with pytest.raises(bn.SurgeryError, match="expected a module that takes the place of '0', got str"):
        bn.convert(model, lambda *_: "a layer")


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("snyc", {}, "expected to to be one of 'ours', 'torch', 'sync', .* got 'snyc'"),
        (3, {}, "expected to= as a name, a class or a function of name and module, got 3"),
        (nn.ReLU(), {}, "expected to= as a name, a class or a function"),
        ("sync", {"virtual_batch_size": 2}, "expected an option of SyncBatchNorm to be one of .*, got 'virtual_batch"),
        ("sync", {"affine": False}, "expected an option of SyncBatchNorm to be one of .*, got 'affine'"),
        ("ghost", {}, "expected the options of GhostBatchNorm2d, got .*: .*virtual_batch_size"),
        ("ghost", {"virtual_batch_size": 0}, "'0' cannot become a GhostBatchNorm2d: expected virtual_batch_size of 1"),
        ("group", {"num_groups": 3}, "'0' cannot become a GroupNorm: num_channels"),
        ("sync", {"unknown": "perhaps"}, "expected unknown to be one of 'refuse', 'skip', 'base', got 'perhaps'"),
        ("sync", {"optimizer": 3}, "expected an optimizer with param_groups, or several, got int"),
        (
            "sync",
            {"layers": "nothing"},
            "expected the name or glob of a batch norm, got 'nothing', which none has: is it '0'",
        ),
    ],
)
def test_wrong_use(to, options, message):
    model = nn.Sequential(nn.BatchNorm2d(4))
    layer = model[0]
    with pytest.raises(bn.InputError, match=message):
        bn.convert(model, to, **options)
    assert model[0] is layer


def test_a_model_without_batch_norm():
    model = nn.Sequential(nn.Linear(2, 2))
    assert bn.convert(model, "sync") is model
    assert str(bn.changes(model)) == "nothing was changed"
