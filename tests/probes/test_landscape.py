"""The landscape of the loss, against algebra, a NumPy oracle and finite differences; and that nothing is left of it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import InputError
from batchnorm.probes import Landscape, landscape
from batchnorm.probes.feeding import probing
from oracles.landscape import TwoLinearLayers

MSE = nn.MSELoss()


def linear():
    """(1/N) |X w - y|^2: a quadratic with Hessian (2/N) X'X."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    x, y = torch.randn(30, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.randn(30, 1).double()
    return model, (x, y)


def test_a_quadratic_is_what_algebra_says():
    model, (x, y) = linear()
    w = model.weight.detach().T
    hessian = 2.0 / 30 * x.T @ x
    g = 2.0 / 30 * x.T @ (x @ w - y)
    found = landscape(model, (x, y), MSE, learning_rate=0.1, factors=(0.5, 3.0))
    loss = float(((x @ w - y) ** 2).mean())
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    assert found.steps == (0.05, pytest.approx(0.3))
    for eta, after, change, way in zip(found.steps, found.losses, found.gradient_changes, found.distances, strict=True):
        exact = loss - eta * float(g.T @ g) + eta**2 / 2 * float(g.T @ hessian @ g)
        assert after == pytest.approx(exact, rel=1e-10)
        assert change == pytest.approx(eta * float((hessian @ g).norm()), rel=1e-10)
        assert way == pytest.approx(eta * float(g.norm()), rel=1e-10)
    assert found.loss_range == (min(found.losses), max(found.losses))
    assert found.gradient_range == (found.gradient_changes[0], found.gradient_changes[1])
    # Of a quadratic the same at every step: |H g| / |g|, at most the largest eigenvalue.
    assert found.smoothness == pytest.approx(float((hessian @ g).norm() / g.norm()), rel=1e-9)
    assert found.smoothness <= float(torch.linalg.eigvalsh(hessian).max())
    assert found.shifts == ()  # before the only layer nothing changes


def deep(norm=True):
    torch.manual_seed(1)
    parts = []
    for width in (6, 8, 8, 8):
        parts += [nn.Linear(width, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Sigmoid()]
    model = nn.Sequential(*parts, nn.Dropout(0.3), nn.Linear(8, 3))
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, (torch.randn(20, 6), torch.randint(3, (20,)))


def test_the_shift_of_two_linear_layers_is_the_oracles():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(40, 5).double(), torch.randn(40, 2).double()
    found = landscape(model, (x, y), MSE, learning_rate=0.3, layers=1)
    state = [parameter.detach().numpy() for parameter in model.parameters()]
    oracle = TwoLinearLayers(*state, x.numpy(), y.numpy())
    norm, distance, cosine = oracle.shift_of_the_second(0.3)
    (shift,) = found.shifts
    assert shift.layer == "1"
    assert (shift.gradient_norm, shift.distance) == (pytest.approx(norm, rel=1e-10), pytest.approx(distance, rel=1e-9))
    assert shift.cosine == pytest.approx(cosine, rel=1e-10)
    assert found.gradient_norm == pytest.approx(oracle.gradient_norm(), rel=1e-10)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_every_number_is_what_a_copy_trained_by_hand_shows(norm):
    model, (x, y) = deep(norm)
    model[-2].p = 0.0
    found = landscape(model, (x, y), nn.CrossEntropyLoss(), learning_rate=0.5, factors=(1.0, 2.0), layers=3)

    def gradient(other):
        other.zero_grad()
        loss = nn.CrossEntropyLoss()(other(x), y)
        loss.backward()
        return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in other.named_parameters()}

    _, g = gradient(copy.deepcopy(model))
    flat = torch.cat([part.flatten() for part in g.values()])
    for factor, after, change in zip((1.0, 2.0), found.losses, found.gradient_changes, strict=True):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter -= 0.5 * factor * g[name]
        loss, there = gradient(moved)
        assert after == pytest.approx(loss, rel=1e-6)
        assert change == pytest.approx(
            float((torch.cat([part.flatten() for part in there.values()]) - flat).norm()), rel=1e-5
        )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [shift.layer for shift in found.shifts] == [linears[1], linears[3], linears[4]]
    for shift in found.shifts:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if int(name.split(".")[0]) < int(shift.layer):
                    parameter -= 0.5 * g[name]
        _, there = gradient(moved)
        here, there = (
            torch.cat([part[f"{shift.layer}.{name}"].flatten() for name in ("weight", "bias")]) for part in (g, there)
        )
        assert shift.gradient_norm == pytest.approx(float(here.norm()), rel=1e-5)
        assert shift.distance == pytest.approx(float((here - there).norm()), rel=1e-4)
        assert shift.cosine == pytest.approx(float(torch.cosine_similarity(here, there, dim=0)), rel=1e-5)


