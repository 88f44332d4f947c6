"""What a conversion leaves as it was: tensors, hooks, places, attributes, and the whole model where it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery.conversion import origin, sources
from nn.random_state import randomise
from surgery.description import describe

KINDS_KNOWN = [*sources._RANKS]
SAME_TENSORS = {"sync": {}, "ghost": {"virtual_batch_size": 2}, "renorm": {}, "ours": {}}


@pytest.mark.parametrize("to", SAME_TENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_very_tensors(to, dtype):
    model = nn.Sequential(
        nn.BatchNorm2d(3, dtype=dtype), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, bias=False)
    )
    model[0].weight.requires_grad_(False)
    before = model.state_dict(keep_vars=True)
    bn.convert(model, to, **SAME_TENSORS[to])
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]


def test_models_on_no_device():
    model = nn.Sequential(nn.BatchNorm2d(3, device="meta"))
    for to in ("sync", "frozen", "group"):
        bn.convert(model, to)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    bn.convert(model, "frozen")
    model.to_empty(device="cpu")
    with torch.no_grad():
        model[0].weight.fill_(2)
    bn.revert(model)
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.tolist() == [2, 2, 2]


@pytest.mark.parametrize("to", ["sync", "frozen", "group"])
def test_hooks_are_called_in_their_order_and_their_handles_remove_them(to):
    calls: list[str] = []
    layer = nn.BatchNorm2d(3)

    def saying(word):
        return lambda *_, **__: calls.append(word)

    handles = [
        layer.register_forward_pre_hook(saying("pre")),
        layer.register_forward_pre_hook(saying("pre, prepended"), prepend=True),
        layer.register_forward_pre_hook(saying("pre, named"), with_kwargs=True),
        layer.register_forward_hook(saying("forward")),
        layer.register_forward_hook(saying("forward, named"), with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(saying("backward pre")),
        layer.register_full_backward_hook(saying("backward")),
        layer.register_state_dict_pre_hook(saying("saving")),
        layer.register_state_dict_post_hook(saying("saved")),
        layer.register_load_state_dict_pre_hook(lambda module, *_: calls.append(f"loading {type(module).__name__}")),
        layer.register_load_state_dict_post_hook(saying("loaded")),
    ]
    model = nn.Sequential(layer)

    def run() -> list[str]:
        calls.clear()
        model(torch.randn(4, 3, 2, 2, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(calls)

    expected = run()
    assert "loading BatchNorm2d" in expected
    bn.convert(model, to)
    del layer  # torch's own loading hooks hold on to their module only weakly
    name = type(model[0]).__name__
    assert run() == [word.replace("BatchNorm2d", name) if word.startswith("loading ") else word for word in expected]
    bn.revert(model)
    assert run() == expected
    bn.convert(model, to)
    for handle in handles:
        handle.remove()
    assert run() == []


class TwoParents(nn.Module):
    """One layer at many places, some of which torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), self.norm), self.norm])
        self.named = nn.ModuleDict({"norm": self.norm})
        self.listed = [self.norm, "other"]
        self.tabled = {"norm": self.norm}
        self.paired = (self.norm, 1)
        self.__dict__["plain"] = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.listed[0](self.blocks[0](x))


@pytest.mark.parametrize("to", ["sync", "frozen", "group", "torch"])
def test_a_shared_layer_stays_one_layer_at_all_its_places(to):
    model = TwoParents()
    if to == "torch":
        bn.convert(model, "ours")
        vars(model.norm).pop("_converted_from")
    bn.convert(model, to)
    places = [model.blocks[0][1], model.blocks[1], model.named["norm"], model.listed[0], model.tabled["norm"]]
    assert all(place is model.norm for place in (*places, model.paired[0], model.plain))
    (change,) = bn.changes(model)
    assert "(also at 'blocks.0.1', 'blocks.1', 'named.norm')" in change.what
    old = model.norm
    bn.revert(model)
    assert model.listed[0] is model.norm is model.paired[0] is model.blocks[1] is not old


def test_the_root_itself():
    layer = randomise(nn.BatchNorm2d(3)).eval()
    x = torch.randn(2, 3, 2, 2)
    expected = layer(x)
    root = bn.convert(layer, "sync")
    assert type(root) is bn.nn.SyncBatchNorm
    assert str(bn.changes(root)) == "the model: torch.nn.BatchNorm2d(3) became bn.nn.SyncBatchNorm(3)"
    torch.testing.assert_close(root(x), expected, rtol=1e-6, atol=1e-6)
    back = bn.revert(root)
    assert type(back) is nn.BatchNorm2d
    assert len(bn.changes(back, last=False)) == 2


def test_attributes_children_and_tensors_of_a_user():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].tag = {"a": 1}
    model[0].probe = model[0].act = nn.Linear(1, 1)  # "act" is timm's name for something else
    model[0].register_buffer("seen", torch.ones(1), persistent=False)
    model[0].extra = nn.Parameter(torch.ones(1))
    tag, probe, seen, extra = model[0].tag, model[0].probe, model[0].seen, model[0].extra
    for to in ("sync", "frozen", "group"):
        bn.convert(model, to)
        assert (model[0].tag, model[0].probe, model[0].seen, model[0].extra) == (tag, probe, seen, extra)
        assert model[0].act is probe
        assert "0.seen" not in model.state_dict()
    model[0].late = "set afterwards"
    model[0].register_buffer("later", torch.zeros(2))
    del model[0].tag
    bn.revert(model)
    assert model[0].late == "set afterwards"
    assert model[0].later.tolist() == [0, 0]
    assert model[0].extra is extra
    assert not hasattr(model[0], "tag")


