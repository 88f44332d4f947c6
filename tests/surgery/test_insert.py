"""Inserting batch norm: where it goes, what stays, and that it does what it is for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import batchnorm as bn
from batchnorm.study import data, training
from batchnorm.study.models import mlp
from oracles.absent_torchvision import stand_in
from oracles.model_zoo import timm_model


class Net(nn.Module):
    """Non-linearities as a module, a function and a method; a forward that torch.fx cannot read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False)
        self.act = nn.SiLU()
        self.sequence = nn.Conv1d(6, 5, 3)
        self.fc = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        y = functional.relu(self.conv(x), inplace=True)
        if y.sum() > 0:  # control flow on data
            y = self.act(self.up(y))
        y = self.sequence(y.flatten(2)).tanh().mean(2)
        y = torch.sigmoid(self.fc(y))
        return self.head(y) * self.fc.out_features / self.fc.weight.size(0)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


IMAGES = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
PLACES = ["conv", "up", "sequence", "fc"]


def facts(model):
    return [
        (name, id(module), type(module), module.training, sorted(module.__dict__), [id(p) for p in module.parameters()])
        for name, module in model.named_modules()
    ]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_places_are_those_of_the_paper(kind):
    model = net()
    parts = {name: model.get_submodule(name) for name in PLACES}
    weights = {name: part.weight for name, part in parts.items()}
    assert bn.insert(model, IMAGES, kind=kind) is model
    room = bn.nn if kind == "ours" else nn
    for name, rank in zip(PLACES, (2, 2, 1, 1), strict=True):
        pair = model.get_submodule(name)
        assert pair.layer is parts[name]
        assert pair.layer.weight is weights[name]
        assert pair.layer.bias is None
        assert type(pair.norm) is getattr(room, f"BatchNorm{rank}d")
    assert (model.conv.out_channels, model.fc.in_features) == (4, 5)
    assert model.fc.weight is weights["fc"]
    assert model.head.bias is not None
    keys = {f"{name}.layer.weight" for name in PLACES} | {"head.weight", "head.bias"}
    for name in PLACES:
        buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        keys |= {f"{name}.norm.{key}" for key in buffers}
    assert set(model.state_dict()) == keys
    assert [str(change) for change in bn.changes(model)] == [
        "conv: BatchNorm2d(4) between it and relu (lost: its bias)",
        "up: BatchNorm2d(6) between it and act",
        "sequence: BatchNorm1d(5) between it and tanh (lost: its bias)",
        "fc: BatchNorm1d(7) between it and sigmoid (lost: its bias)",
        "head: left as it is: followed by mul, which is no non-linearity",
    ]
    model.train()(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_computed_is_norm_of_linear():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    twin = copy.deepcopy(model).double()
    x = torch.randn(9, 3)
    bn.insert(model.train(), x)
    u = x.double() @ twin[0].weight.t()
    z = torch.sigmoid((u - u.mean(0)) / (u.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(model(x).double(), twin[2](z), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [True, False])
def test_preserve_leaves_outputs_as_they_were(kind, dtype, mode):
    model = net().to(dtype).train(mode)
    x = IMAGES.to(dtype) * 5 + 3
    other = torch.randn(1, 2, 6, 6, dtype=dtype)
    before, before_other = model(x).detach(), model.eval()(other).detach()
    model.train(mode)
    bn.insert(model, x, preserve=True, kind=kind)
    assert all(module.training == mode for module in model.modules())
    close = {torch.float32: {"atol": 2e-6, "rtol": 1e-5}, torch.float64: {"atol": 1e-13, "rtol": 1e-12}}[dtype]
    torch.testing.assert_close(model(x), before, **close)  # with its batch's statistics, or the running ones
    # On anything in eval: a training forward has moved the running variance by Bessel's correction.
    model = bn.insert(net().to(dtype), x, preserve=True, kind=kind).eval()
    torch.testing.assert_close(model(other), before_other, **close)
    assert not bn.changes(model).lost
    for name in PLACES:
        assert model.get_submodule(name).norm.num_batches_tracked == 1


def test_preserve_of_a_dead_and_of_a_far_channel():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[:] = torch.tensor([0.1, 2.0, 1e4, -0.3])
    x = torch.randn(50, 3)
    before = model(x)
    bn.insert(model.train(), x, preserve=True)
    torch.testing.assert_close(model(x), before, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(model.eval()(x), before, atol=1e-2, rtol=1e-5)
    assert model[0].norm.weight[1].item() == pytest.approx(1e-5**0.5)


def test_where_nothing_belongs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never, self.normed, self.norm = (nn.Linear(4, 4) for _ in range(4))
            self.norm = nn.BatchNorm1d(4)
            self.grouped, self.group = nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4)
            self.added, self.shared, self.tokens, self.last = (nn.Linear(4, 4) for _ in range(4))
            self.fine, self.dropped, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            x = self.twice(torch.relu(self.twice(x))).relu()
            x = self.norm(self.normed(x)).relu()
            x = self.group(self.grouped(x.unsqueeze(-1))).relu().squeeze(-1)
            x = (self.added(x) + x).relu()
            y = self.shared(x)
            x = torch.relu(y) * y.mean()
            x = torch.relu(self.tokens(x.reshape(-1, 2, 4))).reshape(-1, 4)
            x = torch.relu(self.fine(x))
            x = torch.tanh(self.drop(nn.Identity()(self.dropped(x))))
            return torch.sigmoid(self.last(x)).squeeze(1)

    model = bn.insert(Odd(), torch.randn(6, 4))
    assert {change.layer: change.what for change in bn.changes(model)} == {
        "twice": "left as it is: called 2 times on the example",
        "never": "left as it is: not called by itself on the example",
        "normed": "left as it is: normalized by norm already",
        "grouped": "left as it is: normalized by group already",
        "added": "left as it is: followed by add, which is no non-linearity",
        "shared": "left as it is: its output goes to relu and mean",
        "tokens": "left as it is: its channels are last in an output of shape [3, 2, 4]",
        "last": "left as it is: the result of the model is sigmoid of it",
        "fine": "BatchNorm1d(4) between it and relu",
        "dropped": "BatchNorm1d(4) between it and tanh",
    }
    assert model(torch.randn(6, 4)).shape == (6, 4)


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class LearnedSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * (self.beta * x).sigmoid()


class Gate(nn.Module):
    def forward(self, x):
        return x * x.mean(0, keepdim=True).sigmoid()


class Scale(nn.Module):
    def forward(self, x):
        return 2 * x + 1


class Noise(nn.Module):
    def forward(self, x):
        return x.relu() + torch.randn_like(x)


@pytest.mark.parametrize("act", [Swish, LearnedSwish, "GELUTanh", "HardMish"])
def test_an_activation_of_somebodys_own_is_a_non_linearity(act):
    if isinstance(act, str):
        stand_in()
        act = getattr(pytest.importorskip("timm.layers"), act)
    model = nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 2))
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(None))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    bn.insert(model, torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    assert bn.changes(model)[0].what == "BatchNorm1d(4) between it and 1"
    assert torch.equal(torch.rand(2), expected)
    assert len(calls) == 2  # traced, and run with the batch norm: what tries the activation calls no hooks


@pytest.mark.parametrize("other", [Gate, Scale, Noise, lambda: nn.Softmax(1), lambda: nn.Linear(4, 4), nn.GLU])
def test_what_mixes_elements_or_is_affine_or_random_is_none(other):
    with pytest.raises(bn.SurgeryError, match="'0': followed by 1, which is no non-linearity"):
        bn.insert(nn.Sequential(nn.Linear(3, 4), other()), torch.randn(6, 3), layers="0")


def test_only_the_layers_that_were_chosen_and_batches_of_other_kinds():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, a, b):
            return self.c(torch.relu(self.a(a)) + torch.relu(self.b(b)))

    example = {"a": torch.randn(5, 3), "b": torch.randn(5, 3)}
    model = bn.insert(Two(), example, layers=["a", "c"])
    assert [change.layer for change in bn.changes(model)] == ["a", "c"]
    assert isinstance(model.b, nn.Linear)
    model = bn.insert(Two(), (example, torch.zeros(5)), layers=lambda name, _: name == "b", preserve=True)
    assert isinstance(model.b, bn.surgery.Normalized)
    model = bn.insert(Two(), example, forward_fn=lambda model, batch: model(batch["a"], batch["b"]))
    assert isinstance(model.a, bn.surgery.Normalized)


