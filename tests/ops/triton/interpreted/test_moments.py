"""``batchnorm::moments`` on a GPU, in the interpreter: exact arithmetic and the reference beside it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from batchnorm.moments import cuda
from batchnorm.moments.operator import Sums, reference
from oracles.moments import exact_moments


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices and tiles of columns of a small table."""
    monkeypatch.setattr(cuda, "_ROWS", 4)
    monkeypatch.setattr(cuda, "_FEATURES", 4)
    monkeypatch.setattr(cuda, "_POSITIONS", (16, 8, 4))
    monkeypatch.setattr(cuda, "_LEAST_TILES", 2)


def assert_same(x: torch.Tensor, weights: torch.Tensor | None, skip_nan: bool) -> Sums:
    ours = Sums(*cuda.moments(x, weights, skip_nan))
    for name, result, truth in zip(Sums._fields, ours, reference(x, weights, skip_nan), strict=True):
        assert result.dtype == torch.float64
        if name != "mean_low":
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-15, equal_nan=True, msg=name)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_type_with_and_without_weights(dtype: torch.dtype) -> None:
    x = (torch.randn(37, 6) * 3 + 10).to(dtype)
    assert_same(x, None, False)
    weights = torch.rand(37, dtype=torch.float64)
    weights[::5] = 0
    x[5] = torch.nan  # without weight, whatever it holds
    ours = assert_same(x, weights, False)
    assert bool(ours.m2.isfinite().all())


@pytest.mark.parametrize("skip_nan", [False, True])
def test_nan_and_infinity_stay_in_their_column(skip_nan: bool) -> None:
    x = torch.randn(29, 5)
    x[3, 1] = torch.nan
    x[20, 2] = torch.inf
    x[:, 4] = torch.nan
    ours = assert_same(x, None, skip_nan)
    assert bool(ours.m2[[0, 3]].isfinite().all())
    assert ours.m2[2].isnan()


def test_an_offset_of_1e8_costs_no_digits() -> None:
    x = (torch.randn(61, 3, dtype=torch.float64) + 1e8).float()
    x[0, 2] = -3e8  # a column that begins with an outlier
    ours = cuda.moments(x, None, False)
    for feature in range(3):
        _, mean, m2 = exact_moments(x[:, feature].tolist())
        got = Fraction(ours[1][feature].item()) + Fraction(ours[2][feature].item())
        deviation = float(m2 / 61) ** 0.5
        assert abs(float(got - mean)) <= 1e-12 * deviation
        assert abs(float(Fraction(ours[3][feature].item()) - m2)) <= 1e-12 * float(m2)


@pytest.fixture
def _no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.moments.operator.reference", lambda *_: pytest.fail("the kernel serves these"))


@pytest.mark.usefixtures("_no_reference")
@pytest.mark.parametrize("shape", [(5, 3, 35), (23, 2, 4), (3, 6, 1), (1, 1, 50), (9, 5, 7)], ids=str)
@pytest.mark.parametrize("layout", ["planes", "channels_last", "planes with gaps"])
@pytest.mark.parametrize("skip_nan", [False, True])
def test_images(shape: tuple[int, int, int], layout: str, skip_nan: bool) -> None:
    samples, features, positions = shape
    x = torch.randn(samples, features, positions) * 2 + 100
    x[-1, 0, -1] = torch.nan
    x[0, -1, 0] = 1e4  # what a channel begins with may be an outlier
    if layout == "channels_last":
        x = x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    elif layout == "planes with gaps":
        x = torch.cat([x, x], 1)[:, :features]
    assert_same(x, None, skip_nan)


def test_rows_with_gaps_and_what_it_leaves_to_the_reference() -> None:
    wide = torch.randn(20, 9)
    assert_same(wide[::2, :5], None, False)
    assert_same(wide[:, ::2], None, False)
    assert_same(torch.randn(5, 3, 14)[:, :, ::2], None, False)
    assert_same(torch.randn(7, 5, 3).transpose(1, 2)[::2], None, False)  # channels-last samples with gaps
    nothing = Sums(*cuda.moments(torch.randn(4, 3), torch.zeros(4, dtype=torch.float64), False))
    assert not nothing.mean.any()
    assert not nothing.m2.any()
    assert nothing.low.tolist() == [torch.inf] * 3
