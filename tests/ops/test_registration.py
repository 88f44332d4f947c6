"""The seam itself: schemas, fakes, strides, gradients of every order, vmap. All through torch's own checks."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import batchnorm.ops
from batchnorm.nn.functional import batch_norm
from batchnorm.ops.schema import ACTIVATIONS, SCHEMAS

OPS = torch.ops.batchnorm


def plain(*values):
    return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in values)


def arguments(name: str, activation: str = "relu", residual: bool = False, dtype=torch.float32, grad: bool = True):
    """Arguments for an operator, with gradients required where the operator has one."""
    x = torch.randn(4, 3, 5, 2, dtype=dtype).requires_grad_(grad)
    dy = torch.randn(4, 3, 5, 2, dtype=dtype).requires_grad_(grad)
    extra = torch.randn(4, 3, 5, 2, dtype=dtype).requires_grad_(grad) if residual else None
    weight, bias = torch.rand(3, dtype=dtype).add(0.5).requires_grad_(grad), torch.randn(3, dtype=dtype)
    mask = torch.rand(4, 5, 2) > 0.3
    count, mean, m2 = (t.detach() for t in OPS.stats(x.detach(), mask))
    invstd = torch.rsqrt(m2 / count + 1e-5).requires_grad_(grad)
    sign = OPS.normalize(x.detach(), mean, invstd.detach(), weight.detach(), bias, extra, mask, activation)[1].detach()
    sign = sign if sign.numel() else None
    saved_of_ghosts = OPS.ghost_forward(*plain(x, weight, bias, extra, mask), 2, 2, 1e-5, activation)[1]
    saved = (dy, x, mean, invstd, weight, bias, None if sign is not None else extra, sign, mask, activation)
    return {
        "stats": (x, mask),
        "normalize": (x, mean, invstd, weight, bias, extra, mask, activation),
        "train_forward": (x, weight, bias, extra, mask, 1e-5, activation),
        "grad_sums": saved,
        "grad_input": (*saved, count, torch.randn_like(mean), torch.randn_like(mean), True),
        # No gradient of its own: a second derivative goes through grad_sums and grad_input.
        "train_backward": plain(*saved, count, residual),
        "update_running": (torch.zeros(3), torch.ones(3), mean, m2 / count, count, 0.1, None, 1),
        "ghost_forward": (x, weight, bias, extra, mask, 2, 2, 1e-5, activation),
        "ghost_backward": plain(dy, x, saved_of_ghosts, weight, bias, *saved[6:8], mask, 2, activation, residual),
        "ghost_update": (torch.zeros(3), torch.ones(3), saved_of_ghosts, 0.1, None, 1),
        "infer": plain(x, torch.randn(3), torch.rand(3), weight, bias, extra, mask, 1e-5, activation),
        "train_step": plain(
            x, weight, bias, extra, mask, torch.zeros(3), torch.ones(3), 1e-5, 0.1, None, 1, activation
        ),
        "train_step_backward": plain(*(dy, x, torch.cat([mean, invstd, count.reshape(1)])), *saved[4:], residual),
    }[name]


def test_every_operator_is_covered_here():
    for name in SCHEMAS:
        arguments(name)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name, residual):
    opcheck(getattr(OPS, name), arguments(name, residual=residual))


@pytest.mark.parametrize(
    "name", ["normalize", "train_forward", "ghost_forward", "grad_input", "train_backward", "ghost_backward"]
)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["channels_last", "permuted", "strided", "expanded"],
)
def test_outputs_have_the_strides_of_empty_like(name, layout):
    args = list(arguments(name, grad=False))
    at = 0 if name in ("normalize", "train_forward", "ghost_forward") else 1
    args[at] = layout(args[at])
    result = getattr(OPS, name)(*args)
    assert result[0].stride() == torch.empty_like(args[at]).stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("name", ["stats", "normalize", "train_forward", "ghost_forward", "grad_sums", "grad_input"])
def test_gradients_of_the_operators(name, residual, activation):
    """Each operator's registered gradient against finite differences, statistics as arguments in their own right."""
    if name == "stats" and (residual or activation != "none"):
        pytest.skip("stats has neither")
    args = arguments(name, activation, residual, dtype=torch.float64)
    leaves = [value for value in args if isinstance(value, torch.Tensor) and value.requires_grad]

    def differentiable(*tensors):
        given = iter(tensors)
        filled = [next(given) if isinstance(v, torch.Tensor) and v.requires_grad else v for v in args]
        outputs = getattr(OPS, name)(*filled)
        return tuple(output for output in outputs if output.requires_grad)

    assert gradcheck(differentiable, leaves)


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_second_derivatives(training, masked, residual, activation):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    mask = torch.tensor([[True, True, False], [True, False, True]]) if masked else None
    running = (torch.randn(2).double(), torch.rand(2).double() + 0.5)

    def function(x, weight, bias, *extra):
        return batch_norm(
            x,
            *(running if not training else (None, None)),
            weight,
            bias,
            training,
            eps=1e-2,
            mask=mask,
            residual=extra[0] if extra else None,
            activation=None if activation == "none" else activation,
        )

    leaves = (leaf(2, 2, 3), leaf(2), leaf(2), *([leaf(2, 2, 3)] if residual else []))
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_third_derivative():
    x = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)

    def gradient(x):
        (first,) = torch.autograd.grad(batch_norm(x, None, None, training=True).pow(3).sum(), x, create_graph=True)
        return first

    assert gradgradcheck(gradient, x)


def test_vmap_of_an_operator():
    x, weight = torch.randn(3, 4, 2, 5), torch.randn(2, 3)
    batched = torch.vmap(lambda x, w: OPS.train_forward(x, w, None, None, None, 1e-5, "relu")[:3], in_dims=(0, 1))
    y, count, mean = batched(x, weight)
    for i in range(3):
        one = OPS.train_forward(x[i], weight[:, i], None, None, None, 1e-5, "relu")
        assert torch.equal(y[i], one[0])
        assert torch.equal(count[i], one[1])
        assert torch.equal(mean[i], one[2])


def test_only_the_input_is_saved_for_a_relu():
    """BN + ReLU keeps x and (C,) statistics; with a residual, one bit an element more."""
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    residual = torch.randn(8, 4, 16, 16, requires_grad=True)
    for extra, allowance in ((None, 0), (residual, x.numel() // 8)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            batch_norm(x, None, None, training=True, residual=extra, activation="relu")
        large = [t for t in kept if t.numel() > 64 and t.data_ptr() != x.data_ptr()]
        assert sum(t.numel() * t.element_size() for t in large) == allowance


def test_the_reference_is_what_runs_where_no_kernel_is():
    status = batchnorm.ops.native.status()
    for name in SCHEMAS:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"batchnorm::{name}", "CPU")
        assert has_kernel == (name in status.operators)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"batchnorm::{name}", "CompositeExplicitAutograd")