def test_a_layer_under_two_names_and_one_used_by_two_models():
    model = net()
    model.alias = model.fc
    bn.insert(model, IMAGES)
    assert model.alias is model.fc
    assert isinstance(model.alias, bn.surgery.Normalized)


def test_copies_pickles_and_a_second_time():
    model = bn.insert(net(), IMAGES, preserve=True).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), model(IMAGES))
        assert twin.fc.out_features == 7
        assert twin.fc.weight is not model.fc.weight
    fresh = bn.insert(net(), IMAGES)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(IMAGES), model(IMAGES))
    with pytest.raises(bn.SurgeryError, match=r"'conv\.layer': normalized by conv\.norm already; 'up\.layer': normal"):
        bn.insert(model, IMAGES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.fc.nothing


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_compiled_and_exported(kind):
    torch._dynamo.reset()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(x)).mean((2, 3))) * self.conv.out_channels

    model = Plain()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(IMAGES)
    bn.insert(compiled, IMAGES, preserve=True, kind=kind)  # what was compiled notices
    assert isinstance(model.conv, bn.surgery.Normalized)
    torch.testing.assert_close(compiled(IMAGES), before)
    model.conv.norm.bias.data += 1
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    model.eval()
    exported = torch.export.export(model, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), model(IMAGES))


