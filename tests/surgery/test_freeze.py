"""Freezing: what stops, what survives, and that everything comes back."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.nn.recognition import FROZEN, frozen_parts
from conformance.cases import CASES
from oracles.model_zoo import randomize_statistics, timm_model


def network(kind=nn.BatchNorm1d, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), kind(4, **options), nn.ReLU(), nn.Linear(4, 5), kind(5, **options))
    return randomize_statistics(model)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def everything(model):
    """All that freezing could alter, to be compared."""
    return [
        (
            name,
            type(module),
            module.training,
            {
                key: value
                for key, value in module.__dict__.items()
                if isinstance(value, bool | int | float | str | None)
            },
            set(module.__dict__),
            [(key, id(p), p.requires_grad) for key, p in module.named_parameters()],
            [(key, id(b)) for key, b in module.named_buffers()],
            len(module._forward_hooks),
        )
        for name, module in model.named_modules()
    ]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def step(model, optimizer=None, n=6):
    y = model(torch.randn(n, 3))
    y.square().sum().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return y


KINDS = [nn.BatchNorm1d, bn.nn.BatchNorm1d]
PARTS = [
    {"affine": a, "update": u, "use": s}
    for a in (False, True)
    for u in (False, True)
    for s in (False, True)
    if a or u or s
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_model_is_constant_in_training(kind):
    model = network(kind)
    x = torch.randn(6, 3)
    expected = model.eval()(x)
    before = state(model)
    assert bn.freeze(model.train()) is model
    model.train()
    assert torch.equal(model(x), expected)
    for layer in norms(model):
        assert not layer.training
        assert layer.eval() is layer
        assert layer.train() is layer
        assert isinstance(layer, kind)
        assert type(layer) is kind
    step(model)
    assert same(state(model), before)
    assert all(p.grad is None and not p.requires_grad for layer in norms(model) for p in layer.parameters())
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(key for key in parts if parts[key]))
@pytest.mark.parametrize("kind", KINDS)
def test_each_part_by_itself(kind, parts):
    model, plain = network(kind), network(kind)
    model.train()
    plain.train()
    bn.freeze(model, **parts)
    model.train()
    assert all(frozen_parts(layer) == {key for key in parts if parts[key]} for layer in norms(model))
    before = state(model)
    x = torch.randn(6, 3)
    y, y_plain = model(x), plain(x)
    y.square().sum().backward()
    moved = state(model)
    first, first_plain = model[1], plain[1]
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        if parts["update"]:
            assert torch.equal(moved[f"1.{key}"], before[f"1.{key}"])
        else:
            assert torch.equal(moved[f"1.{key}"], first_plain.state_dict()[key])
            assert not torch.equal(moved[f"1.{key}"], before[f"1.{key}"])
    assert (first.weight.grad is None) == parts["affine"]
    assert first.weight.requires_grad != parts["affine"]
    if not parts["use"]:
        assert torch.equal(y, y_plain)
    else:  # with what the statistics are now: moved where they move
        h = model[0](x).double()
        h = (h - first.running_mean) / (first.running_var.double() + first.eps).sqrt() * first.weight + first.bias
        h = model[3](h.relu().float()).double()
        last = model[4]
        h = (h - last.running_mean) / (last.running_var.double() + last.eps).sqrt() * last.weight + last.bias
        torch.testing.assert_close(y.double(), h, atol=1e-5, rtol=1e-5)
    bn.unfreeze(model)
    assert everything_but_ids(model) == everything_but_ids(plain)


def everything_but_ids(model):
    return [
        (name, kind, mode, plain, keys, [(key, learns) for key, _, learns in parameters], hooks)
        for name, kind, mode, plain, keys, parameters, _, hooks in everything(model)
    ]


# A layer that is constant by its class, and one that is no batch norm, have nothing to freeze.
FREEZABLE = [name for name in sorted(CASES) if not name.startswith(("Frozen", "WhitenedLinear"))]


@pytest.mark.parametrize("name", FREEZABLE)
def test_every_layer_freezes_and_thaws(name):
    case = CASES[name]
    layer = case.make()
    x = torch.randn(case.shape)
    layer(x)
    with torch.no_grad():
        expected = layer.eval()(x)
    layer.train()
    before, known = state(layer), everything(layer)
    bn.freeze(layer)
    layer.train()
    assert torch.equal(layer(x), expected)
    assert same(state(layer), before)
    bn.unfreeze(layer)
    assert everything(layer) == known
    if "Outside" in name:
        with pytest.raises(bn.SurgeryError, match="can leave its statistics alone in training, got NormOutsideGrad"):
            bn.freeze(layer, use=False)
        assert everything(layer) == known
        return
    twin = copy.deepcopy(layer)
    bn.freeze(layer, use=False)
    assert torch.equal(layer(x), twin(x))
    assert same(state(layer), before)
    assert not same(state(twin), before)


def test_unfreezing_gives_back_exactly_what_was():
    model = network(momentum=None)
    model[1].bias.requires_grad_(False)
    model[4].momentum = 0.37
    model[4].num_batches_tracked.fill_(12345)
    model[4].eval()  # in another mode than the model
    model.double()
    known, before = everything(model), state(model)
    bn.freeze(model)
    bn.freeze(model, affine=False)
    model.eval()
    model.train()
    bn.unfreeze(model)
    assert everything(model) == known
    assert same(state(model), before)
    assert FROZEN not in model[1].__dict__


def test_a_mode_that_was_asked_for_meanwhile_is_what_unfreezing_gives():
    model = bn.freeze(network().train())
    model.eval()
    bn.unfreeze(model)
    assert not any(module.training for module in model.modules())
    # As Lightning's validation loop does it: modes are noted, and put back by hand.
    bn.freeze(model.train())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module, mode in modes.items():
        module.training = mode
    bn.unfreeze(model)
    assert all(module.training for module in model.modules())


def test_partly_frozen_and_partly_thawed():
    model = network().train()
    known = everything(model)
    bn.freeze(model, "1")
    assert [change.layer for change in bn.changes(model)] == ["1"]
    assert frozen_parts(model[1]) == {"affine", "update", "use"}
    assert not frozen_parts(model[4])
    bn.freeze(model)
    assert [change.layer for change in bn.changes(model)] == ["4"]  # the other one was frozen
    bn.unfreeze(model, "4", affine=False, update=False)
    assert str(bn.changes(model)) == "4: normalizes with its batch in training again"
    assert model[4].training
    assert frozen_parts(model[4]) == {"affine", "update"}
    before = state(model)
    step(model.train())
    assert same(state(model), before)
    bn.unfreeze(model, update=False)
    assert frozen_parts(model[1]) == frozen_parts(model[4]) == {"update"}
    bn.unfreeze(model)
    assert everything(model) == known


def test_use_first_and_the_update_later_and_the_other_way_round():
    model = network().train()
    known = everything(model)
    bn.freeze(model, affine=False, update=False)
    assert all(layer.training for layer in norms(model))
    bn.freeze(model, affine=False, use=False)
    assert not any(layer.training for layer in norms(model.train()))
    bn.unfreeze(model, affine=False, use=False)
    assert all(layer.training for layer in norms(model))
    assert frozen_parts(model[1]) == {"use"}
    bn.unfreeze(model, use=True)
    assert everything(model) == known


def test_nothing_to_do_is_told_as_nothing():
    model = network()
    bn.unfreeze(model)
    assert str(bn.changes(model)) == "nothing was changed"
    bn.freeze(model)
    assert str(bn.changes(model)).splitlines() == [
        f"{name}: gamma and beta no longer learn; the running statistics no longer move; "
        "normalizes with its running statistics in training too"
        for name in ("1", "4")
    ]
    known = everything(model)
    bn.freeze(model)
    assert str(bn.changes(model)) == "nothing was changed"
    assert everything(model) == known
    plain = nn.Linear(2, 2)
    assert bn.freeze(plain) is plain
    assert not bn.changes(plain)


def test_what_was_thawed_by_hand_is_frozen_again():
    model = network()
    known = everything(model.train())
    bn.freeze(model)
    model.requires_grad_(True)
    model[1].training = True
    model[4].track_running_stats = True
    bn.freeze(model)
    assert [change.layer for change in bn.changes(model)] == ["1", "4"]
    assert not any(layer.training or layer.track_running_stats or layer.weight.requires_grad for layer in norms(model))
    bn.unfreeze(model)
    assert everything(model) == known


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_with_momentum_and_decay_moves_nothing_that_is_frozen(make, set_to_none):
    model = network().train()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    model(torch.randn(6, 3)).square().sum().backward()  # a gradient that waits, as while gradients are accumulated
    bn.freeze(model)
    lost = bn.changes(model).lost
    assert [change.lost for change in lost] == ["the gradient of weight and bias"] * 2
    before = {key: value for key, value in state(model).items() if key[0] in "14"}
    linear = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        step(model)
    assert same({key: value for key, value in state(model).items() if key[0] in "14"}, before)
    assert not torch.equal(model[0].weight, linear)
    bn.unfreeze(model)
    step(model, optimizer)
    assert not torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize("parts", [{}, {"update": False}, {"use": False}], ids=["all", "use", "update"])
def test_copies_and_pickles_are_frozen_and_apart(parts):
    model = network().train()
    keys = list(model.state_dict())
    bn.freeze(model, **parts)
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(6, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        twin.train()
        assert [frozen_parts(layer) for layer in norms(twin)] == [frozen_parts(layer) for layer in norms(model)]
        assert torch.equal(twin(x), copy.deepcopy(model)(x))
        bn.unfreeze(twin)
        assert not any(frozen_parts(layer) for layer in norms(twin))
        assert all(layer.training and layer.track_running_stats for layer in norms(twin))
        assert all(norms(model)[0] is not layer.train() for layer in norms(twin))
        assert all(layer.train() is layer for layer in norms(twin))
        assert frozen_parts(model[1])
    fresh = network(seed=1)
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(fresh.state_dict(), strict=True)
    assert frozen_parts(model[1])


def test_a_shared_layer_and_a_shared_parameter():
    model = network().train()
    model.append(model[4])
    model[1], model[4].weight = nn.BatchNorm1d(4), model[4].weight
    tied = nn.BatchNorm1d(5)
    tied.weight = model[4].weight
    model.append(tied)
    bn.freeze(model, ["4", "6"])
    assert [change.layer for change in bn.changes(model)] == ["4", "6"]
    assert not tied.weight.requires_grad
    bn.unfreeze(model, "5")  # 4 by another name
    assert not tied.weight.requires_grad  # still 6's
    assert model[4].bias.requires_grad
    bn.unfreeze(model)
    assert tied.weight.requires_grad


@pytest.mark.parametrize(
    "parts",
    [{}, {"update": False}, {"use": False}, {"affine": False, "update": False}],
    ids=["all", "use and affine", "update", "use"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_before_or_after(kind, parts):
    torch._dynamo.reset()
    model, plain = network(kind).train(), network(kind).train()
    x = torch.randn(6, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    plain(x)
    bn.freeze(compiled, **parts)  # what was compiled notices
    bn.freeze(plain, **parts)
    for training in (True, False, True):
        compiled.train(training)
        plain.train(training)
        x = torch.randn(6, 3)
        torch.testing.assert_close(compiled(x), plain(x))
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value)
    bn.unfreeze(compiled)
    bn.unfreeze(plain)
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [False, True])
def test_exported(kind, strict):
    model = bn.freeze(network(kind)).train()
    x = torch.randn(6, 3)
    exported = torch.export.export(model, (x,), strict=strict).module()
    other = torch.randn(6, 3)
    torch.testing.assert_close(exported(other), model(other))
    assert torch.equal(exported.state_dict()["1.running_mean"], model[1].running_mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(kind, reentrant):
    model = bn.freeze(network(kind).train())
    x = torch.randn(6, 3, requires_grad=True)
    before = state(model)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert same(state(model), before)
    assert not any(layer.training for layer in norms(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_use_alone_leaves_the_mode_alone_when_a_recomputation_stops_early(reentrant):
    model = bn.freeze(network(bn.nn.BatchNorm1d).train(), update=False)
    twin = copy.deepcopy(model)
    x = torch.randn(6, 3, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(layer.training for layer in norms(model))
    twin(x.detach())
    for key, value in twin.state_dict().items():  # the averages moved once
        torch.testing.assert_close(model.state_dict()[key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_use_alone_with_two_forwards_before_one_backward(kind):
    layer = bn.freeze(randomize_statistics(kind(4)).train(), update=False)
    x = torch.randn(5, 4, requires_grad=True)
    y = layer(x)
    slope = (layer.weight / (layer.running_var + layer.eps).sqrt()).detach().expand(5, 4).clone()
    held = layer.running_var
    layer(10 * torch.randn(5, 4))
    assert layer.running_var is held
    y.sum().backward()
    torch.testing.assert_close(x.grad, slope)


def test_the_layers_of_timm_keep_their_activation_and_dropout():
    model = randomize_statistics(timm_model("efficientnet_b0", drop_rate=0.0)).train()
    layer = next(layer for layer in norms(model) if type(layer).__name__ == "BatchNormAct2d")
    layer.drop = nn.Dropout(0.5)
    known, before = everything(model), state(model)
    bn.freeze(model)
    model.eval()
    model.train()
    assert layer.drop.training  # frozen is the normalization alone
    assert layer.act.training
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    assert same(state(model), before)
    bn.unfreeze(model)
    assert everything(model) == known


def test_timm_puts_other_layers_there_and_loses_what_they_were():
    timm_model("resnet18")
    from timm.layers import BatchNormAct2d
    from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    ours = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, momentum=0.37), nn.BatchNorm1d(4))
    theirs = copy.deepcopy(randomize_statistics(ours).train())
    x = torch.randn(5, 3, 6, 6)
    parameter = theirs[1].weight
    theirs = freeze_batch_norm_2d(theirs)
    bn.freeze(ours)
    theirs.train()
    ours.train()
    torch.testing.assert_close(theirs[:2](x), ours[:2](x))
    assert not isinstance(theirs[1], nn.BatchNorm2d)  # another class, another Parameter, no 1d
    assert theirs[1].weight is not parameter
    assert theirs[2].training
    assert "1.num_batches_tracked" not in theirs.state_dict()
    theirs = unfreeze_batch_norm_2d(theirs)
    bn.unfreeze(ours)
    assert theirs[1].momentum == 0.1  # the momentum and the counter are lost
    assert theirs[1].num_batches_tracked == 0
    assert ours[1].momentum == 0.37
    assert ours[1].num_batches_tracked == 100


@pytest.mark.filterwarnings("ignore")  # of lightning's own imports
def test_lightning_freezes_the_update_and_not_the_use():
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BaseFinetuning

    theirs, ours = network().train(), network().train()
    BaseFinetuning.freeze(theirs, train_bn=False)
    bn.freeze(ours, use=False)
    theirs.train()
    ours.train()
    x = torch.randn(6, 3)
    assert torch.equal(theirs(x), ours(x))  # both normalize with the batch: a frozen model that depends on it
    assert same(state(theirs), state(ours))
    BaseFinetuning.make_trainable(theirs)
    assert theirs[1].track_running_stats


def test_inside_distributed_data_parallel():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = bn.freeze(network().train(), "1")
        before = state(model)
        wrapped = nn.parallel.DistributedDataParallel(model).train()
        for _ in range(2):
            step(wrapped)
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
        assert not torch.equal(model[4].running_mean, before["4.running_mean"])
        known = everything(wrapped)
        with pytest.raises(bn.SurgeryError, match=r"outside of DistributedDataParallel, .* freeze before you wrap it"):
            bn.freeze(wrapped)
        with pytest.raises(bn.SurgeryError, match=r"outside of DistributedDataParallel, .* unfreeze before you"):
            bn.unfreeze(nn.Sequential(wrapped))
        assert everything(wrapped) == known
        bn.freeze(wrapped, affine=False)
        before = state(model)
        step(wrapped.train())
        assert same(state(model), before)
        assert [change.layer for change in bn.changes(wrapped)] == ["module.4"]
    finally:
        torch.distributed.destroy_process_group()


def test_update_bn_leaves_frozen_statistics_alone():
    model = bn.freeze(network().train(), "1")
    before = model[1].running_mean.clone()
    other = model[4].running_mean.clone()
    torch.optim.swa_utils.update_bn([torch.randn(6, 3)], model)
    assert torch.equal(model[1].running_mean, before)
    assert not torch.equal(model[4].running_mean, other)


def test_parametrized():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = network().train()
    nn.utils.parametrize.register_parametrization(model[1], "weight", Doubled())
    known = everything(model)
    bn.freeze(model)
    assert not model[1].parametrizations.weight.original.requires_grad
    bn.unfreeze(model)
    assert everything(model) == known


def test_refusals_leave_the_model_as_it_was():
    model = network().train()
    model.append(nn.BatchNorm1d(5, track_running_stats=False))
    known = everything(model)
    with pytest.raises(
        bn.SurgeryError, match="5: expected running statistics to use, got a layer without: freeze it w"
    ):
        bn.freeze(model)
    assert everything(model) == known
    bn.freeze(model, use=False)
    bn.unfreeze(model)
    assert everything(model) == known
    with pytest.raises(
        bn.SurgeryError, match="0: expected a layer that knows its channels, got a lazy one: run a batch"
    ):
        bn.freeze(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.raises(bn.InputError, match="expected at least one of affine, update and use to be True, got none"):
        bn.freeze(model, affine=False, update=False, use=False)
    with pytest.raises(bn.InputError, match="expected update to be True or False, got 'no'"):
        bn.unfreeze(model, update="no")
    with pytest.raises(bn.InputError, match="which none has"):
        bn.freeze(model, "nowhere")
    assert everything(model) == known


def test_a_failure_halfway_leaves_the_model_as_it_was(monkeypatch):
    module = importlib.import_module("batchnorm.surgery.freeze")

    model = network().train()
    known, settle, calls = everything(model), module._settle, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return settle(*arguments)

    monkeypatch.setattr(module, "_settle", failing)
    model[1].weight.grad = torch.ones(4)
    with pytest.raises(KeyboardInterrupt):
        bn.freeze(model)
    assert everything(model) == known
    assert model[1].weight.grad is not None
    monkeypatch.undo()
    bn.freeze(model, affine=False)
    assert model[1].weight.grad is not None
    bn.unfreeze(model)
    bn.freeze(model)
    frozen = everything(model)
    calls.clear()
    monkeypatch.setattr(module, "_settle", failing)
    with pytest.raises(KeyboardInterrupt):
        bn.unfreeze(model)
    assert everything(model) == frozen
