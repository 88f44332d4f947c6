"""What feeds what: recorded on an example, and read without one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

import batchnorm as bn
from batchnorm.probes.wiring import OUTSIDE, Made, function_name, trace
from oracles.model_zoo import ARCHITECTURES, image, timm_model


class Block(nn.Module):
    """A residual block that takes its turns in Python."""

    def __init__(self, channels=4, branch=False):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.branch = branch

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.branch and x.sum() > -1e9:  # control flow on data: torch.fx cannot read it
            y = functional.relu_(y)
        return torch.cat([y, x], 1)


def edges(wiring):
    """Who reads whom, by label."""
    return {(wiring.steps[i].label if i != OUTSIDE else "", step.label) for step in wiring.steps for i in step.inputs}


def test_a_recorded_run_has_the_true_order_and_every_user():
    wiring = trace(Block(branch=True), torch.randn(2, 4, 5, 5))
    assert wiring.exact
    assert wiring.whole
    assert [s.label for s in wiring.steps if s.label in ("conv", "norm", "relu_", "cat")] == [
        "conv",
        "norm",
        "relu_",
        "cat",
    ]
    assert {("", "conv"), ("conv", "norm"), ("norm", "relu_"), ("relu_", "cat"), ("", "cat")} <= edges(wiring)
    conv, norm = (next(s for s in wiring.steps if s.label == name) for name in ("conv", "norm"))
    assert wiring.sole_user(conv) is norm
    assert wiring.source(norm) is conv
    assert norm.output_shape == (2, 4, 5, 5)
    assert next(s for s in wiring.steps if s.label == "relu_").in_place
    assert wiring.outputs == {wiring.steps[-1].index}


def test_a_second_user_outside_of_modules_is_seen():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.fc(x)
            return self.norm(y) + y.mean()

    for example in (torch.randn(4, 3), None):
        wiring = trace(Twice(), example)
        (fc,) = (s for s in wiring.steps if s.name == "fc")
        assert wiring.sole_user(fc) is None
        assert {user.label for user in wiring.users(fc)} == {"norm", "mean"}


def test_writing_through_a_view_counts_as_writing():
    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.fc(x)
            y[:, :1] += 1
            return self.norm(y)

    wiring = trace(Writer(), torch.randn(4, 3))
    (fc,) = (s for s in wiring.steps if s.name == "fc")
    (norm,) = (s for s in wiring.steps if s.name == "norm")
    assert wiring.source(norm) is not fc
    assert wiring.source(norm).in_place


def test_parameters_that_a_function_reads_have_their_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return functional.linear(self.fc(x), self.fc.weight)

    (last,) = (s for s in trace(Tied(), torch.randn(2, 3)).steps if s.module is None and s.label == "linear")
    assert last.reads == ("fc.weight",)


def test_reading_a_shape_is_no_reading_of_values():
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.fc(x)
            return self.norm(y.flatten(0, 1)).reshape_as(y) + torch.zeros_like(y)

    wiring = trace(Shaped(), torch.randn(4, 2, 3))
    (fc,) = (s for s in wiring.steps if s.name == "fc")
    assert wiring.sole_user(fc).label == "flatten"


def test_reading_values_into_python_is_a_use():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.fc(x)
            return self.norm(y) if y.tolist()[0][0] < 1e9 else y

    wiring = trace(Peeking(), torch.randn(4, 3))
    (fc,) = (s for s in wiring.steps if s.name == "fc")
    assert [user.label for user in wiring.users(fc)] == ["tolist", "norm"]


def test_outputs_in_a_dataclass_are_outputs():
    @dataclass
    class Output:
        logits: torch.Tensor
        hidden: list

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.fc(x)
            return Output(self.norm(y), [y])

    wiring = trace(Model(), torch.randn(4, 3))
    assert {wiring.steps[index].label for index in wiring.outputs} == {"fc", "norm"}


def test_what_passes_its_input_on_is_known_and_so_are_arguments():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3, 3)

        def forward(self, x):
            y = functional.dropout(self.drop(self.fc(x)), 0.5, self.training)
            return y.transpose(0, 1)

    wiring = trace(Model().train(), torch.randn(4, 3))
    assert [(s.label, s.passes) for s in wiring.steps] == [
        ("fc", False),
        ("drop", True),
        ("dropout", True),
        ("transpose", False),
    ]
    assert wiring.steps[-1].arguments == ((Made(2), 0, 1), {})
    assert wiring.steps[0].arguments == ((Made(OUTSIDE),), {})


def test_nothing_is_left_behind():
    model = nn.Sequential(Block(), nn.Dropout(0.5), nn.BatchNorm2d(8)).train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example = torch.randn(2, 4, 5, 5)
    state = torch.get_rng_state()
    trace(model, example)
    trace(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [True, False, False, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_gone_after_a_failure():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(4))
    with pytest.raises(RuntimeError):
        trace(model, torch.randn(2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_an_example_the_parts_that_can_be_read_are():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block(branch=True), nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    )
    wiring = trace(model)
    assert not wiring.exact
    assert not wiring.whole
    assert {("0", "1"), ("3.0", "3.1")} <= edges(wiring)
    inner = next(s for s in wiring.steps if s.name == "2.conv")
    assert wiring.sole_user(inner) is None  # its users are not known


def test_reading_runs_no_code_on_the_model_itself():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls.add_(1)
            self.last = self.fc(x)
            return self.last

    model = Counter()
    trace(model)
    assert model.last is None
    assert model.calls == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_looked_through(wrap):
    names = [s.name for s in trace(wrap(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), torch.randn(2, 3)).steps]
    prefix = "module." if wrap is nn.DataParallel else "_orig_mod."
    assert names == [f"{prefix}0", f"{prefix}1"]


def test_a_script_module_is_refused():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(bn.InputError, match="expected a model in Python, got a ScriptModule"):
        trace(scripted)


def test_arguments_of_functions_are_known_without_an_example_too():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return functional.dropout(self.fc(x), p=0.25, training=self.training)

    for example in (torch.randn(2, 3), None):
        fc, dropout = trace(Dropping(), example).steps
        positional, named = dropout.arguments
        assert positional[0] == Made(fc.index)
        assert named["p"] == 0.25


def test_names_of_functions():
    assert function_name(functional.relu) == function_name(torch.Tensor.relu) == function_name("relu") == "relu"
    assert function_name(torch.ops.aten.relu.default) == "relu"
    assert function_name(torch.Tensor.T.__get__) == "T"


@pytest.mark.parametrize("architecture", ARCHITECTURES[:8], ids=lambda a: a.name)
def test_both_readings_agree_on_batch_norms(architecture):
    model = timm_model(architecture.name).eval()
    found = []
    for wiring in (trace(model, image(architecture)), trace(model)):
        assert wiring.whole
        norms = [s for s in wiring.steps if isinstance(s.module, nn.modules.batchnorm._BatchNorm)]
        found.append({(wiring.source(s).label, s.label, wiring.sole_user(wiring.source(s)) is s) for s in norms})
        assert len(norms) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert found[0] == found[1]


class Packed(nn.Module):
    """A recurrent layer on sequences of several lengths, between two batch norms."""

    def __init__(self):
        super().__init__()
        self.before, self.lstm, self.after = nn.BatchNorm1d(3), nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4)

    def forward(self, x, lengths):
        x = self.before(x).transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.after(y.transpose(1, 2))


def test_a_packed_sequence_is_followed_though_it_cannot_hold_anything_but_tensors():
    wiring = trace(Packed(), {"x": torch.randn(4, 3, 6), "lengths": torch.tensor([6, 2, 5, 3])})
    (lstm,) = [step for step in wiring.steps if step.name == "lstm"]
    assert lstm.arguments is None  # not known
    read = wiring.source(lstm)
    while read.name is None:
        read = wiring.source(read)
    assert read.name == "before"
