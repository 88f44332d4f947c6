"""What is not folded at all, with the reason; and that the model is then as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from surgery.test_fold_algebra import learned

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), learned(nn.BatchNorm2d(4)), nn.ReLU()).eval()


def refused(model, match, example=IMAGE, **options):
    state = model.state_dict()
    before = {k: v.clone() for k, v in state.items() if not (v.is_meta or nn.parameter.is_lazy(v))}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(bn.SurgeryError, match=match):
        bn.fold(model, example, **options)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(model.state_dict()[key].nan_to_num(7), value.nan_to_num(7)) for key, value in before.items())


def test_training_mode():
    model = net()
    model[1].train()
    refused(model, r"expected batch norms in eval mode, got 1 \(BatchNorm2d\) in training: call model.eval\(\)")


def test_no_running_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    refused(model, r"with running statistics, got 1 \(BatchNorm2d\) without, which normalizes by its batch in eval too")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["running_mean", "running_var", "weight", "bias"])
def test_numbers_that_are_none(key, value):
    model = net()
    with torch.no_grad():
        getattr(model[1], key)[2] = value
    refused(model, rf"expected finite numbers, got NaN or infinity in {key} of 1 \(BatchNorm2d\)")


def test_variances_that_are_none():
    model = net()
    model[1].running_var[1] = -0.5
    refused(model, r"expected running variances of 0 or more, got -0.5 in 1 \(BatchNorm2d\)")
    model[1].running_var[1] = 0
    model[1].eps = 0.0
    refused(model, r"expected a positive variance \+ eps, got 0 in 1 \(BatchNorm2d\): its output is infinite")


def test_models_without_numbers():
    refused(
        nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval(), "got 0.weight without: run a batch through first"
    )
    with torch.device("meta"):
        model = net()
    refused(model, "expected a model with numbers, got 0.weight on the meta device: load its weights first")


def test_examples_that_do_not_fit():
    refused(net(), "expected an example that the model takes, got RuntimeError: ", torch.randn(2, 5, 8, 8))
    refused(net(), "expected an example to fold a model, got None", None)
    refused(net(), "a model that gives tensors, got none to compare", forward_fn=lambda model, x: model(x).shape[0])


def test_a_forward_that_is_random():
    model = nn.Sequential(net(), nn.Dropout(0.5)).eval()
    model[1].train()
    refused(model, r"expected a forward that gives the same twice, .* it is random .*, call model.eval\(\)")


def test_a_model_that_cannot_be_copied():
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    model(IMAGE)
    with pytest.raises(
        bn.SurgeryError, match=r"expected a model that can be copied, got RuntimeError: .* remove weight nor"
    ):
        bn.fold(model, IMAGE)


def test_strict_names_what_would_be_left():
    model = nn.Sequential(nn.ReLU(), learned(nn.BatchNorm2d(3)), nn.ReLU()).eval()
    refused(
        model, "expected to fold all 1 batch norms, 1 would be left: 1: BatchNorm2d left: its input comes", strict=True
    )


def test_bad_tolerances_and_script_modules():
    with pytest.raises(bn.InputError, match="rtol must be a finite number and not negative, got -1"):
        bn.fold(net(), IMAGE, rtol=-1)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(net())
    with pytest.raises(bn.InputError, match="a ScriptModule"):
        bn.fold(scripted, IMAGE)


class Hidden(nn.Module):
    """Reads its layer's output where no recorder sees it, or its batch norm in ways of its own."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.act, self.way = nn.Conv2d(3, 4, 3), learned(nn.BatchNorm2d(4)), nn.ReLU(), way
        self.peek = {}

    def forward(self, x):
        if self.way == "attribute":
            return self.norm(self.conv(x)) / self.norm.num_features
        if self.way == "data":
            y = self.conv(x)
            known = float(x.sum()) == self.peek.setdefault("sum", float(x.sum()))
            return self.norm(y) if known else self.norm(y) + y
        y = self.act(self.norm(self.conv(x)))
        with torch._C.DisableTorchFunction():
            return y * self.conv.weight.sum()


def test_what_the_wiring_cannot_see_is_found_by_the_outputs():
    refused(
        Hidden("weight").eval(), r"folding changes the model: on the example outputs differ by .* first at the output"
    )


def test_a_branch_on_data_is_found_by_noise():
    model = Hidden("data").eval()
    refused(model, "folding changes the model: on the example with noise outputs differ by .*, more than rtol=0.0001")


def test_a_forward_that_uses_the_batch_norm_as_such():
    refused(
        Hidden("attribute").eval(), "the folded model does not run, AttributeError: .* uses the batch norms in ways"
    )


def test_the_first_layer_is_named(monkeypatch):
    from batchnorm.surgery.folding import plan

    original = plan.scale_outputs
    monkeypatch.setattr(
        plan, "scale_outputs", lambda taker, scale, shift: original(taker, scale * (1 + (taker.name == "1.0")), shift)
    )
    model = nn.Sequential(net(), nn.Sequential(nn.Conv2d(4, 4, 3), learned(nn.BatchNorm2d(4)), nn.ReLU())).eval()
    refused(model, r"folding changes the model: on the example outputs differ by .*, first at 1.1")


def test_rounding_of_the_model_itself_is_told():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.fill_(1e6)
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.bias.fill_(1e6)
    refused(
        nn.Sequential(conv, norm).eval(), r"of the model as it was, rounding makes .*; pass a larger rtol", rtol=1e-6
    )


def test_infinite_outputs_must_be_in_the_same_places():
    class Masked(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            y = self.network(x)
            return torch.where(x[:, :1, :6, :6] > 0, y, -torch.inf)

    bn.fold(Masked(net()).eval(), IMAGE, strict=True)
    overflowing = nn.Sequential(net(), nn.Threshold(-1.0, 0.0)).eval()
    with torch.no_grad():
        overflowing[0][0].weight.fill_(float("nan"))
    with pytest.raises(bn.SurgeryError, match="expected finite outputs on the example, got a tensor of NaN or inf"):
        bn.fold(overflowing, IMAGE)
