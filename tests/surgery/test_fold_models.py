"""What is folded in a model, and what is left for which reason: found in what runs, whatever Python the forward has."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import batchnorm as bn
from surgery.test_fold_algebra import assert_folds, learned


class Model(nn.Module):
    """A model of these layers with this forward: ``forward(self, x)``."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def left_because(model, x, reason):
    """Nothing is folded, and that is why."""
    folded = assert_folds(model, x, expected=0)
    assert reason in str(bn.changes(folded))
    return folded


def conv(inputs=3, outputs=4, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


def norm(channels=4, seed=0):
    return learned(nn.BatchNorm2d(channels), seed)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_residual_network_with_python_control_flow():
    def forward(self, x):
        y = self.first(x)
        for block, bypass in zip(self.blocks, (True, False), strict=True):
            z = block(y)
            y = functional.relu_(z + y) if bypass and z.sum() < 1e9 else z
        return {"logits": y.mean((2, 3)), "features": [y]}

    blocks = nn.ModuleList(nn.Sequential(conv(4, 4, padding=1), norm(4, seed), nn.ReLU(True)) for seed in (1, 2))
    model = Model(forward, first=nn.Sequential(conv(), norm(), nn.ReLU(inplace=True)), blocks=blocks)
    model, x = model.double().eval(), IMAGE.double()
    folded = bn.fold(model, x, rtol=1e-12, strict=True)
    torch.testing.assert_close(folded(x)["features"], model(x)["features"], rtol=1e-10, atol=1e-10)
    assert str(bn.changes(folded)).splitlines()[0] == "first.1: BatchNorm2d folded into first.0 (Conv2d)"
    assert len(bn.changes(model)) == 0


def test_identity_and_dropout_are_no_obstacle():
    assert_folds(nn.Sequential(conv(), nn.Identity(), nn.Dropout2d(0.5), norm()), IMAGE)
    assert_folds(nn.Sequential(norm(3), nn.Dropout(0.5), conv()), IMAGE)


def test_chains():
    assert_folds(nn.Sequential(conv(), norm(4, 0), norm(4, 1), norm(4, 2)), IMAGE, expected=3)
    assert_folds(nn.Sequential(norm(3, 0), norm(3, 1), conv()), IMAGE, expected=2)
    folded = assert_folds(nn.Sequential(nn.ReLU(), norm(3, 0), norm(3, 1), nn.ReLU()), IMAGE, expected=1)
    assert type(folded[1]) is nn.BatchNorm2d
    assert "2: BatchNorm2d folded into 1 (BatchNorm2d)" in str(bn.changes(folded))
    plain = [learned(nn.BatchNorm2d(3, affine=False), seed) for seed in (0, 1)]
    assert_folds(nn.Sequential(nn.ReLU(), *plain, conv(padding=1)), IMAGE, expected=1)
    frozen = learned(bn.nn.FrozenBatchNorm2d(3, affine=False))
    folded = assert_folds(nn.Sequential(nn.ReLU(), frozen, norm(3), nn.ReLU()), IMAGE)
    assert list(folded.parameters()) == []


def test_a_batch_norm_on_both_sides_of_a_layer():
    assert_folds(nn.Sequential(norm(3), conv(), norm(4)), IMAGE, expected=2)


def test_concatenated_layers_each_take_their_part():
    def forward(self, x):
        return self.norm(torch.cat([self.a(x), self.b(x), self.c(x)], 1))

    layers = {"a": conv(3, 4), "b": conv(3, 2, bias=False), "c": conv(3, 6, groups=3)}
    folded = assert_folds(Model(forward, norm=norm(12), **layers), IMAGE)
    assert "norm: BatchNorm2d folded into a (Conv2d), b (Conv2d), c (Conv2d)" in str(bn.changes(folded))
    nested = Model(
        lambda self, x: self.norm(torch.cat([self.a(x), torch.cat([self.b(x), self.c(x)], 1)], 1)),
        norm=norm(12),
        **layers,
    )
    assert_folds(nested, IMAGE)


def test_a_concatenation_with_the_input_is_left():
    model = Model(lambda self, x: self.norm(torch.cat([self.a(x), x], 1)), a=conv(3, 4, 1), norm=norm(7))
    left_because(model, IMAGE, "its input is not from a layer of the model")


def test_along_another_axis_than_channels_is_no_part():
    model = Model(lambda self, x: self.norm(torch.cat([self.a(x), self.a(x)], 2)), a=conv(3, 4), norm=norm(4))
    assert_folds(model, IMAGE)
    twice = Model(lambda self, x: self.norm(torch.cat([self.a(x), self.a(x)], 1)), a=conv(3, 4), norm=norm(8))
    left_because(twice, IMAGE, "have different channels of it")


def test_tensors_may_be_rearranged_in_between():
    x = torch.randn(2, 7, 3)
    assert_folds(Model(lambda s, x: s.n(s.fc(x).transpose(1, 2)), fc=nn.Linear(3, 4), n=learned(nn.BatchNorm1d(4))), x)
    assert_folds(Model(lambda s, x: s.n(s.fc(x).flatten(0, 1)), fc=nn.Linear(3, 4), n=learned(nn.BatchNorm1d(4))), x)
    shuffled = nn.Sequential(conv(3, 8), nn.PixelShuffle(2), norm(2))
    assert_folds(shuffled, IMAGE)
    assert_folds(nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), learned(nn.BatchNorm1d(4))), IMAGE)
    heads = Model(
        lambda s, x: s.n(s.conv(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)[:, :, 1:]), conv=conv(), n=norm()
    )
    assert_folds(heads, IMAGE)
    behind = Model(lambda s, x: s.fc(s.n(x).permute(0, 2, 3, 1)), n=norm(3), fc=nn.Linear(3, 5))
    assert_folds(behind, IMAGE)
    assert_folds(nn.Sequential(norm(3), nn.ReflectionPad2d(1), conv()), IMAGE)