def test_the_optimizer_is_told():
    model = net()
    slow = [model.fc.weight, model.fc.bias]
    rest = [p for p in model.parameters() if all(p is not q for q in slow)]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": slow, "lr": 0.01}], lr=0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    bias = model.fc.bias
    bn.insert(model, IMAGES, optimizer=optimizer)
    known = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert known.keys() == {id(p) for p in model.parameters()}
    assert known[id(model.fc.norm.weight)] == 0.01
    assert known[id(model.conv.norm.bias)] == 0.1
    assert bias not in optimizer.state
    model.train()(IMAGES).sum().backward()
    before = model.fc.norm.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model.fc.norm.bias, before)
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_deep_sigmoid_network_learns_with_it_and_not_without():
    split = data.digits(0)
    train, test = ((torch.tensor(x, dtype=torch.float32), torch.tensor(y)) for x, y in (split.train, split.test))
    reached = {}
    for norm in ("none", "inserted"):
        model = mlp(64, 10, seed=0, layers=6)
        if norm == "inserted":
            bn.insert(model, train[0][:60])
            assert sum(isinstance(module, bn.nn.BatchNorm1d) for module in model.modules()) == 6
        training.train(model, train, lr=1.0, steps=150, batch=60, seed=0, at=frozenset(), watch=lambda *_: False)
        reached[norm] = training.accuracy(model, test)
    assert reached["none"] < 0.2
    assert reached["inserted"] > 0.85


def test_a_known_architecture_keeps_its_function():
    model = timm_model("visformer_tiny").eval()  # its MLPs are convolutions
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        bn.insert(model, x, preserve=True)
        off = (model(x) - before).abs().max() / before.abs().max()
    assert off < 1e-4
    inserted = [change for change in bn.changes(model) if not change.what.startswith("left")]
    assert len(inserted) == 22


def test_a_transformer_is_left_alone():
    with pytest.raises(bn.SurgeryError, match="its channels are last in an output of shape"):
        bn.insert(timm_model("vit_tiny_patch16_224"), torch.randn(1, 3, 224, 224), layers="blocks.0.mlp")


def test_refusals_leave_the_model_as_it_was():
    model = net()
    before, known = state(model), facts(model)
    for options, message in (
        ({"kind": "group"}, "expected kind"),
        ({"eps": 0}, "expected eps above 0, got 0"),
        ({"layers": "nowhere"}, "which none has"),
    ):
        with pytest.raises(bn.InputError, match=message):
            bn.insert(model, IMAGES, **options)
    with pytest.raises(bn.SurgeryError, match=r"before a non-linearity, got none \('head': followed by mul, "):
        bn.insert(model, IMAGES, layers="head")
    with pytest.raises(bn.SurgeryError, match=r"got none \(no such layer\)"):
        bn.insert(nn.ReLU(), IMAGES)
    with pytest.raises(bn.SurgeryError, match="fc: expected more than 1 value per channel in the example, got 1"):
        bn.insert(model, IMAGES[:1], preserve=True)
    with pytest.raises(bn.SurgeryError, match="0: expected a finite output on the example, got inf or NaN"):
        bn.insert(
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.full((3, 2), torch.inf), preserve=True
        )
    with pytest.raises(RuntimeError):
        bn.insert(model, torch.randn(3, 5))
    assert facts(model) == known
    assert same(state(model), before)
    with pytest.raises(bn.SurgeryError, match="0: expected layers that know their width, got a lazy one"):
        bn.insert(nn.Sequential(nn.LazyLinear(3), nn.ReLU()), torch.randn(3, 2))


def test_a_layer_that_needs_its_bias_is_refused():
    class Needing(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t() + self.bias

    model = nn.Sequential(Needing(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before, known = state(model), facts(model)
    with pytest.raises(bn.SurgeryError, match="expected a model that runs without its biases, got TypeError"):
        bn.insert(model, torch.randn(6, 3))
    assert facts(model) == known
    assert same(state(model), before)


def test_a_residual_network_without_its_norms_gets_those_before_non_linearities():
    model = timm_model("resnet18", norm_layer=nn.Identity).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        bn.insert(model, x, preserve=True)
        assert (model(x) - before).abs().max() < 1e-4 * before.abs().max()
    inserted = [change.layer for change in bn.changes(model) if not change.what.startswith("left")]
    assert inserted == ["conv1", *(f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1))]


def test_inside_distributed_data_parallel_it_is_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        known = facts(wrapped)
        with pytest.raises(
            bn.SurgeryError, match="the model: expected a model outside of DistributedDataParallel, whi"
        ):
            bn.insert(wrapped, IMAGES)
        assert facts(wrapped) == known
        nn.parallel.DistributedDataParallel(bn.insert(model, IMAGES))(IMAGES).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_forward_that_reads_its_layers_is_refused():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            y = torch.relu(self.fc(x)).sum(1)
            return y if self.fc.bias is None else y + self.fc.bias.sum()

    model = Reading()
    before, known = state(model), facts(model)
    with pytest.raises(bn.SurgeryError, match="expected the same outputs on the example, got a difference of"):
        bn.insert(model, torch.randn(6, 3), preserve=True)
    assert facts(model) == known
    assert same(state(model), before)
    assert isinstance(model.fc, nn.Linear)
