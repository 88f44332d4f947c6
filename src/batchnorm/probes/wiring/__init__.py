"""What feeds what in a model: the order of its layers as a forward pass has them, not as they were registered."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm._errors import InputError
from batchnorm.nn.recognition import unwrapped
from batchnorm.probes.feeding import ForwardFn, of_no_inference
from batchnorm.probes.wiring.read import Reader
from batchnorm.probes.wiring.recorded import Recorder
from batchnorm.probes.wiring.steps import OUTSIDE, Made, Step, Wiring, function_name, is_atomic, tensors

__all__ = ["OUTSIDE", "Made", "Step", "Wiring", "function_name", "is_atomic", "tensors", "trace"]


def trace(model: nn.Module, example: Any = None, forward_fn: ForwardFn | None = None) -> Wiring:
    """The wiring of ``model``, which is left as it was.

    Args:
        model: any module; inside torch.compile and the parallel wrappers, the module that they hold.
        example: a batch (see :func:`batchnorm.probes.feeding.feed`) on which the model is run once, in eval mode and
            without gradients: then the wiring is exact, whatever Python the forward has. Without it torch.fx reads the
            forward; where that fails, it reads the parts that it can, and Sequentials are taken in their order.
        forward_fn: how the model takes the example.

    Raises:
        InputError: the model is a ScriptModule, whose modules cannot be watched.
    """
    inner, prefix = unwrapped(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in inner.modules()):
        raise InputError("expected a model in Python, got a ScriptModule: trace the model that it was made from")
    if example is None:
        return Reader(inner, prefix).wiring()
    with torch.inference_mode(False):  # whose tensors do not say when they are written to
        return Recorder(inner, prefix).run(of_no_inference(example), forward_fn)
