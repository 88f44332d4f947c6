"""The training loop against one written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.study import training

DATA = (torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2)


def linear():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3) / 10)
        model.bias.zero_()
    return model


def test_steps_are_plain_sgd():
    model, seen = linear(), []
    ended = training.train(
        model, DATA, lr=0.5, steps=3, batch=50, seed=0, at={0, 2}, watch=lambda step, _: bool(seen.append(step))
    )
    weight = linear().weight.detach().double()
    bias = torch.zeros(2, dtype=torch.float64)
    x, onehot = DATA[0].double(), nn.functional.one_hot(DATA[1], 2).double()
    for _ in range(3):
        wrong = torch.softmax(x @ weight.t() + bias, 1) - onehot
        weight, bias = weight - 0.5 * wrong.t() @ x / 50, bias - 0.5 * wrong.mean(0)
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias.detach().double(), bias, rtol=1e-5, atol=1e-6)
    assert seen == [0, 2, 3]  # the last step is always looked at
    assert (ended.steps, ended.diverged) == (3, False)
    assert ended.step_seconds > 0


def test_whoever_watches_can_stop_it():
    model = linear()
    ended = training.train(
        model, DATA, lr=0.5, steps=9, batch=10, seed=0, at=range(10), watch=lambda step, _: step == 4
    )
    assert ended.steps == 4


def test_divergence_ends_a_run():
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    ended = training.train(model, DATA, lr=1.0, steps=9, batch=10, seed=0, at={2}, watch=lambda *_: False)
    assert (ended.steps, ended.diverged) == (2, True)


def test_an_epoch_takes_each_sample_once_in_an_order_of_its_seed():
    numbered = (torch.arange(50.0)[:, None], torch.arange(50))
    first = [
        label
        for (_, labels), _ in zip(training.batches(numbered, 10, 1), range(5), strict=False)
        for label in labels.tolist()
    ]
    again = [
        label
        for (_, labels), _ in zip(training.batches(numbered, 10, 1), range(5), strict=False)
        for label in labels.tolist()
    ]
    other = [
        label
        for (_, labels), _ in zip(training.batches(numbered, 10, 2), range(5), strict=False)
        for label in labels.tolist()
    ]
    assert sorted(first) == list(range(50))
    assert first == again
    assert first != other
    sizes = [len(labels) for (_, labels), _ in zip(training.batches(numbered, 15, 1), range(6), strict=False)]
    assert sizes == [15] * 6  # the five left over are not a batch


def test_accuracy_is_measured_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.9))
    data = (torch.tensor([[2.0, 1.0], [1.0, 3.0], [5.0, 1.0], [1.0, 2.0]]), torch.tensor([0, 1, 0, 0]))
    assert training.accuracy(model, data) == 0.75
    assert model.training
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("total", "expected"),
    [(7, {0, 2, 4, 6, 7}), (30, {0, 2, 4, 6, 8, 10, 20, 30}), (34, {0, 2, 4, 6, 8, 10, 20, 30, 34})],
)
def test_evaluations_get_sparse(total, expected):
    assert training.evaluation_steps(total, fine_until=10) == expected


def test_batches_of_one_class_hold_each_sample_of_it_at_most_once_an_epoch():
    numbered = (torch.arange(50.0)[:, None], torch.arange(50) % 3)  # 17, 17 and 16 samples
    sampler = training.batches_of_one_class(numbered, 8, 1)
    epochs = [[next(sampler) for _ in range(6)] for _ in range(2)]
    for epoch in epochs:
        assert all(len(labels) == 8 and len(labels.unique()) == 1 for _, labels in epoch)
        assert sorted(int(labels[0]) for _, labels in epoch) == [0, 0, 1, 1, 2, 2]
        taken = torch.cat([features.flatten() for features, _ in epoch])
        assert len(taken.unique()) == 48
        assert all(torch.equal(features.flatten().long() % 3, labels) for features, labels in epoch)
    orders = [[int(labels[0]) for _, labels in epoch] for epoch in epochs]
    assert orders[0] != sorted(orders[0])  # not one class after the other
    again = training.batches_of_one_class(numbered, 8, 1)
    assert torch.equal(next(again)[0], epochs[0][0][0])
    # A class smaller than a batch is taken whole, not lost.
    whole = training.batches_of_one_class(numbered, 40, 1)
    assert sorted(len(next(whole)[1]) for _ in range(3)) == [16, 17, 17]


def test_a_run_can_be_trained_on_batches_of_one_class():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            seen.append(x)
            return self.inner(x)

    training.train(
        Spy(), DATA, lr=0.1, steps=4, batch=20, seed=0, at=frozenset(), watch=lambda *_: False, order="one-class"
    )
    expected = training.batches_of_one_class(DATA, 20, 0)
    assert all(torch.equal(x, next(expected)[0]) for x in seen)
    assert len(seen) == 4
