"""How a model is run on somebody's batches, without a trace."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from batchnorm.probes.feeding import arguments, feed, on_device, size_of, undisturbed


class Sum(nn.Module):
    def forward(self, a, b=0.0):
        return a + b


ONE, TWO = torch.ones(3), torch.full((3,), 2.0)
Named = namedtuple("Named", ["a", "b"])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (ONE, ONE),
        ((ONE, TWO), ONE),  # inputs and targets
        ([ONE, TWO], ONE),
        ({"a": ONE, "b": TWO}, ONE + TWO),
        (({"a": ONE, "b": TWO}, TWO), ONE + TWO),
        (((ONE, TWO), ONE), ONE + TWO),
        ([ONE], ONE),
    ],
    ids=["tensor", "tuple", "list", "mapping", "mapping-and-targets", "several-inputs", "list-of-one"],
)
def test_what_a_batch_means(batch, expected):
    assert torch.equal(feed(Sum(), batch), expected)


def test_a_named_tuple_is_one_argument():
    assert arguments(Named(ONE, TWO)) == ((Named(ONE, TWO),), {})


def test_a_forward_of_one_s_own():
    assert feed(Sum(), {"image": ONE}, lambda model, batch: model(batch["image"], b=1)).tolist() == [2, 2, 2]


def test_sizes_and_devices():
    assert size_of({"text": "abc", "x": torch.ones(5, 2)}) == 5
    assert size_of(["abc", torch.tensor(1.0)]) is None
    moved = on_device({"x": ONE, "n": 3}, torch.device("meta"))
    assert moved["x"] is ONE
    assert on_device([ONE], torch.device("cpu"))[0] is ONE


class Careless(nn.Module):
    """Its forward writes to buffers, replaces one, and draws numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("last", torch.zeros(3))
        self.norm.eval()

    def forward(self, x):
        self.last = self.norm(x).mean(0) + torch.rand(3)
        return self.last


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left_behind(training, fails):
    model, x = Careless(), torch.randn(4, 3)
    held, values = model.last, {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def run():
        with undisturbed(model, training) as same:
            assert same is model
            assert model.norm.training is bool(training)
            assert not model(x).requires_grad
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert model.last is held
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_buffer_that_a_forward_enlarged_is_as_small_as_before():
    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("low", torch.tensor([]))

        def forward(self, x):
            self.low.resize_(x.size(1)).copy_(x.amin(0))
            return x

    model = Observer()
    with undisturbed(model):
        model(torch.randn(4, 3))
    assert model.low.shape == (0,)


def test_a_script_is_left_as_it_was():
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with undisturbed(model, training=True):
        model(torch.randn(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_packed_sequence_moves_with_its_batch_sizes_left_on_the_cpu():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    moved = on_device({"x": packed, "y": (packed, torch.zeros(2))}, torch.device("cpu"))
    assert moved["x"] is packed
    assert moved["y"][0] is packed

    class Elsewhere(nn.utils.rnn.PackedSequence):
        def to(self, device):
            return f"on {device}"

    there = on_device([Elsewhere(*packed)], torch.device("cuda", 0))
    assert there == ["on cuda:0"]
