"""Against Keras's own layers, on the torch backend: training, inference, masks, renormalization."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import batchnorm as bn
from nn.ports import from_ours, layer_of, to_ours

os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported; the other frameworks are not here
import keras

# Raised inside Keras, whose variables have NumPy's older protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def keras_layer(rank: int = 3, **settings):
    layer = keras.layers.BatchNormalization(**settings)
    layer.build((None, *[4] * (rank - 2), 3))
    random = np.random.default_rng(1)
    layer.set_weights([random.uniform(0.5, 1.5, 3) for _ in layer.weights])
    return layer


def weights_of(layer) -> dict[str, np.ndarray]:
    return {variable.name: keras.ops.convert_to_numpy(variable) for variable in layer.weights}


def keras_arguments(layer):
    return weights_of(layer), layer.momentum, layer.epsilon


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.7, "epsilon": 1e-2}, {"scale": False}, {"center": False}, {"scale": False, "center": False}],
    ids=str,
)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_trains_on_as_the_keras_layer_that_it_was(settings, rank):
    theirs = keras_layer(rank, **settings)
    ours = layer_of(
        bn.nn.state.from_keras(*keras_arguments(theirs)), bn.nn.BatchNorm2d if rank == 4 else bn.nn.BatchNorm1d
    )
    for step in range(3):
        x = np.random.default_rng(step).normal(5, 10, (6, *[4] * (rank - 2), 3)).astype(np.float32)
        expected = keras.ops.convert_to_numpy(theirs(x, training=True))
        np.testing.assert_allclose(from_ours(ours(to_ours(x))), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.running_mean, theirs.moving_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.running_var, theirs.moving_variance.numpy(), rtol=1e-5)
    expected = keras.ops.convert_to_numpy(theirs(x, training=False))
    np.testing.assert_allclose(from_ours(ours.eval()(to_ours(x))), expected, rtol=1e-4, atol=1e-5)


def test_keras_takes_our_state_back():
    theirs = keras_layer(momentum=0.9)
    ours = layer_of(bn.nn.state.from_keras(*keras_arguments(theirs)))
    ours(torch.randn(5, 3, 4))
    arrays, settings = bn.nn.state.to_keras(ours.state_dict(), ours.eps, ours.momentum, ours.ddof)
    back = keras.layers.BatchNormalization(**settings)
    back.build((None, 4, 3))
    back.set_weights(list(arrays.values()))
    assert [variable.name for variable in back.weights] == list(arrays)
    assert settings == {"momentum": 0.9, "epsilon": 1e-3, "scale": True, "center": True}
    x = torch.randn(5, 3, 4)
    expected = keras.ops.convert_to_numpy(back(from_ours(x), training=False))
    np.testing.assert_allclose(from_ours(ours.eval()(x)), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_is_keras_mask_in_the_statistics():
    """Keras normalizes what is masked too; here it is zero. Its mean is over count + 1e-7."""
    theirs = keras_layer(momentum=0.5)
    ours = layer_of(bn.nn.state.from_keras(*keras_arguments(theirs)))
    x = np.random.default_rng(0).normal(5, 10, (6, 4, 3)).astype(np.float32)
    mask = np.random.default_rng(1).random((6, 4)) < 0.7
    expected = keras.ops.convert_to_numpy(theirs(x, training=True, mask=mask))
    y = from_ours(ours(to_ours(x), mask=torch.tensor(mask)))
    np.testing.assert_allclose(y[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert np.abs(y[~mask]).sum() == 0
    assert np.abs(expected[~mask]).sum() > 0
    np.testing.assert_allclose(ours.running_var, theirs.moving_variance.numpy(), rtol=1e-5)


def test_keras_keeps_its_own_masked_values_out():
    """Keras's case `test_bachnorm_ignore_masked_values`: padding that is anything at all."""
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [float("nan")] * 2, [7.0] * 2]).T.expand(10, 2, 4)
    layer = bn.nn.BatchNorm1d(2, decay=0.0, ddof=0)
    layer(x, mask=torch.tensor([True, True, False, False]).expand(10, 4))
    torch.testing.assert_close(layer.running_mean, torch.tensor([1.5, 5.0]))
    torch.testing.assert_close(layer.running_var, torch.tensor([0.25, 0.0]))


def test_corrected_it_is_what_torch_would_have():
    """A Keras layer that has forgotten where it started, and torch's on the same batches."""
    theirs, reference = keras_layer(2, momentum=0.5, epsilon=1e-5), torch.nn.BatchNorm1d(3, momentum=0.5)
    for step in range(40):
        x = np.random.default_rng(step).normal(5, 10, (4, 3)).astype(np.float32)
        theirs(x, training=True)
        reference(torch.tensor(x))
    state, _ = bn.nn.state.from_keras(*keras_arguments(theirs), n=4)
    torch.testing.assert_close(state["running_var"], reference.running_var)
    arrays, _ = bn.nn.state.to_keras(reference.state_dict(), n=4)
    np.testing.assert_allclose(arrays["moving_variance"], theirs.moving_variance.numpy(), rtol=1e-5)


@pytest.mark.parametrize("clipping", [{}, {"rmax": 1.2, "rmin": 1 / 1.2, "dmax": 0.3}], ids=["free", "clipped"])
def test_renormalizes_as_keras_does(clipping):
    """One step from the same averages; Keras then averages deviations, which are not ours (see BatchRenorm1d)."""
    theirs = keras_layer(renorm=True, renorm_clipping=clipping)
    ours = bn.nn.BatchRenorm1d(3, eps=1e-3, r_max=clipping.get("rmax", 1e9), d_max=clipping.get("dmax", 1e9))
    arrays = weights_of(theirs)
    for name, value in (
        ("weight", arrays["gamma"]),
        ("bias", arrays["beta"]),
        ("running_mean", arrays["renorm_mean"]),
        ("running_var", arrays["renorm_stddev"] ** 2 - 1e-3),  # theirs has eps in it
    ):
        ours.state_dict()[name].copy_(torch.tensor(value))
    x = np.random.default_rng(0).normal(2, 2, (6, 4, 3)).astype(np.float32)
    theirs_x, ours_x = torch.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    expected, y = theirs(theirs_x, training=True), ours(ours_x.movedim(-1, 1)).movedim(1, -1)
    dy = torch.randn(y.shape)
    expected.backward(dy)
    y.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.gamma.value.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.beta.value.grad, rtol=1e-4, atol=1e-5)


def test_a_batch_without_anything_real():
    """Keras's case `test_input_fully_masked` calls for zeros, which it has because its x is zero."""
    layer = bn.nn.BatchNorm1d(5, affine=False, decay=0.99, ddof=0)
    y = layer(torch.randn(4, 5), mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(y, torch.zeros(4, 5))
    assert torch.equal(layer.running_var, torch.ones(5))
    theirs = keras.layers.BatchNormalization()
    theirs(np.ones((4, 5), np.float32), mask=np.zeros(4, np.float32), training=True)
    np.testing.assert_allclose(theirs.moving_variance.numpy(), 0.99)


def test_a_single_value_is_beta_there_and_refused_here():
    theirs = keras_layer(2)
    y = keras.ops.convert_to_numpy(theirs(np.ones((1, 3), np.float32), training=True))
    np.testing.assert_allclose(y[0], theirs.beta.numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer_of(bn.nn.state.from_keras(*keras_arguments(theirs)))(torch.ones(1, 3))
