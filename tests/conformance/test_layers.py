"""The battery that every layer of :mod:`batchnorm.nn` goes through, and the proof that none is left out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from conformance.cases import CASES, Case

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def test_no_layer_is_left_out():
    public = {getattr(bn.nn, name) for name in bn.nn.__all__}
    layers = {thing for thing in public if isinstance(thing, type) and issubclass(thing, torch.nn.Module)}
    losses = {bn.nn.CORALLoss}  # of two inputs: tests/nn/test_alignment.py
    assert layers - losses == {case.layer for case in CASES.values()}


def made(case: Case, training: bool, **kwargs: Any) -> torch.nn.Module:
    layer = case.make(**kwargs).train(training)
    with torch.no_grad():
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if "covar" in name:
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor))  # still a covariance
            elif tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else -0.2))
            if name.endswith("_cov"):
                tensor.copy_(tensor @ tensor.mT + torch.eye(tensor.size(-1)))
    return layer


@every_case
@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, training, dtype):
    layer = made(case, training)
    x = torch.randn(case.shape)
    expected = copy.deepcopy(layer).double()(x.to(dtype).double())
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    # The parameters were rounded too.
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)


@every_case
@both_modes
def test_memory_formats(case, training):
    x = torch.randn(case.shape)
    original = made(case, training)
    results = []
    for memory_format in case.formats:
        layer = copy.deepcopy(original)
        leaf = x.clone(memory_format=memory_format).requires_grad_()
        y = layer(leaf)
        assert y.is_contiguous(memory_format=memory_format)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, layer.state_dict()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@every_case
@both_modes
def test_compiles_in_one_graph_and_does_not_recompile(case, training):
    layer = made(case, training)
    compiled = copy.deepcopy(layer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    for _ in range(3):
        x = torch.randn(case.shape)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = run(ours), layer(theirs)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(compiled.state_dict(), layer.state_dict())
    assert counter.frame_count == 1
    torch._dynamo.reset()


@every_case
@both_modes
def test_exports(case, training):
    layer = made(case, training)
    x = torch.randn(case.shape)
    program = torch.export.export(copy.deepcopy(layer), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@every_case
@both_modes
def test_vmap_over_models(case, training):
    layers = [made(case, training) for _ in range(3)]
    x = torch.randn(case.shape)
    parameters, buffers = stack_module_state(layers)
    y = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(y[i], layer(x))
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer)


@every_case
@both_modes
def test_forward_mode_agrees_with_reverse_mode(case, training):
    layer = made(case, training).double()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x, direction = torch.randn(case.shape).double(), torch.randn(case.shape).double()

    def loss(p, x):
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return functional_call(layer, (p, buffers), (x,)).pow(3).sum()

    _, forward = jvp(lambda x: loss(parameters, x), (x,), (direction,))
    torch.testing.assert_close(forward, (grad(loss, argnums=1)(parameters, x) * direction).sum())
    # Hessian times vector, forward over reverse, against reverse over reverse.
    _, product = jvp(lambda x: grad(loss, argnums=1)(parameters, x), (x,), (direction,))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(parameters, leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first, leaf, direction)
    torch.testing.assert_close(product, expected)


@every_case
def test_masked_rows_are_as_if_they_were_not_there(case):
    layer, twin = (lambda layer: (layer, copy.deepcopy(layer)))(made(case, True))
    x = torch.randn(case.shape)
    padded = torch.cat([x, torch.full_like(x[:2], float("nan"))])
    mask = torch.ones(padded.size(0), *padded.shape[2:], dtype=torch.bool)
    mask[-2:] = False
    y, expected = layer(padded, mask=mask), twin(x)
    torch.testing.assert_close(y[:-2], expected)
    assert y[-2:].abs().sum() == 0
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@every_case
@both_modes
def test_a_fully_masked_batch_is_nothing(case, training):
    layer = made(case, training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.full(case.shape, float("nan"), requires_grad=True)
    y = layer(x, mask=torch.zeros(case.shape[0], *case.shape[2:], dtype=torch.bool))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(case.shape))
    assert torch.equal(x.grad, torch.zeros(case.shape))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters() if p.grad is not None)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@every_case
@both_modes
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_changes_nothing(case, training, use_reentrant):
    """pytorch #96136: the second run of the same batch is not counted."""
    layer = made(case, training)
    twin, results = copy.deepcopy(layer), []
    for model, forward in ((layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)), (twin, twin)):
        for step in range(2):
            x = torch.linspace(-1, 4 + step, math.prod(case.shape)).reshape(case.shape).sin().requires_grad_()
            forward(x).pow(3).sum().backward()
        results.append((x.grad, [parameter.grad for parameter in model.parameters()], model.state_dict()))
    torch.testing.assert_close(*results)


@every_case
@both_modes
def test_empty_batch(case, training):
    layer = made(case, training)
    before = {k: v.clone() for k, v in layer.state_dict().items() if "num_batches_tracked" not in k}
    x = torch.randn(0, *case.shape[1:], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name], value), name


@every_case
def test_deterministic(case):
    x = torch.randn(case.shape)
    first = made(case, True)
    second = copy.deepcopy(first)
    assert torch.equal(first(x), second(x))


@every_case
def test_two_forwards_before_one_backward(case):
    """pytorch #175024, #110363: running buffers moved in place must not break the first forward's backward."""
    layer = made(case, True)
    x, z = torch.randn(case.shape, requires_grad=True), torch.randn(case.shape)
    (layer(x).square().sum() + layer(z).sum()).backward()
    assert x.grad.isfinite().all()
