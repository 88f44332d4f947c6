"""What the layers are in an exported program: torch's own batch norm wherever that computes the same.

An exported program (torch.export, ONNX, torch.jit.trace) is read by others: by an exporter that knows
``aten.batch_norm`` and writes a BatchNormalization, by a quantizer that folds it into the convolution before it, by a
runtime without this package. So it holds none of our operators. What torch's operator does not do (masks, the
cumulative average, biased running variances, virtual batches) is there in plain torch functions, in float64.

torch's operator computes in the dtype of its parameters: in a program that holds it, a mean of 1e4 costs the accuracy
that it costs in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from batchnorm.ops import reference
from batchnorm.ops.activations import activate


def exporting() -> bool:
    """Whether this call is being written down as a program for others."""
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else torch._C._is_tracing()


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> Tensor:
    """torch's operator, and around it what it does not do. In training: without a mask."""
    y = functional.batch_norm(
        reference.selected(x, mask), running_mean, running_var, weight, bias, training, momentum, eps
    )
    if residual is not None:
        y = y + reference.selected(residual, mask)
    return reference.selected(activate(y, activation), mask)
