"""Which layers are watched, and those that cannot be seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from probes.watched import convnet, mlp


class Block(nn.Module):
    """Layers with names, one of them shared, one never called."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.shared = self.bn1
        self.frozen = bn.nn.FrozenBatchNorm2d(4)
        self.spare = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.frozen(self.bn1(self.conv1(x))).mean((2, 3)))


def layers_of(model, layers=None):
    with bn.watch(model, layers=layers) as watch:
        return watch.layers


def test_all_batch_norms_by_default():
    assert layers_of(Block()) == ("bn1", "frozen", "spare")
    assert layers_of(convnet()) == ("1", "5")
    assert layers_of(nn.BatchNorm1d(3)) == ("",)


def test_selections():
    model = Block()
    for selection, expected in [
        ("fc", ("fc",)),
        ("shared", ("bn1",)),
        ("*n*", ("conv1", "bn1", "frozen")),
        (nn.Linear, ("fc",)),
        (model.conv1, ("conv1",)),
        (lambda name, module: name.startswith("s") and hasattr(module, "eps"), ("bn1", "spare")),
        (["fc", nn.Conv2d, "bn?"], ("conv1", "bn1", "fc")),
    ]:
        assert layers_of(model, selection) == expected


def test_selections_that_fit_nothing():
    for selection, message in [
        ("bn2", "got the name 'bn2', which fits none: did you mean 'bn1'"),
        ("layer*", r"got the name 'layer\*', which fits none: see dict"),
        (nn.Dropout, "got the type Dropout, which fits none"),
        (nn.Linear(1, 1), "got the Linear given as a module, which fits none"),
        (lambda name, _: name == "x", "got the predicate '<lambda>', which fits none"),
        ([], "got an empty list"),
        ([3], "expected names, types, modules or predicates as layers, got 3"),
    ]:
        with pytest.raises(bn.InputError, match=message):
            bn.watch(Block(), layers=selection)
    with pytest.raises(bn.InputError, match="expected a model with batch norm, got Linear without: name the layers"):
        bn.watch(nn.Linear(2, 2))


def test_arguments():
    for options, message in [
        ({"every": 0}, "expected every to be 1 or more, or a function of the step, got 0"),
        ({"every": True}, "got True"),
        ({"units": 0}, "expected units of 1 or more, or None for all, got 0"),
        ({"max_records": 1}, "expected max_records of 2 or more, got 1"),
        ({"modes": "train"}, "expected modes as a tuple of 'train' and 'eval', got 'train'"),
        ({"modes": ("test",)}, "expected modes to be one of 'train', 'eval', got 'test'"),
    ]:
        model = mlp()
        with pytest.raises(bn.InputError, match=message):
            bn.watch(model, **options)
        assert not model._forward_pre_hooks


def test_a_layer_that_is_never_called_has_no_record():
    model = Block()
    with bn.watch(model, every=1) as watch:
        model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert [record["layer"] for record in watch.records] == ["bn1", "frozen"]
    with pytest.raises(bn.InputError, match="expected a look at 'spare', got none yet: it was not called"):
        watch.latest("spare")


def test_inputs_without_values_are_named():
    class Odd(nn.Module):
        def forward(self, thing):
            return thing

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.pair, self.imaginary, self.norm = Odd(), Odd(), Odd(), nn.BatchNorm1d(2)

        def forward(self, x):
            self.words("text")
            self.imaginary(x * 1j)
            return self.norm(self.pair({"x": [x, 3]})["x"][0])

    with bn.watch(Model(), every=1, layers=[Odd, nn.BatchNorm1d]) as watch:
        watch.model(torch.randn(4, 2))
    assert [record["layer"] for record in watch.records] == ["pair", "norm"]
    assert watch.unseen["words"] == "its input holds no tensor"
    assert "complex64" in watch.unseen["imaginary"]
    with pytest.raises(bn.InputError, match="got none yet: its input holds no tensor"):
        watch.latest("words")


def test_half_precision_integers_and_single_rows():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with bn.watch(model := nn.Sequential(nn.ReLU()), every=1, layers="0") as watch:
            model(torch.tensor([[1.0, -2.0], [3.0, -4.0]], dtype=dtype))
        assert watch.latest("0")["mean"] == [2.0, -3.0]
        assert watch.latest("0")["dead"] == 0.5
    with bn.watch(model := nn.Sequential(nn.Embedding(5, 3)), every=1, layers="0") as watch:
        model(torch.tensor([[1, 2], [2, 2]])).sum().backward()
    assert watch.latest("0")["mean"] == [1.5, 2.0]
    assert len(watch.latest("0")["grad_mean"]) == 3
    with bn.watch(model := nn.Sequential(nn.Linear(2, 2)), every=1, layers="0") as watch:
        model(torch.tensor([1.0, 2.0]))
    assert (watch.latest("0")["count"], watch.latest("0")["mean"]) == (1, [1.0, 2.0])


def test_convolutions_without_a_batch_and_layers_without_channels():
    with bn.watch(model := nn.Sequential(nn.Conv2d(3, 2, 2)), every=1, layers="0") as watch:
        x = torch.randn(3, 5, 4)
        model(x)
    assert (watch.latest("0")["channels"], watch.latest("0")["count"]) == (3, 20)
    assert watch.latest("0")["mean"] == pytest.approx(x.double().mean((1, 2)).tolist())
    assert len(watch.latest("0")["output_mean"]) == 2
    with bn.watch(model := nn.Sequential(nn.Identity()), every=1, layers="0") as watch:
        model(torch.randn(4, 0))
    assert (watch.latest("0")["channels"], watch.latest("0")["quantiles"]) == (0, [])


def test_a_pass_that_fails_hides_nothing_of_the_next():
    class Failing(nn.Sequential):
        broken = True

        def forward(self, x):
            y = self[0](x)
            if self.broken:
                raise ZeroDivisionError
            return self[1](y)

    model = Failing(nn.BatchNorm1d(3), nn.Sigmoid())
    with bn.watch(model, every=1) as watch:
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(4, 3))
        model.broken = False
        model(torch.randn(4, 3))
    assert watch.latest("0")["saturated"] == 0.0


def test_layers_that_change_their_type():
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    with bn.watch(model, every=1, layers=nn.LayerNorm) as watch:
        model(torch.randn(4, 3))
        model[1].double()  # the same parameters, with other data
        model[1](model[0](torch.randn(4, 3)).double())
        model.double()
        model(torch.randn(4, 3).double())
    assert [record["weight"] for record in watch.records] == [[1.0] * 3] * 4


def test_lazy_layers():
    model = nn.Sequential(bn.nn.LazyBatchNorm1d())
    with bn.watch(model, every=1) as watch:
        model(torch.randn(5, 3))
        model(torch.randn(5, 3))
    assert [record["weight"] for record in watch.records] == [None, [1.0] * 3]


def test_manual_steps():
    generator, critic = mlp(), mlp()
    with bn.watch(nn.ModuleList([generator, critic]), every=2, manual=True) as watch:
        for _ in range(3):
            watch.begin_step()
            critic[:6](generator[:6](torch.randn(8, 6))[:, [0, 1, 2, 3, 4, 0]]).sum().backward()
            watch.end_step()
        generator(torch.randn(8, 6))
    assert [(r["step"], r["layer"]) for r in watch.records[:4]] == [
        (0, "0.1"),
        (0, "0.4"),
        (0, "1.1"),
        (0, "1.4"),
    ]
    assert {r["step"] for r in watch.records} == {0, 2}
    assert watch.latest("0.1")["grad_norm"] is not None
