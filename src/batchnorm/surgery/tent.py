"""TENT (Wang et al. 2021): gamma and beta learn to be sure, from predictions alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import InputError
from batchnorm.surgery.streaming import evaluating

LogitsOf = Callable[[Any], Tensor]
OptimizerOf = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Entropy:
    r"""Normalizes with the batch's statistics, and lowers the mean entropy of its predictions over gamma and beta:
    :math:`H = - \sum_k p_k \log p_k`, with p the softmax of the logits over dimension 1.

    Args:
        steps: for each batch, each with a forward of its own; the answer is the last forward's.
        optimizer: makes one from the list of parameters.
        logits: see :func:`find_logits`.
    """

    def __init__(self, steps: int, optimizer: OptimizerOf, logits: LogitsOf | None) -> None:
        self.steps, self._make, self._logits = steps, optimizer, logits
        self._parameters: list[nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None

    def start(self, layers: list[nn.Module]) -> None:
        """Begin with a fresh optimizer of the layers' gammas and betas."""
        names = ("weight", "bias")
        found = {id(p): p for layer in layers for name, p in layer.named_parameters(recurse=False) if name in names}
        self._parameters = list(found.values())
        self._optimizer = self._make(self._parameters)

    def __call__(self, model: nn.Module, layers: list[nn.Module], run: Callable[[], Any]) -> Any:
        """What ``run`` gives before gamma and beta move for the last time."""
        result = None
        required = [parameter.requires_grad for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            for _ in range(self.steps):
                with evaluating(model, layers), torch.enable_grad():
                    result = run()
                    self._learn(result)
        finally:
            for parameter, before in zip(self._parameters, required, strict=True):
                parameter.requires_grad_(before)
        return torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, result)

    def _learn(self, result: Any) -> None:
        logits = find_logits(result, self._logits)
        if logits is None or logits.dim() < 2 or logits.size(1) < 2:
            got = type(result).__name__ if logits is None else list(logits.shape)
            raise InputError(f"expected logits (N, K) of 2 classes or more for an entropy, got {got}: give logits=")
        log_p = logits.float().log_softmax(1) if logits.dtype.itemsize < 4 else logits.log_softmax(1)
        loss = -(log_p.exp() * log_p).sum(1).mean()
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        # A batch with an inf or NaN in it would be in gamma and beta for ever.
        if not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None):
            return
        assert self._optimizer is not None
        before = [parameter.grad for parameter in self._parameters]
        try:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            self._optimizer.step()
        finally:
            for parameter, kept in zip(self._parameters, before, strict=True):
                parameter.grad = kept


def find_logits(result: Any, logits: LogitsOf | None = None) -> Tensor | None:
    """Logits in what a model returned: the tensor, its "logits", or what ``logits`` finds; None where none are."""
    if logits is not None:
        result = logits(result)
    elif isinstance(result, Mapping):
        result = result.get("logits")
    elif not isinstance(result, Tensor):
        result = getattr(result, "logits", None)
    return result if isinstance(result, Tensor) and result.is_floating_point() else None
