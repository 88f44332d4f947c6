"""Ghost batch norm: a plain layer for one ghost after the other, ragged ends, masks, averages."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.ops.formulas import FORMULAS
from nn.random_state import randomise
from oracles import batch_norm as oracle

LAYERS = {
    2: (bn.nn.GhostBatchNorm1d, bn.nn.BatchNorm1d),
    3: (bn.nn.GhostBatchNorm1d, bn.nn.BatchNorm1d),
    4: (bn.nn.GhostBatchNorm2d, bn.nn.BatchNorm2d),
    5: (bn.nn.GhostBatchNorm3d, bn.nn.BatchNorm3d),
}
shapes = pytest.mark.parametrize(
    ("shape", "size"),
    [((8, 3), 4), ((11, 3), 4), ((9, 3), 4), ((7, 3, 5), 3), ((5, 3, 2, 5), 2), ((3, 3, 2, 3, 2), 1)],
    ids=str,
)


def pair(shape, size, **kwargs):
    """A ghost layer and a plain one of the same state."""
    ghost, plain = LAYERS[len(shape)]
    layer = randomise(ghost(shape[1], virtual_batch_size=size, **kwargs))
    twin = plain(shape[1], **kwargs)
    twin.load_state_dict(layer.state_dict())
    return layer, twin


def cuts(shape, size):
    """The bounds of the ghosts; a last one of a single value is part of the one before."""
    bounds = [*range(0, shape[0], size), shape[0]]
    if len(bounds) > 2 and (bounds[-1] - bounds[-2]) * int(np.prod(shape[2:])) == 1:
        del bounds[-2]
    return list(itertools.pairwise(bounds))


@shapes
@pytest.mark.parametrize("kind", ["easy", "mean 1e4", "constant channel"])
def test_each_ghost_is_a_batch_of_its_own_in_float64(shape, size, kind):
    layer, _ = pair(shape, size)
    x, dy = torch.randn(shape), torch.randn(shape)
    if kind == "mean 1e4":
        x += 1e4
    if kind == "constant channel":
        x[:, 1] = 3.0
    gamma, beta = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    expected, dx, dgamma, dbeta = [], [], 0, 0
    for first, last in cuts(shape, size):
        part, grad = x[first:last].double().numpy(), dy[first:last].double().numpy()
        expected.append(oracle.forward(part, gamma, beta, eps=1e-5)[0])
        found = oracle.backward(grad, part, gamma, beta, eps=1e-5)
        dx.append(found[0])
        dgamma, dbeta = dgamma + found[1], dbeta + found[2]
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    np.testing.assert_allclose(y.detach(), np.concatenate(expected), rtol=2e-5, atol=2e-5)
    dx = np.concatenate(dx)
    scale = np.abs(dx).max((0, *range(2, dx.ndim)), keepdims=True)
    np.testing.assert_allclose(leaf.grad.numpy() / scale, dx / scale, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(layer.weight.grad, dgamma, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.bias.grad, dbeta, rtol=1e-5, atol=1e-5)


@shapes
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"decay": 0.3, "ddof": 0}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("extra", ["plain", "masked", "residual"])
def test_it_is_the_plain_layer_called_for_one_ghost_after_the_other(shape, size, kwargs, extra):
    layer, twin = pair(shape, size, **kwargs)
    for _ in range(2):
        x, dy = torch.randn(shape) * 2 + 1, torch.randn(shape)
        mask = torch.rand(shape[0], *shape[2:]) < 0.8 if extra == "masked" else None
        residual = torch.randn(shape) if extra == "residual" else None
        leaf, twins_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(leaf, mask=mask, residual=residual)
        expected = torch.cat(
            [
                twin(
                    twins_leaf[first:last],
                    mask=None if mask is None else mask[first:last],
                    residual=None if residual is None else residual[first:last],
                )
                for first, last in cuts(shape, size)
            ]
        )
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(leaf.grad, twins_leaf.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    if extra != "masked":  # a plain layer counts a batch of which a mask leaves nothing
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@pytest.mark.parametrize("momentum", [0.3, None])
def test_averages_with_a_ghost_of_which_nothing_is_left(momentum):
    layer, twin = pair((9, 3), 3, momentum=momentum)
    x = torch.randn(9, 3)
    x[3:6] = float("nan")
    mask = torch.ones(9, dtype=torch.bool)
    mask[3:6] = False
    y = layer(x, mask=mask)
    expected = torch.cat([twin(x[:3]), torch.zeros(3, 3), twin(x[6:])])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    assert layer.num_batches_tracked == 2


def test_a_ghost_of_which_one_value_is_left_tells_of_the_mean_only():
    layer = bn.nn.GhostBatchNorm1d(1, virtual_batch_size=2, momentum=0.5)
    x = torch.tensor([[1.0], [3.0], [7.0], [9.0]])
    layer(x, mask=torch.tensor([True, True, True, False]))
    assert layer.running_mean.item() == (0.5 * 2) * 0.5 + 0.5 * 7
    assert layer.running_var.item() == 0.5 * 1 + 0.5 * 2


def test_the_closed_form_of_the_averages():
    layer = bn.nn.GhostBatchNorm1d(2, virtual_batch_size=5, momentum=0.2)
    x = torch.randn(5 * 200, 2, dtype=torch.double) + 4
    layer.double()(x)
    ghosts = x.reshape(200, 5, 2)
    weights = 0.2 * 0.8 ** torch.arange(199, -1, -1, dtype=torch.double).unsqueeze(1)
    torch.testing.assert_close(layer.running_mean, (weights * ghosts.mean(1)).sum(0))
    torch.testing.assert_close(layer.running_var, 0.8**200 + (weights * ghosts.var(1)).sum(0))


@shapes
def test_eval_and_small_batches_are_plain(shape, size):
    layer, twin = pair(shape, size)
    x = torch.randn(shape)
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x))
    layer, twin = pair(shape, shape[0])
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_without_averages_eval_takes_the_whole_batch():
    layer = bn.nn.GhostBatchNorm1d(3, virtual_batch_size=2, track_running_stats=False).eval()
    x = torch.randn(6, 3)
    torch.testing.assert_close(layer(x), bn.nn.BatchNorm1d(3, track_running_stats=False)(x))


def test_nan_stays_in_its_ghost_and_channel():
    layer, _ = pair((6, 3), 2)
    x = torch.randn(6, 3)
    clean = copy.deepcopy(layer)(x)
    x[2, 1] = float("nan")
    y = layer(x)
    assert y[2:4, 1].isnan().all()
    y[2:4, 1] = clean[2:4, 1]
    torch.testing.assert_close(y, clean)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_second_derivatives(activation):
    layer, twin = pair((5, 2, 3), 2, activation=activation)
    layer, twin = layer.double(), twin.double()
    x0 = torch.randn(5, 2, 3, dtype=torch.double)
    mask = torch.tensor([[True, True, False], [True, False, True], [True] * 3, [False] * 3, [False, True, True]])
    direction = torch.randn_like(x0)
    products = []
    for function in (
        lambda x: layer(x, mask=mask),
        lambda x: torch.cat([twin(x[a:b], mask=mask[a:b]) for a, b in cuts(x.shape, 2)]),
    ):
        x = x0.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        products.append(torch.autograd.grad(first, x, direction)[0])
    torch.testing.assert_close(*products)


def test_gamma_and_beta_of_each_sample():
    layer, twin = pair((5, 3, 4), 2, activation="relu")
    x, weight, bias = torch.randn(5, 3, 4), torch.rand(5, 3), torch.randn(5, 3)
    expected = torch.cat([twin(x[a:b], weight=weight[a:b], bias=bias[a:b]) for a, b in cuts(x.shape, 2)])
    torch.testing.assert_close(layer(x, weight=weight, bias=bias), expected)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_nested_input_is_for_eval():
    rows = [torch.randn(length, 3) for length in (4, 2, 5)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    layer, twin = pair((4, 3), 2)
    with pytest.raises(ValueError, match="expected a padded input with a mask or lengths, got a nested one"):
        layer(nested)
    for ours, theirs in zip(layer.eval()(nested).unbind(), twin.eval()(nested).unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "size", "layout"),
    [
        ((13, 7), 4, None),
        ((2000, 33), 150, None),
        ((9, 5, 17, 9), 2, None),
        ((9, 33, 5, 3), 2, torch.channels_last),
        ((6, 40, 40, 40), 4, None),
        ((6, 40, 40, 40), 2, torch.channels_last),
    ],
    ids=str,
)
def test_kernels(library, shape, size, layout, dtype, threads):
    """The operators against their formulas in float64: layouts, threads, mask, residual and its saved signs."""
    assert {"ghost_forward", "ghost_backward", "ghost_update"} <= set(library.operators)
    ghosts = len(cuts(shape, size))

    def values():
        tensor = (torch.randn(shape) * 2 + 3).to(dtype)
        return tensor if layout is None else tensor.contiguous(memory_format=layout)

    x, dy, residual = values(), values() - 3, values() - 5
    mask = torch.rand(shape[0], *shape[2:]) < 0.8
    parameter = dtype if dtype.itemsize > 2 else torch.float32
    weight, bias = torch.rand(shape[1]).to(parameter) + 0.5, torch.randn(shape[1]).to(parameter)

    def run(ops, *tensors):
        x, dy, residual, weight, bias = tensors
        y, saved, sign = ops.ghost_forward(x, weight, bias, residual, mask, size, ghosts, 1e-5, "relu")
        results = ops.ghost_backward(dy, x, saved, weight, bias, None, sign, mask, size, "relu", True)
        running = [torch.zeros(shape[1]), torch.ones(shape[1])]
        ops.ghost_update(*running, saved, None, torch.tensor(ghosts + 5), 1)
        return y, saved, *results, *running

    tensors = (x, dy, residual, weight, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(torch.ops.batchnorm, *tensors)
    finally:
        torch.set_num_threads(before)
    expected = run(FORMULAS, *(tensor.double() for tensor in tensors))
    rounding = torch.finfo(dtype).eps
    for ours, exact in zip(found, expected, strict=True):
        bound = 4 * max(rounding if ours.dtype == dtype else 0, torch.finfo(torch.float32).eps)
        error = (ours.double() - exact).abs().max() / exact.double().abs().max()
        assert error < bound


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bn.nn.GhostBatchNorm1d(3, virtual_batch_size=0), "expected virtual_batch_size of 1 or more, got 0"),
        (
            lambda: bn.nn.functional.batch_norm(torch.ones(2, 3), None, None, training=True, virtual_batch_size=-1),
            "expected virtual_batch_size of 1 or more, got -1",
        ),
        (
            lambda: bn.nn.GhostBatchNorm1d(3, virtual_batch_size=1)(torch.ones(4, 3)),
            r"Expected more than 1 value per channel when training, got virtual batches of 1 from input size .*4, 3",
        ),
        (
            lambda: bn.nn.GhostBatchNorm1d(3, virtual_batch_size=4)(torch.ones(1, 3)),
            "Expected more than 1 value per channel when training, got input size",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_batch_is_not_counted():
    layer, _ = pair((4, 3), 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="expected a residual of the input's shape"):
        layer(torch.randn(4, 3), residual=torch.randn(4, 2))
    with pytest.raises(TypeError, match="expected a boolean mask"):
        layer(torch.randn(4, 3), mask=torch.ones(4))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.usefixtures("library")
def test_the_operators_refuse_a_cut_that_does_not_fit():
    x = torch.randn(6, 3)
    for size, ghosts in ((0, 1), (2, 4), (3, 0)):
        with pytest.raises(RuntimeError, match="expected 6 samples to fill"):
            torch.ops.batchnorm.ghost_forward(x, None, None, None, None, size, ghosts, 1e-5, "none")


def test_repr_and_state():
    layer = bn.nn.GhostBatchNorm2d(3, virtual_batch_size=16)
    assert repr(layer).endswith("virtual_batch_size=16)")
    assert isinstance(layer, torch.nn.BatchNorm2d)
    torch.nn.BatchNorm2d(3).load_state_dict(layer.state_dict(), strict=True)
    with pytest.raises(TypeError, match="virtual_batch_size"):
        bn.nn.GhostBatchNorm2d(3)