def everything(model):
    return {
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "objects": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "pointers": [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_model_is_left_exactly_as_it_was(training):
    model, batch = deep()
    model.train(training)
    model[3].eval()
    model[2].training = not training
    model[0].weight.grad = torch.ones_like(model[0].weight)  # others have None
    model[6].weight.requires_grad_(False)
    before = everything(model)
    found = landscape(model, batch, nn.CrossEntropyLoss(), learning_rate=0.7)
    assert_same(before, everything(model))
    assert len(set(found.losses)) == 4


def test_the_model_is_left_as_it_was_where_a_pass_fails():
    model, batch = deep()
    before = everything(model)
    calls = []

    def failing(output, targets):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no more")
        return nn.functional.cross_entropy(output, targets)

    with pytest.raises(RuntimeError, match="no more"):
        landscape(model, batch, failing, learning_rate=0.7)
    assert_same(before, everything(model))


def test_a_graph_that_waits_for_its_backward_pass_still_has_it():
    for training in (True, False):
        model, (x, y) = deep()
        model.train(training)
        twin = copy.deepcopy(model)
        torch.manual_seed(5)
        loss = nn.functional.cross_entropy(model(x), y)
        landscape(model, (x, y), nn.CrossEntropyLoss(), learning_rate=0.7)
        loss.backward()
        torch.manual_seed(5)
        nn.functional.cross_entropy(twin(x), y).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_the_cost_is_what_is_said(monkeypatch):
    model, batch = deep()
    forwards, backwards = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: [backwards.append(1), grad(*args, **kwargs)][1])
    for factors, layers, cost in (((0.5, 1.0, 2.0, 4.0), 4, 9), ((1.0,), 0, 2), ((), ("13",), 2), ((1.0, 2.0), 99, 7)):
        forwards.clear()
        backwards.clear()
        found = landscape(model, batch, nn.CrossEntropyLoss(), learning_rate=0.1, factors=factors, layers=layers)
        assert (found.forwards, found.backwards) == (cost, cost) == (len(forwards), len(backwards))


class Moody(nn.Module):
    """Its output depends on a counter that it assigns anew, and on chance."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.inner(x) * self.calls + torch.rand(2)


def test_the_loss_is_a_function_of_the_parameters_alone():
    model, batch = Moody(), (torch.randn(5, 3), torch.randn(5, 2))
    before = everything(model)
    found = landscape(model, batch, MSE, learning_rate=1e-30, layers=0)
    assert found.losses == (found.loss,) * 4
    assert found.gradient_changes == (0.0,) * 4
    assert found.smoothness is None  # no step moved anything
    assert_same(before, everything(model))


def test_batches_of_every_kind():
    torch.manual_seed(0)
    x, y = torch.randn(10, 4), torch.randn(10, 1)
    model = nn.Linear(4, 1)
    plain = landscape(model, (x, y), MSE, learning_rate=0.1)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, values, targets):
            return MSE(self.inner(values), targets)

    named = landscape(Named(), {"values": x, "targets": y}, lambda loss, _: loss, learning_rate=0.1)
    assert named == plain
    own = landscape(
        model,
        {"x": x, "y": y},
        lambda output, batch: MSE(output, batch["y"]),
        learning_rate=0.1,
        forward_fn=lambda net, batch: net(batch["x"]),
    )
    assert own == plain
    assert landscape(model, x, lambda output, batch: MSE(output, y + 0 * batch.sum()), learning_rate=0.1) == plain
    with torch.no_grad():
        assert landscape(model, [x, y], MSE, learning_rate=0.1) == plain


class Odd(nn.Module):
    """Layers called out of their order, one of them parametrized, one shared, one only read, one never called."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(6))
        self.last = nn.Linear(6, 2)
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.again = self.first
        self.read = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(torch.tanh(nn.functional.linear(self.again(self.first(x + self.token)), self.read.weight)))


def test_layers_are_ordered_by_their_first_call():
    torch.manual_seed(0)
    model, batch = Odd(), (torch.randn(10, 6), torch.randn(10, 2))
    before = everything(model)
    found = landscape(model, batch, MSE, learning_rate=0.5, layers=["last", "first", "last"])
    assert [shift.layer for shift in found.shifts] == ["first", "last"]
    assert all(shift.distance > 0 for shift in found.shifts)
    assert_same(before, everything(model))
    # The token and what is only read are the root's, which is called first of all.
    first = landscape(model, batch, MSE, learning_rate=0.5, layers=[""])
    assert first.shifts[0].distance == 0.0
    assert first.shifts[0].cosine == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"with parameters of their own \('', 'first', 'last'\), got 'never'"):
        landscape(model, batch, MSE, learning_rate=0.5, layers=["never"])


