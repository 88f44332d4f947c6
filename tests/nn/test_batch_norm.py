"""Drop-in for torch.nn's layers: state, modes, copies, what programs ask of a batch norm; and what is ours."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch

import batchnorm as bn
from nn.random_state import randomise

PAIRS = [
    (bn.nn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3)),
    (bn.nn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3, 4)),
    (bn.nn.BatchNorm2d, torch.nn.BatchNorm2d, (4, 3, 5, 2)),
    (bn.nn.BatchNorm3d, torch.nn.BatchNorm3d, (3, 3, 2, 4, 3)),
]
OPTIONS = {
    "default": {},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.7, "eps": 1e-2},
    "untracked": {"track_running_stats": False},
}
pairs = pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS, ids=["1d", "1d-L", "2d", "3d"])
classes = pytest.mark.parametrize(
    ("ours", "theirs"), sorted({(a, b) for a, b, _ in PAIRS}, key=repr), ids=["1d", "2d", "3d"]
)
options = pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS.keys())


@pairs
@options
def test_trains_and_evaluates_like_torch(ours, theirs, shape, kwargs):
    reference = randomise(theirs(3, **kwargs))
    layer = ours(3, **kwargs)
    layer.load_state_dict(reference.state_dict())
    for step in range(4):
        if step == 3:
            layer.eval()
            reference.eval()
        x, dy = torch.randn(shape) * 2 + step, torch.randn(shape)
        ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(ours_x), reference(theirs_x)
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-4, atol=1e-5)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    state, expected_state = layer.state_dict(), reference.state_dict()
    assert list(state) == list(expected_state)
    torch.testing.assert_close(state, expected_state)


@classes
@options
def test_state_dicts_go_both_ways(ours, theirs, kwargs):
    layer, other = randomise(ours(3, **kwargs)), theirs(3, **kwargs)
    other.load_state_dict(layer.state_dict(), strict=True)
    back = ours(3, **kwargs)
    back.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(back.state_dict(), layer.state_dict(), rtol=0, atol=0)
    assert layer.state_dict()._metadata[""] == other.state_dict()._metadata[""] == {"version": 2}


def test_a_state_dict_from_before_batches_were_counted():
    old = {k: v for k, v in torch.nn.BatchNorm1d(3).state_dict().items() if k != "num_batches_tracked"}
    layer = bn.nn.BatchNorm1d(3)
    layer.load_state_dict(old, strict=True)  # no version: from before version 2
    assert layer.num_batches_tracked == 0


@classes
@options
@pytest.mark.parametrize("rank", range(1, 7))
def test_the_wrong_rank_is_refused_in_torchs_words(ours, theirs, kwargs, rank):
    x = torch.ones([2, 3, 2, 2, 2, 2][:rank])
    right = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,)}[theirs.__name__]
    if rank in right:
        assert ours(3, **kwargs)(x).shape == x.shape
        return
    with pytest.raises(ValueError, match=r"expected .* input") as torchs:
        theirs(3, **kwargs)(x)
    with pytest.raises(ValueError, match=re.escape(str(torchs.value))):
        ours(3, **kwargs)(x)


@pairs
def test_an_empty_batch_leaves_the_averages(ours, theirs, shape):
    layer, reference = ours(3), theirs(3)
    x = torch.randn(0, *shape[1:], requires_grad=True)
    y, expected = layer(x), reference(x.detach())
    y.sum().backward()
    assert y.shape == expected.shape == x.grad.shape
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())


@classes
def test_programs_that_look_for_batch_norm_find_it(ours, theirs):
    layer = ours(3)
    assert isinstance(layer, theirs)
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    assert repr(layer) == repr(theirs(3))
    assert repr(ours(3, activation="relu")) == repr(theirs(3))[:-1] + ", activation='relu')"


def test_torchs_own_recalibration_works_on_it():
    model = torch.nn.Sequential(bn.nn.BatchNorm1d(3))
    batches = [torch.randn(8, 3) + i for i in range(4)]
    torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))


def test_switching_tracking_off_later_is_torchs():
    layer, reference = randomise(bn.nn.BatchNorm1d(3)), torch.nn.BatchNorm1d(3)
    reference.load_state_dict(layer.state_dict())
    layer.track_running_stats = reference.track_running_stats = False
    x = torch.randn(6, 3) + 1
    torch.testing.assert_close(layer(x), reference(x))
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x))
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())


@pytest.mark.parametrize(("ours", "shape"), [(ours, shape) for ours, _, shape in PAIRS])
def test_copies_pickles_and_files(ours, shape):
    layer = randomise(ours(3, activation="silu", momentum=None))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(shape)
    expected = copy.deepcopy(layer).eval()(x)
    for twin in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert twin.activation == "silu"
        assert torch.equal(twin.eval()(x), expected)


def test_a_layer_pickled_without_an_activation_has_none():
    layer = bn.nn.BatchNorm1d(3)
    del layer.__dict__["activation"]
    assert pickle.loads(pickle.dumps(layer)).activation is None


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_residual_and_activation_are_the_composition(activation, training):
    functional = torch.nn.functional
    layer = randomise(bn.nn.BatchNorm2d(3, activation=activation)).train(training)
    plain = torch.nn.BatchNorm2d(3).train(training)
    plain.load_state_dict(layer.state_dict())
    leaves = [torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2)]
    twins = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = layer(leaves[0], residual=leaves[1])
    expected = getattr(functional, activation)(plain(twins[0]) + twins[1])
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)


def test_the_constructor_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match=r"expected activation to be one of 'relu', .*, got 'tanh'"):
        bn.nn.BatchNorm1d(3, activation="tanh")
    with pytest.raises(TypeError):
        bn.nn.BatchNorm1d(3, momentun=0.1)


def test_meta_device_and_dtype():
    layer = bn.nn.BatchNorm2d(3, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta
    assert layer.running_var.dtype == torch.float64
    assert layer(torch.empty(2, 3, 4, 4, device="meta", dtype=torch.float64)).shape == (2, 3, 4, 4)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    torch.testing.assert_close(real.state_dict(), torch.nn.BatchNorm2d(3, dtype=torch.float64).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow_parameters", [True, False], ids=["all narrow", "float32 parameters"])
def test_narrow_types(dtype, narrow_parameters):
    layer = bn.nn.BatchNorm1d(4)
    if narrow_parameters:
        layer.to(dtype)
    x = (torch.randn(64, 4) * 3 + 2).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    rounding = torch.finfo(layer.running_mean.dtype).eps
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * x.double().mean(0), rtol=4 * rounding, atol=rounding)


def test_float16_at_its_limits():
    x = torch.tensor([[65504.0], [-65504.0], [65504.0], [0.0]], dtype=torch.float16)
    layer = bn.nn.BatchNorm1d(1)
    y = layer(x)
    expected = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    assert layer.running_var.isfinite().all()
