"""What is refused, in which words, and that nothing has been counted by then."""

from __future__ import annotations

import pytest
import torch

import batchnorm as bn
from batchnorm.nn.functional import batch_norm

X = torch.ones(4, 3, 5)
MEAN, VAR = torch.zeros(3), torch.ones(3)

REFUSED = {
    "one value": (
        {"input": torch.ones(1, 3), "training": True},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3\]\)",
    ),
    "no channels": ({"input": torch.ones(3)}, ValueError, r"expected an input of shape \(N, C\) .*, got \[3\]"),
    "integers": ({"input": X.long()}, TypeError, r"expected a floating point input, got torch.int64: convert it"),
    "complex": ({"input": X.cfloat()}, TypeError, r"expected a floating point input, got torch.complex64"),
    "narrow weight": ({"weight": torch.ones(2)}, RuntimeError, r"weight should contain 3 elements not 2"),
    "narrow mean": ({"running_mean": torch.ones(4)}, RuntimeError, r"running_mean should contain 3 elements not 4"),
    "2-D bias": ({"bias": torch.ones(3, 1)}, ValueError, r"bias should contain 3 elements not 3"),
    "wide input": (
        {"input": X.double()},
        RuntimeError,
        r"expected running_mean to be torch.float64 like the input .*, got torch.float32",
    ),
    "no population": (
        {"running_mean": None, "running_var": None},
        RuntimeError,
        "running_mean must be defined in evaluation mode",
    ),
    "half a population": ({"running_var": None}, RuntimeError, "running_var must be defined: give running_mean and"),
    "eps 0": ({"training": True, "eps": 0.0}, ValueError, "batch_norm eps must be positive, got 0.0"),
    "eps < 0": ({"eps": -1e-5}, ValueError, "eps must not be negative: -1e-05"),
    "eps NaN": ({"training": True, "eps": float("nan")}, ValueError, "eps must be positive, got nan"),
    "activation": (
        {"activation": "swish"},
        ValueError,
        "expected activation to be one of 'none', 'relu', 'leaky_relu', 'silu', 'gelu', 'hardswish', got 'swish'",
    ),
    "residual": (
        {"residual": torch.ones(4, 3, 1)},
        ValueError,
        r"expected a residual of the input's shape \[4, 3, 5\], got \[4, 3, 1\]",
    ),
    "float mask": (
        {"mask": torch.ones(4, 5)},
        TypeError,
        r"expected a boolean mask \(True = real\), got torch.float32",
    ),
    "mask shape": (
        {"mask": torch.ones(3, 5, dtype=torch.bool)},
        ValueError,
        r"expected a mask broadcastable to \[4, 5\], got \[3, 5\]",
    ),
    "both": (
        {"mask": torch.ones(4, 5, dtype=torch.bool), "lengths": torch.ones(4, dtype=torch.long)},
        ValueError,
        "expected mask or lengths, got both",
    ),
    "float lengths": (
        {"lengths": torch.ones(4)},
        ValueError,
        r"expected lengths as 4 integers, got torch.float32 \[4\]",
    ),
    "lengths for 4-D": (
        {"input": torch.ones(4, 3, 5, 2), "lengths": torch.ones(4, dtype=torch.long)},
        ValueError,
        r"lengths are for \(N, C, L\) input, got \[4, 3, 5, 2\]: give a mask of shape \(N, \*spatial\)",
    ),
    "no count": (
        {"training": True, "momentum": None},
        ValueError,
        "momentum=None is the cumulative average and needs num_batches_tracked",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_these_words(arguments, kind, words):
    mean, var = MEAN.clone(), VAR.clone()
    given = {"input": X, "running_mean": mean, "running_var": var, **arguments}
    with pytest.raises(kind, match=words) as caught:
        batch_norm(**given)
    assert isinstance(caught.value, bn.BatchnormError)
    assert "\n" not in str(caught.value)
    assert torch.equal(mean, MEAN)
    assert torch.equal(var, VAR)


@pytest.mark.parametrize(
    ("x", "kwargs"),
    [
        (torch.ones(1, 3), {}),
        (torch.ones(4, 2), {}),
        (torch.ones(4, 3), {"mask": torch.ones(4)}),
        (torch.ones(4, 3).long(), {}),
    ],
    ids=["one value", "channels", "mask", "integers"],
)
def test_a_refused_batch_is_not_counted(x, kwargs):
    layer = bn.nn.BatchNorm1d(3)
    with pytest.raises(bn.BatchnormError):
        layer(x, **kwargs)
    assert layer.num_batches_tracked == 0