def test_rearrangements_that_mix_channels_or_add_zeros_are_found_out():
    x = torch.randn(2, 4, 3)
    by_position = nn.Sequential(nn.Linear(3, 4), learned(nn.BatchNorm1d(4)))
    left_because(by_position, x, "its channels are along another axis than those of 0 (Linear)")
    left_because(
        nn.Sequential(conv(), nn.Flatten(), learned(nn.BatchNorm1d(144))), IMAGE, "is in several of its channels"
    )
    padded = Model(lambda s, x: s.n(functional.pad(s.conv(x), (1, 1, 1, 1))), conv=conv(), n=norm())
    left_because(padded, IMAGE, "what is between mixes its channels, or adds zeros to them")
    averaged = nn.Sequential(conv(), nn.AvgPool2d(3, padding=1), norm())
    left_because(averaged, IMAGE, "what is between mixes its channels, or adds zeros to them")
    mean = Model(lambda s, x: s.n(s.conv(x).mean(1, keepdim=True)), conv=conv(outputs=5), n=norm(1))
    left_because(mean, IMAGE, "what is between mixes its channels")
    left_because(nn.Sequential(norm(3), nn.ZeroPad2d(1), conv()), IMAGE, "goes to 1, which cannot take it up")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: s.norm(s.conv(x)) + s.conv(x), "conv (Conv2d) is called elsewhere too, without it"),
        (lambda s, x: s.norm(y := s.conv(x)) + y, "conv, before it, is also read by add"),
        (lambda s, x: s.norm(s.conv(x).relu()), "its input comes from relu, which cannot take it up"),
        (lambda s, x: s.norm(s.conv(x).add_(1)), "its input comes from add_, which cannot take it up"),
        (lambda s, x: s.norm(s.conv(x) + s.other(x)), "its input comes from add, which cannot take it up"),
        (lambda s, x: s.norm(functional.conv2d(x, s.other.weight)), "its input comes from conv2d"),
        (lambda s, x: s.norm(y) if (y := s.conv(x)).tolist() else y, "conv, before it, is also read by tolist"),
        (lambda s, x: s.conv(x), "the example did not lead through it"),
        (lambda s, x: s.norm(s.conv(x)) + s.conv.weight.sum(), "cannot take it up: it shares a parameter"),
        (lambda s, x: s.norm(s.conv(x)) + s.norm.running_mean.sum(), "its numbers are also read by a function"),
    ],
)
def test_what_is_read_elsewhere_is_left(forward, reason):
    left_because(Model(forward, conv=conv(), other=conv(), norm=norm()), IMAGE, reason)


