"""The algebra of folding, in float64, one layer kind after the other, and torch's own fusion beside it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import fusion

import batchnorm as bn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def learned(norm, seed=0):
    """Random gammas, betas and statistics, none of them near a default."""
    generator = torch.Generator().manual_seed(seed)
    channels = norm.num_features
    with torch.no_grad():
        if norm.weight is not None:
            norm.weight.copy_(torch.randn(channels, generator=generator))
        if norm.bias is not None:
            norm.bias.copy_(torch.randn(channels, generator=generator))
        norm.running_mean.copy_(3 * torch.randn(channels, generator=generator))
        norm.running_var.copy_(torch.rand(channels, generator=generator) * 4 + 0.01)
    return norm


def assert_folds(model, x, expected=1, rtol=1e-11):
    """``model`` in float64 folds to the same function, in so many layers."""
    model, x = model.double().eval(), x.double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = bn.fold(model, x, rtol=rtol)
    y, found = model(x), folded(x)
    assert (found - y).abs().max() <= rtol * y.abs().max()
    assert sum(" folded into " in change.what for change in bn.changes(folded)) == expected, str(bn.changes(folded))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return folded


@st.composite
def convolutions(draw):
    spatial = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    stride = draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    options["padding"] = draw(st.integers(0, 1))
    if transposed:
        options["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    kind = (TRANSPOSED if transposed else CONVS)[spatial]
    layer = kind(inputs, outputs, draw(st.integers(1, 3)), **options)
    norm = NORMS[spatial](outputs, eps=draw(st.sampled_from([1e-5, 1e-3, 0.5])), affine=draw(st.booleans()))
    return nn.Sequential(layer, learned(norm)), (2, inputs, *(7,) * spatial)


@settings(max_examples=60)
@given(convolutions())
def test_any_convolution_takes_the_batch_norm_behind_it(case):
    model, shape = case
    folded = assert_folds(model, torch.randn(shape))
    assert type(folded[0]) is type(model[0])
    assert type(folded[1]) is nn.Identity
    assert folded[0].bias is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_linear_layer(bias, affine):
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), learned(nn.BatchNorm1d(5, affine=affine)))
    folded = assert_folds(model, torch.randn(6, 4))
    norm = model[1].double()
    scale = (1 if norm.weight is None else norm.weight) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(folded[0].weight, model[0].weight * scale[:, None], rtol=1e-14, atol=1e-14)


def test_extreme_numbers():
    norm = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, -2.0, 1e-6, 1e3]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -5.0, 2.0]))
        norm.running_mean.copy_(torch.tensor([1e3, -4.0, 0.0, 1.0]))
        norm.running_var.copy_(torch.tensor([1.0, 0.0, 1e-12, 1e6]))
    assert_folds(nn.Sequential(nn.Conv2d(3, 4, 3), norm), torch.randn(2, 3, 6, 6))


def test_an_unbatched_image():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(0, (1, 4)), learned(nn.BatchNorm2d(4)))
    assert_folds(model, torch.randn(3, 6, 6))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: bn.nn.BatchNorm2d(6, bias=False), (2, 3, 5, 5)),
        (lambda: bn.nn.BatchNorm2d(6, activation="gelu"), (2, 3, 5, 5)),
        (lambda: bn.nn.GhostBatchNorm2d(6, virtual_batch_size=1), (2, 3, 5, 5)),
        (lambda: bn.nn.BatchRenorm2d(6, activation="leaky_relu"), (2, 3, 5, 5)),
        (lambda: bn.nn.SyncBatchNorm(6), (2, 3, 5, 5)),
        (lambda: nn.SyncBatchNorm(6), (2, 3, 5, 5)),
        (lambda: bn.nn.FrozenBatchNorm2d(6, activation="silu"), (2, 3, 5, 5)),
    ],
    ids=["no beta", "gelu", "ghost", "renorm", "sync", "torch's sync", "frozen"],
)
def test_every_kind_of_batch_norm(make, shape):
    model = nn.Sequential(nn.Conv2d(3, 6, 2), learned(make()))
    kept = assert_folds(model, torch.randn(shape))[1]
    activation = getattr(model[1], "activation", None)
    assert (type(kept) is nn.Identity) == (activation is None)


class Foreign(nn.Module):
    """A frozen batch norm as torchvision's and detectron2's are."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.1)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def test_a_frozen_layer_of_another_library():
    assert_folds(nn.Sequential(nn.Conv2d(3, 4, 3), Foreign(4)), torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize("kind", [bn.nn.DecorrelatedBatchNorm, bn.nn.IterNorm])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_whitening_layer_goes_into_a_convolution(kind, groups):
    norm = kind(6, 3, activation="relu")
    norm.train()(torch.randn(50, 6, 2, 2) @ torch.randn(2, 2))
    torch.nn.init.normal_(norm.weight)
    assert_folds(nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), norm), torch.randn(2, 4, 6, 6), rtol=1e-10)


def test_a_whitening_layer_stays_where_groups_are_in_the_way():
    norm = bn.nn.DecorrelatedBatchNorm(6, 3)
    norm.train()(torch.randn(50, 6, 2, 2))
    folded = assert_folds(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), norm), torch.randn(2, 6, 6, 6), expected=0)
    assert "it mixes channels of different groups of 0 (Conv2d)" in str(bn.changes(folded))


