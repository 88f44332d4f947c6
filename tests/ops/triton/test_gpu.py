"""On an NVIDIA GPU. Skipped where there is none, unless one was promised (BATCHNORM_REQUIRE_CUDA=1)."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

import batchnorm as bn
from batchnorm.moments.operator import reference as moments_reference
from batchnorm.ops import native, reference, selftest
from batchnorm.ops.schema import ACTIVATIONS, SCHEMAS
from batchnorm.ops.triton import plan

pytestmark = pytest.mark.cuda

EPS = 1e-5
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(64, 64, 56, 56), (8, 33, 9, 7), (256, 2048, 7, 7), (5, 1, 3, 3), (2, 300, 65, 3)]
in_either_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())


@pytest.fixture(autouse=True)
def _kernels(gpu: str) -> None:  # noqa: ARG001
    """The kernels are what runs: a comparison with the reference itself would prove nothing."""
    torch.ops.batchnorm.stats(torch.ones(2, 2, device="cuda"), None)
    status = native.status()
    assert status.cuda == "triton", status.cuda_reason
    assert set(status.cuda_operators) == set(SCHEMAS)


def step(ops, x, grad, weight, bias, activation="relu", residual=None, mask=None):
    """y, mean, var, dx, dweight, dbias, dresidual."""
    y, count, mean, var, invstd, sign = ops.train_forward(x, weight, bias, residual, mask, EPS, activation)
    saved = (mean, invstd, weight, bias, residual, sign, mask, activation, count, residual is not None)
    return y, mean, var, *ops.train_backward(grad, x, *saved)


def draw(shape, dtype, memory_format, mean=0.5):
    def values():
        return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format)

    parameters = torch.randn(2, shape[1], device="cuda")
    return values() + mean, values(), *parameters.unbind(), values()


def wide(*tensors):
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


def error(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


@in_either_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cooperative", ["1", "0"], ids=["one launch", "two launches"])
def test_no_further_from_float64_than_torch(shape, dtype, memory_format, cooperative, monkeypatch):
    monkeypatch.setenv(plan.COOPERATIVE_SWITCH, cooperative)
    x, grad, weight, bias, _ = draw(shape, dtype, memory_format, 1e4 if dtype == torch.float32 else 0.5)
    ours = step(torch.ops.batchnorm, x, grad, weight, bias, "none")
    exact = step(reference, *wide(x, grad, weight, bias), "none")
    leaf = x.clone().requires_grad_()
    theirs = functional.batch_norm(leaf, None, None, weight, bias, training=True, eps=EPS)
    theirs.backward(grad)
    roundings = (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
    for index, peer in ((0, theirs), (3, leaf.grad)):
        assert error(ours[index], exact[index]) <= max(roundings, error(peer, exact[index]))
    assert error(ours[1], exact[1]) < 1e-6
    assert error(ours[2], exact[2]) < 1e-6


@in_either_format
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_masks_residuals_and_activations(activation, memory_format):
    x, grad, weight, bias, residual = draw((16, 48, 19, 17), torch.float32, memory_format)
    mask = torch.rand(16, 19, 17, device="cuda") > 0.3
    for real in (None, mask):
        for added in (None, residual):
            ours = step(torch.ops.batchnorm, x, grad, weight, bias, activation, added, real)
            exact = step(reference, *wide(x, grad, weight, bias), activation, *wide(added), real)
            for result, truth in zip(ours, exact, strict=True):
                torch.testing.assert_close(result.double(), truth.double(), rtol=2e-5, atol=2e-4)


def test_the_self_test_passes_on_kernels():
    checks = selftest.run(["cuda"])
    assert [check for check in checks if not check.passed] == []
    assert {check.implementation for check in checks if check.dtype != "float64"} == {"triton"}


@in_either_format
def test_the_same_bits_every_time(memory_format):
    x, grad, weight, bias, residual = draw((64, 96, 41, 43), torch.bfloat16, memory_format)
    first = step(torch.ops.batchnorm, x, grad, weight, bias, "relu", residual)
    for _ in range(20):
        again = step(torch.ops.batchnorm, x, grad, weight, bias, "relu", residual)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@in_either_format
def test_no_output_is_left_unwritten(memory_format):
    """The caching allocator hands out what was freed: NaN, wherever a kernel forgets to write."""
    x, grad, weight, bias, residual = draw((32, 70, 27, 29), torch.float32, memory_format)
    poison = [torch.full_like(x, torch.nan) for _ in range(6)]
    del poison
    for result in step(torch.ops.batchnorm, x, grad, weight, bias, "silu", residual):
        assert bool(result.isfinite().all())


def test_on_another_stream():
    x, grad, weight, bias, _ = draw((64, 64, 56, 56), torch.bfloat16, torch.channels_last)
    expected = step(torch.ops.batchnorm, x, grad, weight, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # whoever runs on the default stream is done long before
        late = x * 1
        results = step(torch.ops.batchnorm, late, grad, weight, bias)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_two_streams_at_once_finish():
    """Programs that wait for each other, of two launches on one card: neither may keep the other's from starting."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    x, grad, weight, bias, _ = draw((128, 64, 56, 56), torch.bfloat16, torch.channels_last)
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(torch.ops.batchnorm, x, grad, weight, bias))
    torch.cuda.synchronize()
    assert all(torch.equal(result[3], results[0][3]) for result in results)


