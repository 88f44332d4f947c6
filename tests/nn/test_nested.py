"""Nested (jagged) tensors in every layout that torch allows: as the rows of a padded batch with its mask."""

from __future__ import annotations

import copy

import pytest
import torch

import batchnorm as bn

LENGTHS = [3, 1, 0, 4]


def jagged(rows):
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


def channels_last(*rest):
    """(N, ragged, *rest, C)"""
    return [torch.randn(length, *rest, 2) * 3 + 5 for length in LENGTHS]


def channels_first(*rest):
    """(N, C, ragged, *rest)"""
    return [torch.randn(2, length, *rest) * 3 + 5 for length in LENGTHS]


def flat(rows, channel):
    """The oracle's view: every value once, (positions, C)."""
    return torch.cat([row.movedim(channel, -1).reshape(-1, 2) for row in rows])


CASES = {
    "N, ragged, C": (bn.nn.BatchNorm1d, channels_last(), -1),
    "N, C, ragged": (bn.nn.BatchNorm1d, channels_first(), 0),
    "N, ragged, W, C": (bn.nn.BatchNorm2d, channels_last(3), -1),
    "N, C, ragged, W": (bn.nn.BatchNorm2d, channels_first(3), 0),
    "N, C, H, ragged": (bn.nn.BatchNorm2d, [row.transpose(1, 2) for row in channels_first(3)], 0),
    "N, C, D, ragged, W": (bn.nn.BatchNorm3d, [row.transpose(1, 2) for row in channels_first(3, 2)], 0),
}
cases = pytest.mark.parametrize(("cls", "rows", "channel"), CASES.values(), ids=CASES.keys())
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def randomise(layer):
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


@cases
@both_modes
def test_equals_the_values_alone(cls, rows, channel, training):
    layer = randomise(cls(2, activation="silu")).train(training)
    twin = bn.nn.BatchNorm1d(2, activation="silu").train(training)
    twin.load_state_dict(layer.state_dict())
    x = jagged(rows)
    y = layer(x)
    y.pow(3).values().sum().backward()
    plain = flat(rows, channel).requires_grad_()
    expected = twin(plain)
    expected.pow(3).sum().backward()
    assert y.is_nested
    assert y.shape == x.shape
    torch.testing.assert_close(flat(y.unbind(), channel), expected)
    torch.testing.assert_close(flat(x.grad.unbind(), channel), plain.grad)
    torch.testing.assert_close([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()])
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@cases
@both_modes
def test_with_a_residual_and_gamma_of_each_row(cls, rows, channel, training):
    layer = randomise(cls(2, activation="relu")).train(training)
    twin = bn.nn.BatchNorm1d(2, activation="relu").train(training)
    twin.load_state_dict(layer.state_dict())
    gamma = torch.rand(len(rows), 2)
    x = jagged(rows)
    y = layer(x, weight=gamma, residual=x * 0.5)
    plain = flat(rows, channel)
    repeated = torch.cat([gamma[i].expand(row.numel() // 2, 2) for i, row in enumerate(rows)])
    expected = twin(plain, weight=repeated, residual=plain * 0.5)
    torch.testing.assert_close(flat(y.unbind(), channel), expected)


@both_modes
@pytest.mark.parametrize("transposed", [False, True])
def test_a_narrowed_view_leaves_out_what_lies_between_its_rows(training, transposed):
    padded = torch.randn(4, 6, 2)
    start, length = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 1, 2, 4])
    padded[0, 3:] = padded[1, 2:] = float("nan")
    x = torch.nested.narrow(padded, 1, start, length, layout=torch.jagged)
    rows = [padded[i, s : s + n] for i, (s, n) in enumerate(zip(start, length, strict=True))]
    layer, twin = randomise(bn.nn.BatchNorm1d(2)).train(training), None
    twin = copy.deepcopy(layer)
    y = layer(x.transpose(1, 2)).transpose(1, 2) if transposed else layer(x)
    torch.testing.assert_close(torch.cat(y.unbind()), twin(torch.cat(rows)))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_lazy_layers_find_the_channels():
    for rows in (channels_last(), channels_first()):
        layer = bn.nn.LazyBatchNorm1d()
        layer(jagged(rows))
        assert layer.num_features == 2


X = [torch.ones(3, 2), torch.ones(1, 2)]
REFUSED = {
    "no channels": (jagged([torch.ones(3), torch.ones(1)]), {}, "expected a nested tensor with a channel and a ragged"),
    "mask": (
        jagged(X),
        {"mask": torch.ones(2, 3, dtype=torch.bool)},
        "expected no mask or lengths with a nested",
    ),
    "residual": (jagged(X), {"residual": torch.ones(4, 2)}, "expected a nested tensor of the input's shape"),
    "other rows": (jagged(X), {"residual": jagged(X[::-1])}, "expected a nested tensor of the input's shape"),
    "weight": (jagged(X), {"weight": torch.ones(3, 2)}, r"expected weight and bias for 2 rows, got \[3, 2\]"),
}


@pytest.mark.parametrize(("x", "kwargs", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_counted(x, kwargs, words):
    layer = bn.nn.BatchNorm1d(2)
    with pytest.raises(bn.InputError, match=words) as caught:
        layer(x, **kwargs)
    assert "\n" not in str(caught.value)
    assert layer.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_older_layout_is_refused():
    with pytest.raises(bn.InputError, match=r"expected a nested tensor with layout=torch.jagged, got .*torch.strided"):
        bn.nn.BatchNorm1d(2)(torch.nested.nested_tensor(X, layout=torch.strided))


@both_modes
def test_compiles_for_rows_of_other_lengths(training):
    layer = randomise(bn.nn.BatchNorm1d(2)).train(training)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ((3, 5), (2, 7), (4, 1)):
        rows = [torch.randn(length, 2) for length in lengths]
        ours, theirs = jagged(rows), jagged(rows)
        y, expected = compiled(ours), twin(theirs)
        y.values().pow(3).sum().backward()
        expected.values().pow(3).sum().backward()
        torch.testing.assert_close(y.values(), expected.values())
        torch.testing.assert_close(ours.grad.values(), theirs.grad.values())
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    torch._dynamo.reset()