def test_a_batch_norm_inside_another():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].aside = nn.BatchNorm1d(2)
    before = describe(model)
    bn.convert(model, "sync")
    assert [type(layer) for layer in (model[0], model[0].aside)] == [bn.nn.SyncBatchNorm] * 2
    assert [change.layer for change in bn.changes(model)] == ["0", "0.aside"]
    bn.revert(model, "0.aside")
    assert type(model[0].aside) is nn.BatchNorm1d
    bn.convert(model, "frozen", "0.aside")
    bn.revert(model)
    assert describe(model) == before


@pytest.mark.parametrize("kind", KINDS_KNOWN, ids=lambda kind: f"{kind.__module__.split('.')[0]}-{kind.__name__}")
def test_what_a_layer_has_by_its_class_is_known(kind):
    """What is not known to be the class's would be taken for a user's and go along."""
    layer = kind(2, **({"virtual_batch_size": 2} if "Ghost" in kind.__name__ else {}))
    assert set(vars(layer)) <= origin._MODULE | origin._SETTINGS


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("to", ["sync", "ghost", "renorm", "ours", "group"])
def test_parametrizations(to):
    model = randomise(nn.Sequential(nn.BatchNorm2d(3))).eval()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    original, keys = model[0].parametrizations.weight.original, list(model.state_dict())
    x = torch.randn(2, 3, 2, 2)
    expected = model(x)
    bn.convert(model, to, **SAME_TENSORS.get(to, {}))
    assert model[0].parametrizations.weight.original is original
    assert parametrize.is_parametrized(model[0], "weight")
    if to != "group":
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert type(copy.deepcopy(model)[0].weight) is Tensor
    model(x).sum().backward()
    assert original.grad is not None
    weight = model[0].weight.tolist()
    parametrize.remove_parametrizations(model[0], "weight")
    bn.revert(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert model[0].weight.tolist() == weight


def test_a_parametrization_that_came_afterwards():
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(3)), "sync")
    parametrize.register_parametrization(model[0], "weight", Doubled())
    bn.revert(model)
    assert parametrize.type_before_parametrizations(model[0]) is nn.BatchNorm2d
    assert model[0].weight.tolist() == [2, 2, 2]


def test_pruning():
    model = randomise(nn.Sequential(nn.BatchNorm2d(4))).eval()
    prune.l1_unstructured(model[0], "weight", 2)
    x = torch.randn(2, 4, 2, 2)
    expected = model(x)
    bn.convert(model, "sync")
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
    assert model(x).isfinite().all()
    bn.revert(model)
    prune.remove(model[0], "weight")
    assert (model[0].weight == 0).sum() == 2


@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_what_is_made_of_other_tensors_cannot_be_constant(how):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    if how == "pruned":
        prune.l1_unstructured(model[1][0], "weight", 2)
    else:
        parametrize.register_parametrization(model[1][0], "weight", Doubled())
    before = describe(model)
    with pytest.raises(bn.SurgeryError, match=r"got a weight at '1.0' that is made of other tensors: remove its"):
        bn.convert(model, "frozen")
    assert describe(model) == before


def test_nothing_changes_where_one_layer_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    model[0].register_load_state_dict_pre_hook(lambda *_: None)
    before = describe(model)
    with pytest.raises(bn.SurgeryError, match="expected running statistics to freeze, got none at '1'"):
        bn.convert(model, "frozen")
    assert describe(model) == before
    with pytest.raises(bn.SurgeryError, match="'1' cannot become a BatchRenorm2d: expected track_running_stats=True"):
        bn.convert(model, "renorm")
    assert describe(model) == before
    assert len(bn.changes(model, last=False)) == 0


def test_what_a_compiled_layer_loses():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].compile(backend="eager")
    bn.convert(model, "ours")
    assert model[0]._compiled_call_impl is None
    assert bn.changes(model)[0].lost == "what its compile() made"
    bn.revert(model)
    assert model[0]._compiled_call_impl is None


def test_inside_a_compiled_model():
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 4, 4)
    expected = compiled(x)
    assert bn.convert(compiled, "sync") is compiled
    assert type(model[1]) is bn.nn.SyncBatchNorm
    torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        model[1].bias.add_(1)  # it runs the new layer
    torch.testing.assert_close(compiled(x), expected + 1, rtol=1e-6, atol=1e-6)
    with pytest.raises(
        bn.SurgeryError, match=r"got the result of torch\.compile of a BatchNorm2d: compile it afterwards"
    ):
        bn.convert(torch.compile(nn.BatchNorm2d(3), backend="eager"), "sync")


def test_data_parallel():
    model = nn.DataParallel(nn.Sequential(nn.BatchNorm2d(3)))
    bn.convert(model, "ours", "0")
    assert type(model.module[0]) is bn.nn.BatchNorm2d
