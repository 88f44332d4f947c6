"""An examination that makes sure, each time, that the model is left as it was."""

from __future__ import annotations

import pytest
import torch

import batchnorm as bn


def snapshot(model):
    """Everything about a model that a diagnosis could change: bits, modes, gradients, hooks, attributes."""
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    readable = {k: t for k, t in tensors.items() if t.device.type != "meta" and not torch.nn.parameter.is_lazy(t)}
    return (
        {k: (id(t), t.detach().cpu().flatten().view(torch.uint8).tolist()) for k, t in readable.items()},
        {k: (t.requires_grad, t.grad is None) for k, t in readable.items()},
        [(name, type(m), m.training, sorted(m.__dict__)) for name, m in modules],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for _, m in modules],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@pytest.fixture
def examine():
    """``examine(model, code, ...)``: the findings of one rule (or of all, for ""); the model is checked afterwards."""

    def run(model, code="BN", **options):
        before = snapshot(model)
        diagnosis = bn.diagnose(model, select=[code], **options)
        assert snapshot(model) == before
        assert not diagnosis.codes - {rule.code for rule in bn.probes.rules() if rule.code.startswith(code)}
        return list(diagnosis)

    return run
