"""Torch's own samples for its batch-norm modules, and its own error samples, through our layers."""

from __future__ import annotations

import warnings

import pytest
import torch

import batchnorm as bn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's testing tools are not held to our standard
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_utils import freeze_rng_state

OURS = {
    torch.nn.BatchNorm1d: bn.nn.BatchNorm1d,
    torch.nn.BatchNorm2d: bn.nn.BatchNorm2d,
    torch.nn.BatchNorm3d: bn.nn.BatchNorm3d,
}
INFOS = [info for info in module_db if info.module_cls in OURS]


def samples(info, training, dtype):
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


CASES = [
    pytest.param(info, training, dtype, index, id=f"{info.name}-{'train' if training else 'eval'}-{dtype}-{index}")
    for info in INFOS
    for training in (True, False)
    for dtype in (torch.float32, torch.float64)
    for index in range(len(samples(info, training, dtype)))
]


def test_torch_has_samples_for_all_three():
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert len(CASES) >= 3 * 2 * 2 * 5


@pytest.mark.parametrize(("info", "training", "dtype", "index"), CASES)
def test_sample(info, training, dtype, index):
    sample = samples(info, training, dtype)[index]
    built = sample.constructor_input
    results = []
    for cls in (OURS[info.module_cls], info.module_cls):
        with freeze_rng_state():
            layer = cls(*built.args, **built.kwargs, dtype=dtype).train(training)
            inputs = [value.detach().clone().requires_grad_() for value in sample.forward_input.args]
            y = layer(*inputs, **sample.forward_input.kwargs)
            y.sum().backward() if y.numel() == 0 else (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
            gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
            results.append((y.detach(), inputs[0].grad, gradients, layer.state_dict()))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(ours[3]), dict(theirs[3]))


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_error_samples(info):
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert len(errors) >= 2
    for sample in errors:
        given = sample.module_error_input
        layer = OURS[info.module_cls](*given.constructor_input.args, **given.constructor_input.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            layer(*given.forward_input.args, **given.forward_input.kwargs)
