"""A recalibration that fails, or is refused, leaves everything as it was, and says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from surgery.population_samples import assert_same_state, convolutional, images, norms, state


class Stop(BaseException):
    """As KeyboardInterrupt, which the tests' runner would take for its own."""


@pytest.mark.parametrize("method", ["batch", "sequential"])
@pytest.mark.parametrize("where", ["model", "forward_fn", "loader", "interrupt", "progress", "layer"])
def test_whatever_happens_everything_is_as_it_was(where, method):
    net = convolutional().train()
    net[5].eval()
    before = state(net)
    batches, calls = images().split(10), []

    class Loader:
        def __iter__(self):
            for index, batch in enumerate(batches):
                torch.rand(3)
                if index == 2 and where in ("loader", "interrupt"):
                    raise (Stop if where == "interrupt" else OSError)("it broke")
                yield batch

    def forward_fn(model, batch):
        calls.append(batch)
        model.train()
        if len(calls) == 3 and where == "forward_fn":
            raise OSError("it broke")
        if len(calls) == 3 and where == "layer":
            return model(batch[:, :2])
        return model(batch)

    def progress(done, _):
        if where == "progress" and done == 2:
            raise OSError("it broke")

    def fails(*_):
        calls.append(None)
        if len(calls) == 3:
            raise OSError("it broke")

    hook = net[8].register_forward_hook(fails) if where == "model" else None
    before["hooks"] = state(net)["hooks"]
    expected = {"interrupt": Stop, "layer": RuntimeError}.get(where, OSError)
    with pytest.raises(expected, match="channels" if where == "layer" else "it broke"):
        bn.recalibrate(
            net,
            Loader(),
            forward_fn if where in ("forward_fn", "layer") else None,
            method=method,
            progress=progress,
        )
    assert_same_state(net, before)
    assert not bn.changes(net)
    if hook is not None:
        hook.remove()
    bn.recalibrate(net, batches, method=method)  # nothing stands in the way afterwards


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 3, 20])
def test_values_that_are_not_finite_name_the_first_layer_and_the_batch(value, at):
    net = convolutional().train()
    before = state(net)
    batches = [b.clone() for b in images(105).split(5)]
    batches[at][2, 1, 3, 3] = value
    with pytest.raises(bn.SurgeryError, match=rf"'1': expected finite values, got NaN or infinity in batch {at} "):
        bn.recalibrate(net, batches)
    assert_same_state(net, before)


def test_a_layer_in_the_middle_that_spoils_its_input():
    net = convolutional()
    net[4].weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(bn.SurgeryError, match=r"'5': expected finite values, got NaN or infinity in batch 0 "):
        bn.recalibrate(net, images(200).split(5))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batches": []}, "expected at least one batch, got none"),
        ({"batches": iter(())}, "expected at least one batch, got none"),
        ({"batches": [], "method": "sequential"}, "expected at least one batch, got none"),
        ({"num_batches": 0}, "expected num_batches of 1 or more, got 0"),
        ({"until": 0.0}, "expected until, a tolerance in standard deviations, above 0, got 0.0"),
        ({"until": float("nan")}, "expected until, .* above 0, got nan"),
        ({"method": "precise"}, "method"),
        ({"method": "sequential", "batches": iter(images().split(20))}, "read several times .* got an iterator"),
        ({"layers": "nowhere"}, "nowhere"),
        ({"batches": images()}, "expected batches to iterate over, got one Tensor: give a list of batches"),
        ({"batches": {"x": images()}}, "expected batches to iterate over, got one dict"),
        ({"batches": convolutional()}, "expected batches to iterate over, got one Sequential"),
        ({"batches": 3}, "expected batches to iterate over, got int"),
        ({"progress": True}, "expected progress to be a function of the batches done and of all, got True"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments(arguments, text):
    net = convolutional().train()
    before = state(net)
    with pytest.raises(bn.InputError, match=text):
        bn.recalibrate(net, **{"batches": images().split(20), **arguments})
    assert_same_state(net, before)


def test_models_without_statistics_to_move():
    for net in (nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), bn.nn.FrozenBatchNorm1d(3)):
        with pytest.raises(bn.InputError, match="expected batch norms whose running statistics move, got"):
            bn.recalibrate(net, [torch.randn(5, 3)])


def test_what_lets_the_statistics_of_frozen_layers_move():
    model, batches = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), [torch.randn(5, 3)]
    bn.freeze(model)
    with pytest.raises(bn.InputError, match=r"got 1 without \(1 frozen: bn.unfreeze\(model\) lets them move\)"):
        bn.recalibrate(model, batches)
    bn.recalibrate(bn.unfreeze(model), batches)
    bn.convert(model, "frozen")
    with pytest.raises(
        bn.InputError, match=r'got 0 without \(1 constant by .*: bn.convert\(model, to="torch", layers="\*"'
    ):
        bn.recalibrate(model, batches)
    bn.recalibrate(bn.convert(model, to="torch", layers="*"), batches)


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d(), nn.BatchNorm1d(3, device="meta")], ids=["lazy", "meta"])
def test_layers_without_values(layer):
    with pytest.raises(bn.SurgeryError, match="'1': expected a layer with values, got one without yet"):
        bn.recalibrate(nn.Sequential(nn.BatchNorm1d(3), layer), [torch.randn(5, 3)])


def test_a_single_value_a_channel():
    layer, x = nn.BatchNorm1d(3), torch.randn(6, 3)
    before = state(layer)
    with pytest.raises(bn.SurgeryError, match=r"'': expected more than one value a channel in the first batch, got 1"):
        bn.recalibrate(layer, [x[:1]])
    with pytest.raises(bn.SurgeryError, match="in the first batch, got 1: put a larger batch first"):
        bn.recalibrate(layer, x.split([1, 5]))
    masked = bn.nn.BatchNorm1d(3)
    nothing = torch.zeros(4, dtype=torch.bool)
    with pytest.warns(RuntimeWarning, match="no batch reached"):
        bn.recalibrate(masked, [x[:4]], lambda m, b: m(b, mask=nothing))
    assert_same_state(layer, before)


def test_a_foreign_layout_is_refused():
    class ChannelsLast(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    net, x = nn.Sequential(nn.Identity(), ChannelsLast(3)), torch.randn(6, 5, 3)
    before = state(net)
    with pytest.raises(bn.SurgeryError, match=r"'1': expected an input of shape \(N, 3, \*\), got \[6, 5, 3\]"):
        bn.recalibrate(net, [x])
    assert_same_state(net, before)


def test_a_batch_norm_without_a_variance_is_refused_by_its_name():
    class Odd(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(3)
            del self._buffers["running_var"]

    with pytest.raises(
        bn.SurgeryError, match="'0': expected a batch norm with a running_var, got Odd with running_mean"
    ):
        bn.recalibrate(nn.Sequential(Odd()), [torch.randn(6, 3)])


def test_a_variance_beyond_the_buffers_dtype():
    layer = nn.BatchNorm1d(3).half()
    before = state(layer)
    with pytest.raises(bn.SurgeryError, match=r"within the range of torch.float16, got up to .*: keep its buffers in"):
        bn.recalibrate(layer, [torch.tensor([[1e3] * 3, [-1e3] * 3], dtype=torch.float16)])
    assert_same_state(layer, before)


def test_other_buffers_are_not_touched():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.norm(x)

    net = Counting()
    bn.recalibrate(net, torch.randn(20, 3).split(6))
    assert net.calls == 0
    assert norms(net)["norm"].num_batches_tracked == 4