# --- into the layer behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "valid", "dilation": 2}]
)
def test_a_convolution_takes_the_batch_norm_before_it(spatial, groups, options):
    layer = CONVS[spatial](4, 6, 3, groups=groups, bias=groups == 1, **options)
    assert_folds(nn.Sequential(learned(NORMS[spatial](4)), layer), torch.randn(2, 4, *(8,) * spatial))


def test_a_transposed_convolution_takes_it_where_no_border_is_left():
    layer = nn.ConvTranspose2d(4, 6, 3, padding=2, groups=2)
    assert_folds(nn.Sequential(learned(nn.BatchNorm2d(4)), layer), torch.randn(2, 4, 8, 8))
    folded = assert_folds(
        nn.Sequential(learned(nn.BatchNorm2d(4)), nn.ConvTranspose2d(4, 6, 3)), torch.randn(2, 4, 8, 8), expected=0
    )
    assert "a transposed convolution's outputs are not all reached by the same taps" in str(bn.changes(folded))


def test_zeros_of_the_padding_stop_a_shift_but_not_a_scale():
    norm = learned(nn.BatchNorm2d(4))
    model, x = nn.Sequential(norm, nn.Conv2d(4, 6, 3, padding=1)), torch.randn(2, 4, 8, 8)
    folded = assert_folds(model, x, expected=0)
    assert "cannot take its shift up: its padding adds zeros" in str(bn.changes(folded))
    with torch.no_grad():
        norm.bias.copy_(0)
        norm.running_mean.copy_(0)
    assert_folds(model, x)
    assert_folds(nn.Sequential(learned(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 1, padding="same")), x)


def test_flattened_images_repeat_a_channel_over_its_positions():
    model = nn.Sequential(learned(nn.BatchNorm2d(3)), nn.Flatten(), nn.Linear(3 * 4 * 5, 7, bias=False))
    assert_folds(model, torch.randn(2, 3, 4, 5))


# --- torch's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_torch_agrees_on_convolutions(groups):
    conv, norm = nn.Conv2d(4, 6, 3, groups=groups), learned(nn.BatchNorm2d(6))
    folded = assert_folds(nn.Sequential(conv, norm), torch.randn(2, 4, 5, 5))
    theirs = fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
    torch.testing.assert_close(folded[0].weight, theirs.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded[0].bias, theirs.bias, rtol=1e-12, atol=1e-12)


def test_torch_agrees_on_a_linear_layer():
    linear, norm = nn.Linear(4, 6), learned(nn.BatchNorm1d(6))
    folded = assert_folds(nn.Sequential(linear, norm), torch.randn(3, 4))
    theirs = fusion.fuse_linear_bn_eval(linear.eval(), norm.eval())
    torch.testing.assert_close(folded[0].weight, theirs.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded[0].bias, theirs.bias, rtol=1e-12, atol=1e-12)


def test_torch_is_wrong_or_fails_on_grouped_transposed_convolutions():
    """pytorch #180995: the second dimension of the weight is the outputs of one group. Here it is right."""
    x = torch.randn(2, 4, 5, 5).double()
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), learned(nn.BatchNorm2d(6))).double().eval()
    with pytest.raises(RuntimeError, match="must match the size"):
        fusion.fuse_conv_bn_eval(*model, transpose=True)
    assert_folds(model, x)
    # With one output a group the shapes fit by broadcasting, and what comes out has another weight.
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), learned(nn.BatchNorm2d(4))).double().eval()
    theirs = fusion.fuse_conv_bn_eval(*model, transpose=True)
    assert theirs.weight.shape != model[0].weight.shape
    assert_folds(model, x)


def test_torch_fails_on_a_linear_layer_without_gamma():
    model = nn.Sequential(nn.Linear(4, 6), learned(nn.BatchNorm1d(6, affine=False))).eval()
    with pytest.raises(TypeError):
        fusion.fuse_linear_bn_eval(*model)
    assert_folds(model, torch.randn(3, 4))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_rounded_once(dtype):
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv2d(8, 8, 3), learned(nn.BatchNorm2d(8))).eval()
    model = copy.deepcopy(exact).to(dtype)
    x = torch.randn(2, 8, 6, 6).to(dtype)
    folded = bn.fold(model, x)
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype
    wide = copy.deepcopy(model).double()
    scale = wide[1].weight / (wide[1].running_var + wide[1].eps).sqrt()
    assert torch.equal(folded[0].weight, (wide[0].weight * scale[:, None, None, None]).to(dtype))


def test_a_layer_keeps_its_dtype_memory_format_and_gradient():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), learned(nn.BatchNorm2d(4))).eval()
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    folded = bn.fold(model, torch.randn(1, 4, 5, 5))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
    assert not folded[1].training


def test_numbers_that_a_dtype_does_not_hold_are_left():
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(1e-6)
    norm.eps = 1e-12
    torch.nn.init.constant_(norm.weight, 1e3)
    linear = nn.Linear(2, 2)
    model = nn.Sequential(linear, norm).half().eval()
    model[1].float()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1e-4], [1.0, 1.0]]))
        model[0].bias.zero_()
    folded = bn.fold(model, torch.full((3, 2), 1e-4).half())
    assert "would get numbers that torch.float16 does not hold" in str(bn.changes(folded))
    assert math.isclose(float(folded[0].weight[0, 0].detach()), 1.0)
