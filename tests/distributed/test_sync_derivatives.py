"""Second derivatives, torch.func and torch.compile across ranks."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch import distributed
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, jvp, vmap

import batchnorm as bn
from distributed.pair import on_both_ranks

SPLIT = 2
ACTIVATIONS = [None, "relu", "silu"]


def part(whole, rank):
    return whole[:SPLIT] if rank == 0 else whole[SPLIT:]


def pair_of(activation, shape=(6, 3, 4)):
    """The layer, its twin for one process, and a batch for both, in float64."""
    options = {"activation": activation, "dtype": torch.float64}
    layer, one = bn.nn.SyncBatchNorm(3, **options), bn.nn.BatchNorm1d(3, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(3) + 0.5)
    one.load_state_dict(layer.state_dict())
    return layer, one, torch.randn(shape, dtype=torch.float64)


class Enter(torch.autograd.Function):
    """A value that all ranks have: what each does with it counts."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        return Total.apply(grad)


class Total(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx, grad):
        return Enter.apply(grad)


class Leave(torch.autograd.Function):
    """The parts of all ranks as one value that all have."""

    @staticmethod
    def forward(ctx, x, rank):
        ctx.rank = rank
        parts = [x.new_empty(0)] * 2
        distributed.all_gather_object(parts, x.detach().clone())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return Take.apply(grad, ctx.rank), None


class Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, rank):
        ctx.rank = rank
        return part(whole, rank).clone()

    @staticmethod
    def backward(ctx, grad):
        return Leave.apply(grad, ctx.rank), None


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@on_both_ranks
def test_gradcheck_and_gradgradcheck_across_ranks(rank, activation, masked):
    """The function of the whole batch that both ranks compute together, differentiated numerically."""
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    residual = torch.randn_like(x).requires_grad_()
    mask = torch.rand(4, 2) > 0.3 if masked else torch.ones(4, 2, dtype=torch.bool)

    def function(x, weight, bias, residual):
        x, weight, bias, residual = (Enter.apply(value) for value in (x, weight, bias, residual))
        y = bn.nn.functional.batch_norm(
            part(x, rank),
            None,
            None,
            weight,
            bias,
            True,
            activation=activation,
            mask=part(mask, rank) if masked else None,
            residual=part(residual, rank),
            group=distributed.group.WORLD,
        )
        return Leave.apply(y, rank)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    # The gradients of the outputs are drawn at random: the same on both, from the same seed.
    torch.manual_seed(1)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_both_ranks
def test_double_backward_is_that_of_one_process(rank, activation):
    layer, one, whole = pair_of(activation)
    direction, seed = torch.randn_like(whole), torch.randn_like(whole)
    found = []
    for module, cut in ((layer, lambda tensor: part(tensor, rank)), (one, lambda tensor: tensor)):
        x = cut(whole).clone().requires_grad_()
        (first,) = torch.autograd.grad((module(x) * cut(seed)).sum(), x, create_graph=True)
        second = torch.autograd.grad((first * cut(direction)).sum(), (x, module.weight))
        found.append((first.detach(), *second))
    (first, second, dweight), (first_one, second_one, dweight_one) = found
    torch.testing.assert_close(first, part(first_one, rank))
    torch.testing.assert_close(second, part(second_one, rank))
    distributed.all_reduce(dweight)
    torch.testing.assert_close(dweight, dweight_one)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_both_ranks
def test_func_transforms_are_those_of_one_process(rank, activation):
    layer, one, whole = pair_of(activation)
    direction, seed = torch.randn_like(whole), torch.randn_like(whole)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss_of(module, seed):
        buffers = dict(module.named_buffers())

        def loss(x):
            fresh = {name: value.clone() for name, value in buffers.items()}
            return (functional_call(module, (parameters, fresh), (x,)) * seed).sum()

        return loss

    loss, loss_one = loss_of(layer, part(seed, rank)), loss_of(one, seed)
    x, v = part(whole, rank), part(direction, rank)
    torch.testing.assert_close(grad(loss)(x), part(grad(loss_one)(whole), rank))
    _, slope = jvp(loss, (x,), (v,))
    distributed.all_reduce(slope)
    torch.testing.assert_close(slope, jvp(loss_one, (whole,), (direction,))[1])
    # Forward over reverse: a product with the Hessian of the losses' sum.
    _, product = jvp(grad(loss), (x,), (v,))
    torch.testing.assert_close(product, part(jvp(grad(loss_one), (whole,), (direction,))[1], rank))


