"""The loss of Deep CORAL against the paper's equations, their gradients, transforms, dtypes and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

import batchnorm as bn
from batchnorm import DtypeError, InputError, ShapeError
from batchnorm.nn import CORALLoss, coral_loss


def pair(dtype=torch.float64, columns=5, offset=0.0):
    mixing = torch.randn(columns, columns, dtype=torch.float64)
    source = torch.randn(12, columns, dtype=torch.float64) @ mixing + offset
    return source.to(dtype), (torch.randn(9, columns, dtype=torch.float64) - offset).to(dtype)


def papers_covariance(d):
    """Equations 2 and 3 as they are written."""
    n, sums = len(d), d.sum(0, keepdims=True)
    return (d.T @ d - sums.T @ sums / n) / (n - 1)


def papers_gradient(d, difference):
    """Equation 5: ((D^T - (1^T D)^T 1^T / n)^T (C_s - C_t)) / (d^2 (n - 1)); equation 6 is its negative."""
    n, ones = len(d), np.ones((1, len(d)))
    return (d.T - (ones @ d).T @ ones / n).T @ difference / (d.shape[1] ** 2 * (n - 1))


def test_value_and_gradient_are_the_papers():
    source, target = pair()
    s, t = source.numpy(), target.numpy()
    difference = papers_covariance(s) - papers_covariance(t)
    loss = coral_loss(source.requires_grad_(), target.requires_grad_())
    assert loss.shape == ()
    np.testing.assert_allclose(loss.item(), (difference**2).sum() / (4 * 5**2), rtol=1e-13)
    loss.backward()
    np.testing.assert_allclose(source.grad, papers_gradient(s, difference), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(target.grad, -papers_gradient(t, difference), rtol=1e-11, atol=1e-14)


def test_biased_covariances():
    source, target = pair()
    difference = np.cov(source.T.numpy(), bias=True) - np.cov(target.T.numpy(), bias=True)
    np.testing.assert_allclose(coral_loss(source, target, ddof=0).item(), (difference**2).mean() / 4, rtol=1e-13)
    assert coral_loss(source[:1], target[:1], ddof=0) == 0


def test_positions_are_samples_and_order_does_not_matter():
    source, target = torch.randn(3, 5, 2, 4, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    rows = source.movedim(1, -1).reshape(-1, 5), target.movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(coral_loss(source, target), coral_loss(*rows))
    shuffled = rows[0][torch.randperm(len(rows[0]))]
    torch.testing.assert_close(coral_loss(shuffled, rows[1]), coral_loss(*rows))
    mask = torch.rand(3, 2, 4) < 0.5
    kept = source.movedim(1, -1)[mask]  # as the docstring advises
    expected = papers_covariance(kept.numpy()) - papers_covariance(rows[1].numpy())
    np.testing.assert_allclose(coral_loss(kept, target).item(), (expected**2).mean() / 4, rtol=1e-12)


def test_it_is_least_where_covariances_agree_and_blind_to_means():
    source, target = pair()
    assert coral_loss(source, source) == 0
    torch.testing.assert_close(coral_loss(source + 100, target - 7), coral_loss(source, target), rtol=1e-10, atol=0)
    assert torch.equal(coral_loss(source, target), coral_loss(target, source))
    assert coral_loss(source, target) > 0


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2)])
def test_all_derivatives(shape):
    source = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, shape[1], dtype=torch.float64, requires_grad=True)
    inputs = (source, target)
    assert torch.autograd.gradcheck(coral_loss, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(coral_loss, inputs)


def test_vmap_and_per_sample_gradients():
    source, target = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
    expected = torch.stack([coral_loss(s, t) for s, t in zip(source, target, strict=True)])
    torch.testing.assert_close(vmap(coral_loss)(source, target), expected)
    torch.testing.assert_close(vmap(coral_loss, (0, None))(source, target[0])[0], expected[0])
    gradients = vmap(grad(coral_loss))(source, target)
    torch.testing.assert_close(gradients[1], grad(coral_loss)(source[1], target[1]))


def test_compiled_in_one_graph():
    loss = CORALLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    source, target = pair(torch.float32)
    source.requires_grad_()
    for rows in (9, 5):
        a, b = loss(source, target[:rows]), compiled(source, target[:rows])
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(each, source)[0] for each in (a, b)))
    exported = torch.export.export(loss, (source.detach(), target)).module()
    torch.testing.assert_close(exported(source, target), loss(source, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    source, target = pair(dtype, offset=100.0)
    source.requires_grad_()
    loss = coral_loss(source, target)
    assert loss.dtype == torch.float32
    wide = source.detach().double().requires_grad_()
    exact = coral_loss(wide, target.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    loss.backward()
    exact.backward()
    assert source.grad.dtype == dtype
    torch.testing.assert_close(source.grad, wide.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    # Squares of 300 overflow float16; their covariance does not overflow float32.
    large = (300 * torch.randn(8, 2)).to(dtype)
    assert torch.isfinite(coral_loss(large, target[:, :2]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(coral_loss(source, target), loss, rtol=0, atol=0)
        assert coral_loss(source.float(), target.float()).dtype == torch.float32
    assert coral_loss(source, target.double()).dtype == torch.float64


def test_a_mean_far_from_zero_loses_nothing():
    source, target = pair(torch.float32, offset=1e4)
    exact = coral_loss(source.double(), target.double())
    torch.testing.assert_close(coral_loss(source, target).double(), exact, rtol=1e-5, atol=0)
    # As the paper writes it (equation 2), float32 loses it all.
    written = (papers_covariance(source.numpy()) - papers_covariance(target.numpy())).astype(np.float64)
    assert abs((written**2).mean() / 4 / exact.item() - 1) > 0.05


def test_minimizing_it_aligns_the_covariances():
    source, target = pair()
    matrix = torch.eye(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([matrix], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = coral_loss(source @ matrix, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    aligned = (source @ matrix).detach()
    torch.testing.assert_close(torch.cov(aligned.T), torch.cov(target.T), rtol=1e-3, atol=1e-4)


def test_the_module_is_the_function():
    source, target = pair()
    for ddof in (0, 1):
        loss = CORALLoss(ddof=ddof)
        assert torch.equal(loss(source, target), coral_loss(source, target, ddof=ddof))
        assert torch.equal(loss.eval()(source, target), loss.train()(source, target))
    assert repr(CORALLoss()) == "CORALLoss()"
    assert repr(CORALLoss(ddof=0)) == "CORALLoss(ddof=0)"
    assert not CORALLoss().state_dict()
    assert bn.nn.functional.coral_loss is coral_loss


@pytest.mark.parametrize(
    ("source", "target", "error", "text"),
    [
        ((1, 3), (5, 3), InputError, "at least 2 samples of each domain for an unbiased covariance, got 1 of source"),
        ((5, 3), (0, 3), InputError, "at least 2 samples of each domain for an unbiased covariance, got 0 of target"),
        ((1, 3, 0), (5, 3), InputError, "got 0 of source"),
        ((5, 3), (5, 4), ShapeError, "must be activations of one layer, got 3 and 4 channels"),
        ((5,), (5, 4), ShapeError, r"expected source of shape \(N, C\) or \(N, C, \*\), got \(5,\)"),
        ((5, 4), (5, 0), ShapeError, r"expected target of shape \(N, C\) or \(N, C, \*\), got \(5, 0\)"),
    ],
)
def test_bad_shapes(source, target, error, text):
    with pytest.raises(error, match=text):
        coral_loss(torch.ones(source), torch.ones(target))


def test_bad_dtypes_and_arguments():
    x = torch.ones(4, 2)
    with pytest.raises(DtypeError, match=r"expected floating-point activations, got target of torch.int64: convert"):
        coral_loss(x, x.long())
    for ddof in (2, -1, True, None):
        with pytest.raises(InputError, match=r"ddof must be 1 \(unbiased covariances\) or 0 \(biased\), got"):
            coral_loss(x, x, ddof=ddof)
        with pytest.raises(InputError, match="ddof must be 1"):
            CORALLoss(ddof=ddof)
    with pytest.raises(InputError, match="at least 1 sample of each domain, got 0 of source"):
        coral_loss(x[:0], x, ddof=0)