def test_a_layer_whose_output_the_model_returns_is_left():
    model = Model(lambda s, x: {"y": s.norm(y := s.conv(x)), "features": [y]}, conv=conv(), norm=norm()).eval()
    folded = bn.fold(model, IMAGE)
    assert "conv, before it, is also read by who runs the model" in str(bn.changes(folded))
    assert torch.equal(folded(IMAGE)["y"], model(IMAGE)["y"])


def test_a_layer_that_is_called_twice_and_a_batch_norm_that_is():
    both = Model(lambda s, x: s.norm(s.conv(x)) * s.norm(s.conv(x.flip(0))), conv=conv(), norm=norm())
    assert_folds(both, IMAGE)
    shared_norm = Model(lambda s, x: s.norm(s.a(x)) * s.norm(s.b(x)), a=conv(), b=conv(), norm=norm())
    folded = assert_folds(shared_norm, IMAGE)
    assert "folded into a (Conv2d), b (Conv2d)" in str(bn.changes(folded))
    shared = norm()
    model = nn.Sequential(conv(), shared, nn.ReLU(), conv(4, 4), shared)
    folded = assert_folds(model, IMAGE)
    assert folded[1] is folded[4]
    two = Model(lambda s, x: s.a(s.conv(x)) * s.b(s.conv(x)), conv=conv(), a=norm(seed=1), b=norm(seed=2))
    left_because(two, IMAGE, "conv (Conv2d) is called elsewhere too, without it")


def test_several_layers_behind_take_it_each():
    model = Model(lambda s, x: s.a(y := s.norm(x)) * s.b(y), norm=norm(3), a=conv(), b=conv(bias=False))
    assert_folds(model, IMAGE)
    model = Model(lambda s, x: s.a(y := s.norm(x)) * s.b(y).relu() * y.mean(), norm=norm(3), a=conv(), b=conv())
    left_because(model, IMAGE, "its output goes to mul")