@on_both_ranks
def test_vmap_over_batches(rank):
    layer, one, whole = pair_of("silu")
    many = torch.stack([whole, 3 * whole + 1, whole - 5], dim=2)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def run(module, parts):
        buffers = {name: value.expand(3, *value.shape).clone() for name, value in module.named_buffers()}
        y = vmap(lambda b, x: functional_call(module, (parameters, b), (x,)), in_dims=(0, 2))(buffers, parts)
        return y, buffers

    (y, buffers), (expected, expected_buffers) = run(layer, part(many, rank)), run(one, many)
    torch.testing.assert_close(y, expected[:, :SPLIT] if rank == 0 else expected[:, SPLIT:])
    torch.testing.assert_close(buffers, expected_buffers)


@pytest.mark.parametrize(
    ("backend", "momentum"),
    [("aot_eager", 0.1), ("aot_eager", None), ("inductor", 0.1)],
    ids=["aot_eager", "cumulative", "inductor"],
)
@on_both_ranks
def test_compiles_in_one_graph_and_does_not_recompile(rank, backend, momentum):
    """pytorch #161302, #156680."""
    layer, one, whole = pair_of("relu")
    layer.momentum = one.momentum = momentum
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(4):
        whole = torch.randn_like(whole) + step
        seed = torch.randn_like(whole)
        x, reference = part(whole, rank).clone().requires_grad_(), whole.clone().requires_grad_()
        y, expected = compiled(x), one(reference)
        (y * part(seed, rank)).sum().backward()
        (expected * seed).sum().backward()
        torch.testing.assert_close(y, part(expected, rank))
        torch.testing.assert_close(x.grad, part(reference.grad, rank))
        torch.testing.assert_close(layer.state_dict(), one.state_dict())
    assert counter.frame_count == 1
    torch._dynamo.reset()


@on_both_ranks
def test_one_collective_forward_and_one_backward(rank):
    """Counted in the graphs, and in eager mode."""
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return make_boxed_func(graph)

    def collectives(targets):
        return [str(target) for target in targets if "_c10d_functional" in str(target) and "wait" not in str(target)]

    layer, _, whole = pair_of("relu")
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(part(whole, rank).clone().requires_grad_()).sum().backward()
    forward, backward = map(collectives, graphs)
    assert forward == ["_c10d_functional.all_gather_into_tensor.default"]
    assert backward == ["_c10d_functional.all_reduce.default"]
    torch._dynamo.reset()

    layer(part(whole, rank))  # the first use also agrees
    with torch.profiler.profile() as profile:
        layer(part(whole, rank).clone().requires_grad_()).sum().backward()
    names = [event.name for event in profile.events() if event.name.startswith("_c10d_functional::")]
    assert [name.removeprefix("_c10d_functional::") for name in names if "wait" not in name] == [
        "all_gather_into_tensor",
        "all_reduce",
    ]


@on_both_ranks
def test_compiles_for_batches_of_changing_size(rank):
    layer, one, _ = pair_of("silu")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(5):
        whole = torch.randn(5 + step, 3, 4, dtype=torch.float64)
        x = part(whole, rank).clone().requires_grad_()
        y, expected = compiled(x), one(whole)
        y.sum().backward()
        torch.testing.assert_close(y, part(expected, rank))
    assert counter.frame_count <= 2  # the second with a symbol for the size
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["raise", "running"])
@on_both_ranks
def test_compiles_with_masks_and_coefficients_of_each_sample(rank, policy):
    layer, one, whole = pair_of("silu")
    layer.on_single_value = one.on_single_value = policy
    mask, gamma = torch.rand(6, 4) > 0.4, torch.rand(6, 3, dtype=torch.float64)
    for weight in (None, gamma):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x, reference = part(whole, rank).clone().requires_grad_(), whole.clone().requires_grad_()
            own = None if weight is None else part(weight, rank)
            y, expected = compiled(x, mask=part(mask, rank), weight=own), one(reference, mask=mask, weight=weight)
            y.pow(2).sum().backward()
            expected.pow(2).sum().backward()
            torch.testing.assert_close(y, part(expected, rank))
            torch.testing.assert_close(x.grad, part(reference.grad, rank))
        torch.testing.assert_close(layer.state_dict(), one.state_dict())
    torch._dynamo.reset()