def test_a_step_that_blows_up_is_infinite():
    model, batch = linear()
    found = landscape(model, batch, lambda out, y: (out - y).exp().mean(), learning_rate=1e3, factors=(1e-6, 1.0))
    assert math.isfinite(found.losses[0])
    assert found.loss_range == (found.losses[0], math.inf)
    assert found.gradient_range[1] == math.inf
    assert found.smoothness == math.inf


def test_half_precision_sparse_and_complex_parameters():
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 3, sparse=True)
    dense = copy.deepcopy(embedding)
    dense.sparse = False
    batch = (torch.tensor([1, 2, 2, 5]), torch.randn(4, 3))
    assert landscape(embedding, batch, MSE, learning_rate=0.1) == landscape(dense, batch, MSE, learning_rate=0.1)
    half, (x, y) = linear()
    full = landscape(half.float(), (x.float(), y.float()), MSE, learning_rate=0.01)
    found = landscape(half.bfloat16(), (x.bfloat16(), y.bfloat16()), MSE, learning_rate=0.01)
    assert found.gradient_norm == pytest.approx(full.gradient_norm, rel=0.05)
    complex_ = nn.Linear(4, 1, dtype=torch.complex64)
    found = landscape(complex_, x.to(torch.complex64), lambda out, _: out.abs().square().mean(), learning_rate=1e-3)
    assert found.losses[0] < found.loss


def test_the_parallel_wrapper_and_the_compiler_are_left_aside():
    model, batch = deep()
    plain = landscape(model, batch, nn.CrossEntropyLoss(), learning_rate=0.1)
    compiled = torch.compile(model, backend="eager")
    assert landscape(compiled, batch, nn.CrossEntropyLoss(), learning_rate=0.1) == plain
    assert landscape(nn.DataParallel(model), batch, nn.CrossEntropyLoss(), learning_rate=0.1) == plain


def test_flat_numbers():
    model, batch = deep()
    numbers = landscape(model, batch, nn.CrossEntropyLoss(), learning_rate=0.1, layers=["13"]).to_dict()
    assert list(numbers) == [
        "loss",
        "gradient_norm",
        "loss_min",
        "loss_max",
        "gradient_change_min",
        "gradient_change_max",
        "smoothness",
        "forwards",
        "backwards",
        "shift/13/gradient_norm",
        "shift/13/distance",
        "shift/13/cosine",
    ]
    assert all(isinstance(value, float | int) for value in numbers.values())


def test_our_layers_and_torchs_show_the_same():
    ours, batch = deep()
    for place, module in enumerate(ours):
        if isinstance(module, nn.BatchNorm1d):
            ours[place] = bn.nn.BatchNorm1d(8)
            ours[place].load_state_dict(module.state_dict())
    theirs, _ = deep()
    first, second = (landscape(model, batch, nn.CrossEntropyLoss(), learning_rate=0.1) for model in (ours, theirs))
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-5)
    np.testing.assert_allclose(first.gradient_changes, second.gradient_changes, rtol=1e-3)


def test_refusals():
    model, (x, y) = linear()
    look = {"learning_rate": 0.1}
    with pytest.raises(InputError, match="expected learning_rate to be a positive, finite number, got 0"):
        landscape(model, (x, y), MSE, learning_rate=0)
    with pytest.raises(InputError, match=r"expected learning_rate to be a positive, finite number, got '0\.1'"):
        landscape(model, (x, y), MSE, learning_rate="0.1")
    with pytest.raises(InputError, match="expected factors to be a positive, finite number, got -1"):
        landscape(model, (x, y), MSE, learning_rate=0.1, factors=(1.0, -1))
    with pytest.raises(InputError, match="expected layers to be names or how many, 0 or more, got -1"):
        landscape(model, (x, y), MSE, layers=-1, **look)
    with pytest.raises(InputError, match=r"expected loss_fn to give a scalar tensor, got a tensor of shape \(30, 1\)"):
        landscape(model, (x, y), lambda out, target: out - target, **look)
    with pytest.raises(InputError, match="expected loss_fn to give a scalar tensor, got float"):
        landscape(model, (x, y), lambda out, target: 1.0, **look)  # noqa: ARG005
    with pytest.raises(InputError, match="expected a loss that depends on the model's parameters"):
        landscape(model, (x, y), lambda out, target: target.sum(), **look)  # noqa: ARG005
    with pytest.raises(InputError, match="got none: is all of it frozen"):
        landscape(model.requires_grad_(False), (x, y), MSE, **look)


def test_an_empty_walk_has_no_range():
    found = Landscape(1.0, 1.0, (), (), (), (), (), 1, 1)
    assert found.smoothness is None
    assert found.loss_range == (math.inf, math.inf)


def test_a_watch_can_tell_a_probes_passes():
    model, batch = deep()
    told = []
    model.register_forward_pre_hook(lambda *_: told.append(probing()))
    landscape(model, batch, nn.CrossEntropyLoss(), learning_rate=0.1, layers=0)
    model(batch[0])
    assert told == [True] * 5 + [False]
