"""Ghost batches, running averages, and vectors with gaps."""

from __future__ import annotations

import pytest
import torch

from batchnorm.ops import ghost, reference
from ops.triton.interpreted.comparing import FLOAT32, KERNELS
from ops.triton.interpreted.ways import ROUTES, take

EPS = 1e-5

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize(
    ("shape", "size", "last", "route"),
    [
        ((7, 5, 3, 4), 3, True, ROUTES[0]),
        ((8, 3, 6, 6), 4, False, ROUTES[1]),
        ((7, 2, 9, 4), 3, False, ROUTES[2]),
        ((9, 6), 4, None, ROUTES[2]),
    ],
)
def test_ghosts_agree_with_the_reference(shape, size, last, route, monkeypatch):
    take(route, monkeypatch)
    x = torch.randn(shape) * 2 + 5
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    grad, residual = torch.randn_like(x), torch.randn_like(x)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if last is not None else None
    ghosts = ghost.number_of(x, size)
    affine = (weight, bias, residual)
    y, saved, sign = KERNELS.ghost_forward(x, *affine, mask, size, ghosts, EPS, "relu")
    exact = ghost.ghost_forward(x, *affine, mask, size, ghosts, EPS, "relu")
    torch.testing.assert_close(y, exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saved, exact[1], rtol=2e-6, atol=2e-6)
    assert sign.shape == exact[2].shape
    ours = KERNELS.ghost_backward(grad, x, exact[1], *affine, exact[2], mask, size, "relu", True)
    theirs = ghost.ghost_backward(grad, x, exact[1], *affine, exact[2], mask, size, "relu", True)
    for result, truth in zip(ours, theirs, strict=True):
        assert result.dtype == truth.dtype
        torch.testing.assert_close(result, truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_averages(momentum, dtype):
    channels, ghosts = 131, 4
    saved = torch.rand(ghosts, 3 * channels + 1, dtype=torch.float64)
    saved[:, -1] = torch.tensor([5.0, 0.0, 1.0, 7.0])  # with a mask: none, and one value, which has no variance
    for count in saved[:, -1]:
        ours, exact = averages(channels, dtype), averages(channels, dtype)
        batch = (saved[0, :channels].clone(), saved[1, :channels].clone(), count.clone(), momentum, torch.tensor(3), 1)
        KERNELS.update_running(*ours, *batch)
        reference.update_running(*exact, *batch)
        assert_same(ours, exact)
    ours, exact = averages(channels, dtype), averages(channels, dtype)
    KERNELS.ghost_update(*ours, saved, momentum, torch.tensor(9), 1)
    ghost.ghost_update(*exact, saved, momentum, torch.tensor(9), 1)
    assert_same(ours, exact)


def averages(channels, dtype):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.rand(channels, generator=generator).to(dtype) for _ in range(2))


def assert_same(ours, exact):
    for result, truth in zip(ours, exact, strict=True):
        # A ghost after the other rounds each time where the formula rounds once.
        bound = 4 * torch.finfo(result.dtype).eps
        torch.testing.assert_close(result, truth, rtol=bound, atol=bound)


def test_momentum_is_not_rounded_to_float32():
    running = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    KERNELS.update_running(*running, one, one, torch.tensor(8.0, dtype=torch.float64), 0.1, None, 0)
    assert running[0].item() == pytest.approx(0.1, rel=1e-15)


def test_without_momentum_and_counter_it_is_refused():
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected a momentum or num_batches, got neither"):
        KERNELS.update_running(one, one, one, one, one[0], None, None, 0)


def test_vectors_with_gaps():
    x = torch.randn(6, 4, 5)
    weight, running = torch.randn(8)[::2], torch.ones(4, 3)
    mean, var = running[:, 0], running[:, 1]
    result = KERNELS.train_step(x, weight, None, None, None, mean, var, EPS, 0.5, None, 1, "none")
    like = (torch.ones(4), torch.ones(4))
    exact = reference.train_step(x, weight, None, None, None, *like, EPS, 0.5, None, 1, "none")
    torch.testing.assert_close(result[0], exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, like[0], rtol=4 * FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(var, like[1], rtol=4 * FLOAT32, atol=FLOAT32)
    assert torch.equal(running[:, 2], torch.ones(4))  # what lies between
