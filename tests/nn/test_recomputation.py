"""Activation checkpointing runs a forward twice: its batch is counted and averaged once (pytorch #96136)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn

MUST_SAVE = (torch.ops.aten.addmm.default,)


def keep_products(_, operator, *_args, **_options):
    return CheckpointPolicy.MUST_SAVE if operator in MUST_SAVE else CheckpointPolicy.PREFER_RECOMPUTE


def selective():
    return create_selective_checkpoint_contexts(keep_products)


KINDS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "no early stop": {"use_reentrant": False, "early_stop": False},
    "selective": {"use_reentrant": False, "context_fn": selective},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
LAYERS = {
    "default": {},
    "cumulative": {"momentum": None},
    "biased": {"ddof": 0, "activation": "gelu"},
    "running": {"on_single_value": "running"},
}
layers = pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS.keys())


def network(**kwargs) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(3, 3), bn.nn.BatchNorm1d(3, **kwargs), torch.nn.Sigmoid(), bn.nn.BatchNorm1d(3, **kwargs)
    )


def train(forward, model, steps=3):
    generator = torch.Generator().manual_seed(1)
    gradients = []
    for _ in range(steps):
        x = torch.randn(6, 3, generator=generator).requires_grad_()
        forward(x).pow(3).sum().backward()
        gradients.append(x.grad)
    return gradients, [parameter.grad for parameter in model.parameters()], model.state_dict()


@kinds
@layers
def test_a_checkpointed_network_has_the_averages_of_a_plain_one(kind, kwargs):
    model = network(**kwargs)
    twin = copy.deepcopy(model)
    ours = train(lambda x: checkpoint(model, x, **kind), model)
    torch.testing.assert_close(ours, train(twin, twin), rtol=1e-6, atol=1e-6)
    assert model[1].num_batches_tracked == model[3].num_batches_tracked == 3


@pytest.mark.parametrize("kind", [KINDS["reentrant"], KINDS["not reentrant"]], ids=["reentrant", "not reentrant"])
def test_torchs_own_layer_counts_twice(kind):
    """The defect itself: were it gone, so would be the reason for all this."""
    layer = torch.nn.BatchNorm1d(3)
    train(lambda x: checkpoint(layer, x, **kind), layer)
    assert layer.num_batches_tracked == 6


@kinds
@pytest.mark.parametrize("order", ["compiled inside", "compiled outside"])
@pytest.mark.filterwarnings("ignore:.*context_fn.*")
def test_compiled(kind, order):
    if "early_stop" in kind and order == "compiled outside":
        pytest.skip("torch.compile takes no early_stop")
    model = network()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    if order == "compiled inside":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = train(lambda x: checkpoint(compiled, x, **kind), model)
    else:
        compiled = torch.compile(lambda x: checkpoint(model, x, **kind), fullgraph=True, backend="aot_eager")
        ours = train(compiled, model)
    torch.testing.assert_close(ours, train(twin, twin), rtol=1e-5, atol=1e-5)
    assert model[1].num_batches_tracked == 3
    torch._dynamo.reset()


@kinds
def test_with_a_mask_and_gamma_of_each_sample(kind):
    """The step made of smaller operators, not the fused one."""
    layer, mask = bn.nn.BatchNorm1d(3), torch.tensor([True, True, False, True, True, True])
    twin, gamma = copy.deepcopy(layer), torch.rand(6, 3)
    ours = train(lambda x: checkpoint(lambda x: layer(x, mask=mask, weight=gamma), x, **kind), layer)
    torch.testing.assert_close(ours, train(lambda x: twin(x, mask=mask, weight=gamma), twin))
    assert layer.num_batches_tracked == 3


def test_a_second_backward_of_a_gradient_penalty_is_no_recomputation():
    """Forwards happen outside of any backward there, however often gradients are taken."""
    layer = bn.nn.BatchNorm1d(3)
    for _ in range(2):
        x = torch.randn(6, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert layer.num_batches_tracked == 2


def test_what_is_taken_for_a_recomputation_and_documented_so():
    """New data through a layer from within a hook of the backward pass."""
    layer, x = bn.nn.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
    x.register_hook(lambda _: layer(torch.randn(6, 3)).sum() * 0 + torch.zeros(6, 3))
    x.square().sum().backward()
    assert layer.num_batches_tracked == 0


def test_after_a_backward_that_failed_averages_move_again():
    layer, x = bn.nn.BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)

    def fail(_):
        raise ZeroDivisionError

    x.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    layer(x.detach())
    assert layer.num_batches_tracked == 2
