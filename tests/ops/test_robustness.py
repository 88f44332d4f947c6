"""What the kernels must survive: odd shapes and strides, and values beyond all bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import batchnorm as bn
from batchnorm.ops import reference
from batchnorm.ops.schema import ACTIVATIONS
from ops.steps import assert_same, exact, ours

LAST = torch.channels_last
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": LAST}
by_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def every_set():
    """A generator that chooses each instruction set of this machine in turn; the first one put back afterwards."""
    before = torch.ops.batchnorm._instruction_set("")

    def choose():
        for name in torch.ops.batchnorm._instruction_sets().split():
            yield torch.ops.batchnorm._instruction_set(name)

    yield choose
    torch.ops.batchnorm._instruction_set(before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3), (3, 0), (0, 0), (2, 3, 0)], ids=str
)
def test_nothing_in_any_dimension(shape, activation):
    x, residual = torch.randn(shape), torch.randn(shape)
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    for extra in ({}, {"residual": residual}, {"mask": mask}):
        assert_same(ours(x, x, activation, **extra), exact(x, x, activation, **extra))
    mean, var = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    assert torch.ops.batchnorm.normalize(x, mean, var, None, None, None, None, activation)[0].shape == shape


@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1), (1, 1), (1, 40, 1)], ids=str)
def test_one_value_a_channel(shape):
    x = torch.randn(shape)
    layer = bn.nn.BatchNorm1d(shape[1]) if len(shape) < 4 else bn.nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    layer.eval()
    peer = torch.nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), peer)
    y, mean, var, dx, *_ = ours(x, torch.ones(shape), "none")
    assert not y.any()
    assert not var.any()
    assert not dx.any()
    torch.testing.assert_close(mean, x.double().flatten())


@pytest.mark.parametrize("shape", [(64, 1), (8, 1, 7, 9), (1, 6, 5, 5), (1, 1, 300), (1, 33, 3)], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_one_channel_or_one_sample(shape, activation):
    x, grad, residual = torch.randn(shape) + 3, torch.randn(shape), torch.randn(shape)
    assert_same(ours(x, grad, activation), exact(x, grad, activation))
    assert_same(ours(x, grad, activation, residual=residual), exact(x, grad, activation, residual=residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 35), (3, 5, 7, 3)], ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_views_at_any_offset(offset, shape, dtype):
    def shifted():
        return torch.randn(math.prod(shape) + offset).to(dtype)[offset:].view(shape)

    x, grad, residual = shifted(), shifted(), shifted()
    assert x.data_ptr() % (16 * dtype.itemsize) != 0
    apart = [t.clone() for t in (x, grad, residual)]
    for result, truth in zip(ours(x, grad, residual=residual), ours(*apart[:2], residual=apart[2]), strict=True):
        assert torch.equal(result, truth)


def test_views_that_overlap():
    base = torch.randn(40)
    windows = base.as_strided((4, 3, 6), (3, 1, 5))
    rows = torch.randn(1, 9).expand(7, 9)
    grads = torch.randn(1, 1, 1).expand(4, 3, 6)
    for x, grad in ((windows, grads), (rows, rows), (torch.randn(()).expand(4, 3, 6), windows)):
        assert_same(ours(x, grad, residual=x), exact(x.clone(), grad.clone(), residual=x.clone()), rtol=1e-3, atol=2e-5)


@by_format
@pytest.mark.parametrize("arrange", ["expanded", "other format", "transposed", "every second"])
def test_gradients_with_strides_of_their_own(arrange, memory_format):
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=memory_format)
    grad = {
        "expanded": torch.randn(6, 1, 1).expand(4, 6, 5, 5),
        "other format": torch.randn(4, 6, 5, 5).contiguous(memory_format=LAST),
        "transposed": torch.randn(4, 6, 5, 5).transpose(2, 3),
        "every second": torch.randn(4, 12, 5, 5)[:, ::2],
    }[arrange]
    assert_same(ours(x, grad), exact(x, grad))
    assert_same(ours(x, grad, residual=grad), exact(x, grad, residual=grad))
    leaf = x.clone().requires_grad_()
    bn.nn.BatchNorm2d(6, activation="relu")(leaf).sum().backward()  # its gradient is one value, expanded
    assert leaf.grad.isfinite().all()


@by_format
@pytest.mark.parametrize("shape", [(3, 19, 5, 3), (2, 5, 7, 7), (40, 33, 1, 1)], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_inf_and_nan_stay_in_their_channel(dtype, value, shape, memory_format, every_set):
    clean = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    grad, residual = torch.randn_like(clean), torch.randn_like(clean)
    others = torch.tensor([c for c in range(shape[1]) if c != shape[1] - 2])
    for _, activation in itertools.product(every_set(), ACTIVATIONS):
        for spoiled in ("x first", "x last", "grad", "residual"):
            x, dy, extra = clean.clone(), grad.clone(), residual.clone()
            where = {"x first": x, "x last": x, "grad": dy, "residual": extra}[spoiled]
            where[0 if spoiled == "x first" else -1, -2, 0, 0] = value
            expected = ours(clean, grad, activation, residual=residual)
            for result, truth in zip(ours(x, dy, activation, residual=extra), expected, strict=True):
                axis = 1 if result.dim() > 1 else 0
                assert torch.equal(result.index_select(axis, others), truth.index_select(axis, others)), spoiled
            if spoiled.startswith("x"):
                y, mean, *_, dx = ours(x, dy, activation, residual=extra)[:4]
                assert not mean[-2].isfinite()
                assert not y[:, -2].isfinite().all()
                assert not dx[:, -2].isfinite().any()


@by_format
def test_padding_may_hold_anything(memory_format, every_set):
    x = torch.randn(4, 19, 5, 3).contiguous(memory_format=memory_format)
    grad, mask = torch.randn_like(x), torch.rand(4, 5, 3) > 0.4
    for _, activation in itertools.product(every_set(), ACTIVATIONS):
        expected = ours(x, grad, activation, residual=grad, mask=mask)
        for value in (math.nan, math.inf, 3e38):
            dirty, dy = (torch.where(mask.unsqueeze(1), t, value) for t in (x, grad))
            for result, truth in zip(ours(dirty, dy, activation, residual=dy, mask=mask), expected, strict=True):
                assert torch.equal(result, truth), activation


FAR_OUT = [(activation, size) for activation in ("silu", "gelu", "hardswish") for size in (1e4, 1e20, 1e30)]
FAR_OUT += [("silu", 3e38), ("gelu", 3e38), ("hardswish", 3e37)]


@pytest.mark.parametrize(("activation", "size"), FAR_OUT)
def test_an_activation_far_out(activation, size, every_set):
    z = torch.tensor([-size, size]).view(1, 1, 2)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    saved = (torch.ones_like(z), z, zero, one, None, None, None, None, None, activation, one, zero, zero, False)
    for name in every_set():
        y = torch.ops.batchnorm.normalize(z, zero, one, None, None, None, None, activation)[0].flatten()
        torch.testing.assert_close(y, torch.tensor([0.0, size]), rtol=1e-6, atol=1e-7, msg=name)
        slope = torch.ops.batchnorm.grad_input(*saved)[0].flatten()
        torch.testing.assert_close(slope, torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-7, msg=name)


@by_format
def test_subnormal_values(memory_format):
    tiny = torch.finfo(torch.float32).smallest_normal
    x = (torch.randn(4, 7, 3, 3) * tiny / 4).contiguous(memory_format=memory_format)
    x[:, 0] = tiny / 2**20
    assert x.abs().max() < 4 * tiny
    grad = torch.randn_like(x) * tiny / 8
    mean, invstd = reference.stats(x, None)[1], torch.full((7,), 1.0, dtype=torch.float64)
    torch.testing.assert_close(torch.ops.batchnorm.stats(x, None)[1], mean, rtol=1e-12, atol=0)
    y = torch.ops.batchnorm.normalize(x, mean, invstd, None, None, None, None, "none")[0]
    expected = reference.normalize(x, mean, invstd, None, None, None, None, "none")[0]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=2**-149)
    assert y.any()
    sums = torch.ops.batchnorm.grad_sums(grad, x, mean, invstd, None, None, None, None, None, "none")[0]
    torch.testing.assert_close(sums, grad.double().sum((0, 2, 3)), rtol=1e-12, atol=0)