@in_either_format
def test_in_a_cuda_graph(memory_format):
    layer = bn.nn.BatchNorm2d(64, activation="relu").cuda()
    x = torch.randn(32, 64, 28, 28, device="cuda").contiguous(memory_format=memory_format).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.square().sum().backward()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    before = layer.running_mean.clone()
    graph.replay()
    twin = bn.nn.BatchNorm2d(64, activation="relu").cuda()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = twin(leaf)
    z.square().sum().backward()
    assert torch.equal(y, z)
    assert torch.equal(x.grad, leaf.grad)
    assert not torch.equal(before, layer.running_mean)


@pytest.mark.parametrize("added", [False, True])
def test_compiled_without_a_graph_break(added):
    layer = bn.nn.BatchNorm2d(32, activation="relu").cuda()
    twin = bn.nn.BatchNorm2d(32, activation="relu").cuda()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(16, 32, 14, 14, device="cuda", requires_grad=True)
    residual = torch.randn_like(x, requires_grad=True) if added else None
    leaf, other = x.detach().clone().requires_grad_(), None if residual is None else residual.detach().clone()
    compiled(x, residual=residual).square().sum().backward()
    twin(leaf, residual=other).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_derivatives():
    def value(x, weight, bias):
        return torch.ops.batchnorm.train_forward(x, weight, bias, None, None, EPS, "silu")[0]

    leaves = [torch.randn(size, dtype=torch.float64, device="cuda", requires_grad=True) for size in ((4, 3, 2), 3, 3)]
    assert torch.autograd.gradcheck(value, leaves)
    x = torch.randn(6, 3, 4, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.batchnorm.train_forward, (x, None, None, None, None, EPS, "relu"))


def test_running_averages_equal_the_cpus():
    here, there = bn.nn.BatchNorm2d(7), bn.nn.BatchNorm2d(7).cuda()
    for _ in range(3):
        x = torch.randn(8, 7, 5, 5)
        here(x)
        there(x.cuda())
    torch.testing.assert_close(there.running_mean.cpu(), here.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(there.running_var.cpu(), here.running_var, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_is_the_tensors():
    x = torch.randn(16, 8, 9, 9, device="cuda:1")
    with torch.cuda.device(0):
        y, _, mean, *_ = torch.ops.batchnorm.train_forward(x, None, None, None, None, EPS, "relu")
    assert y.device == mean.device == x.device
    torch.testing.assert_close(y, reference.train_forward(x, None, None, None, None, EPS, "relu")[0])


@pytest.mark.skipif(os.environ.get("BATCHNORM_TEST_HUGE") != "1", reason="takes 30 GB; BATCHNORM_TEST_HUGE=1")
@in_either_format
def test_more_than_2_31_elements(memory_format):
    x = torch.empty(2**15 + 3, 64, 32, 32, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    x.normal_()
    x[-1] = 3.0
    y, count, mean, var, invstd, _ = torch.ops.batchnorm.train_forward(x, None, None, None, None, EPS, "none")
    assert count.item() == x.numel() // 64
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
    for part in (slice(0, 2), slice(-3, None)):  # both ends
        expected = reference.normalize(x[part], mean, invstd, None, None, None, None, "none")[0]
        torch.testing.assert_close(y[part], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(100_003, 37), (1, 1), (64, 5, 3137), (7, 300, 49)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["", "channels last"])
def test_moments_for_preprocessing(shape, dtype, last):
    x = (torch.randn(shape, device="cuda", dtype=torch.float64) * 3 + 1e4).to(dtype)
    if last and len(shape) == 3:
        x = x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    for ours, exact in zip(
        torch.ops.batchnorm.moments(x, None, False), moments_reference(x.cpu(), None, False), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), exact, rtol=1e-11, atol=1e-11)