def test_tied_parametrized_and_hooked_layers_are_left():
    tied = nn.Sequential(nn.Linear(4, 4), learned(nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 4))
    tied[3].weight = tied[0].weight
    left_because(tied, torch.randn(3, 4), "0 (Linear) cannot take it up: it shares a parameter with another module")
    model = nn.Sequential(parametrizations.weight_norm(conv()), norm())
    left_because(model, IMAGE, "first torch.nn.utils.parametrize.remove_parametrizations")
    hooked = nn.Sequential(nn.Sequential(conv()), norm(), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    left_because(hooked, IMAGE, "a hook between 0.0 (Conv2d) and it would see other numbers")
    outer = nn.Sequential(nn.Sequential(conv(), norm()), nn.ReLU())
    outer[0].register_forward_hook(lambda *_: None)
    assert len(assert_folds(outer, IMAGE)[0]._forward_hooks) == 1


class Same(nn.Conv2d):
    """A convolution that pads by itself: linear, but unknown by its class."""

    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


class Cast(nn.Linear):
    """A linear layer that minds its dtype, as timm's."""

    def forward(self, x):
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Standardized(nn.Conv2d):
    """Weight standardization: its weight is not what it multiplies by."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Odd(nn.BatchNorm2d):
    """Not a batch norm's forward."""

    def forward(self, x):
        return super().forward(x).abs()


def test_classes_with_a_forward_of_their_own_are_tried():
    assert_folds(nn.Sequential(Same(3, 4, 3), norm()), IMAGE)
    rows = torch.randn(5, 3)
    assert_folds(nn.Sequential(Cast(3, 4), learned(nn.BatchNorm1d(4))), rows)
    assert_folds(nn.Sequential(learned(nn.BatchNorm1d(3)), Cast(3, 4, bias=False)), rows)
    left_because(nn.Sequential(norm(3), Same(3, 4, 3)), IMAGE, "what its own forward adds at the borders is not known")
    left_because(
        nn.Sequential(Standardized(3, 4, 3), norm()), IMAGE, "has a forward of its own, which is not known to be lin"
    )
    left_because(nn.Sequential(conv(), learned(Odd(4))), IMAGE, "its forward is not that of a batch norm")


def test_a_batch_norm_of_a_parameter_is_left():
    model = Model(lambda s, x: x + s.norm(s.tokens), tokens=nn.Parameter(torch.randn(2, 3, 8, 8)), norm=norm(3))
    left_because(model, IMAGE, "its input is not from a layer of the model")


def test_a_mask_or_a_residual_in_the_call_is_left():
    model = Model(lambda s, x: s.norm(s.conv(x), residual=s.other(x)), conv=conv(), other=conv())
    model.norm = learned(bn.nn.BatchNorm2d(4))
    left_because(model, IMAGE, "it is called with more than its input")


def test_other_kinds_of_layers_are_left():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm = nn.Bilinear(3, 3, 4), learned(nn.BatchNorm1d(4))

        def forward(self, x):
            return self.norm(self.mix(x, x))

    left_because(Pair(), torch.randn(5, 3), "its input comes from mix, which cannot take it up")
    policies = learned(bn.nn.BatchNorm2d(4, inference_weight=0.2))
    left_because(nn.Sequential(conv(), policies), IMAGE, "its forward is not that of a batch norm with constant")


def test_batches_of_every_convention():
    @dataclass
    class Output:
        logits: torch.Tensor

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(conv(), norm())

        def forward(self, image, scale=1.0):
            return Output(self.net(image) * scale)

    model = Named().eval()
    for batch, forward_fn in [
        ({"image": IMAGE, "scale": 2.0}, None),
        ((IMAGE, torch.zeros(2)), None),
        ({"pixels": IMAGE}, lambda model, batch: model(batch["pixels"])),
    ]:
        folded = bn.fold(model, batch, forward_fn=forward_fn, strict=True)
        torch.testing.assert_close(folded(IMAGE).logits, model(IMAGE).logits, rtol=1e-4, atol=1e-4)
    needing = IMAGE.clone().requires_grad_()
    bn.fold(model, needing, strict=True)
    assert needing.grad is None


def test_wrappers_are_taken_off_and_that_is_said():
    model = nn.Sequential(conv(), norm()).eval()
    folded = bn.fold(torch.compile(model), IMAGE)
    assert type(folded) is nn.Sequential
    assert "the model: is the model inside torch.compile, which it is not in: wrap it again" in str(bn.changes(folded))
    folded = bn.fold(nn.DataParallel(model), IMAGE)
    assert "inside DataParallel" in str(bn.changes(folded))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        folded = bn.fold(torch.compile(nn.parallel.DistributedDataParallel(model)), IMAGE, strict=True)
    finally:
        torch.distributed.destroy_process_group()
    assert "inside torch.compile and DistributedDataParallel" in str(bn.changes(folded))
    inside = nn.Sequential(torch.compile(model), nn.ReLU()).eval()
    folded = bn.fold(inside, IMAGE)
    assert type(folded[0]) is nn.Sequential
    assert type(inside[0]) is not nn.Sequential
    assert "0: is the module inside OptimizedModule, which is left off" in str(bn.changes(folded))


def test_a_graph_module_and_a_folded_twin():
    model = nn.Sequential(conv(bias=False), norm(), nn.ReLU()).eval()
    folded = bn.fold(torch.fx.symbolic_trace(model), IMAGE, strict=True)
    torch.testing.assert_close(folded(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(model)
    nn.init.normal_(other[0].weight)
    twin = bn.fold(other, IMAGE)
    twin.load_state_dict(bn.fold(model, IMAGE).state_dict())
    torch.testing.assert_close(twin(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)
    assert list(twin.state_dict()) == ["0.weight", "0.bias"]


def test_a_folded_model_folds_again_to_itself_and_history_goes_on():
    folded = bn.fold(nn.Sequential(conv(), norm()).eval(), IMAGE)
    again = bn.fold(folded, IMAGE)
    assert str(bn.changes(again)) == "the model: has no batch norm: nothing to fold"
    assert len(bn.changes(again, last=False)) == 2
    assert torch.equal(again(IMAGE), folded(IMAGE))
    empty = bn.fold(nn.Sequential().eval(), IMAGE)
    assert str(bn.changes(empty)) == "the model: has no batch norm: nothing to fold"


def test_modes_are_kept_and_what_is_folded_still_learns():
    model = nn.Sequential(conv(), norm(), nn.ReLU(), conv(4, 2)).train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    folded = bn.fold(model, IMAGE, strict=True)
    assert [module.training for module in folded] == [True, False, True, True]
    folded(IMAGE).sum().backward()
    assert folded[0].weight.grad.abs().sum() > 0
    assert folded[0].bias.grad is not None
    assert folded[3].weight.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
