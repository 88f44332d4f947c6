"""Moments and Scatter against exact rational arithmetic: splits, weights, masks, NaN, offsets, dtypes, layouts."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm.moments.blocks as blocks
import batchnorm.moments.operator as operator
from batchnorm import DtypeError, InputError, ShapeError
from batchnorm.moments import Moments, Scatter, as_tensor, bessel_factor, pooled
from oracles.moments import exact_moments, extended_scatter

OFFSETS = st.sampled_from([0.0, 1.0, -1e4, 1e8])
SEEDS = st.integers(0, 2**32 - 1)


def assert_exact(moments: Moments, columns: list[Any], weights: Any = None, tolerance: float = 1e-12) -> None:
    """Every feature's statistics within ``tolerance`` of the exact ones; m2 relative to itself, not to the mean."""
    for feature, column in enumerate(columns):
        count, mean, m2 = exact_moments(column, weights)
        got_mean = Fraction(float(moments.mean[feature])) + Fraction(float(moments.mean_low[feature]))
        got_m2 = Fraction(float(moments.m2[feature]))
        assert float(abs(float(moments.count[feature]) - count)) <= tolerance * float(count)
        spread = float(m2 / count) ** 0.5 if count else 0.0
        assert float(abs(got_mean - mean)) <= tolerance * (spread + 1e-6 * float(abs(mean)))
        assert float(abs(got_m2 - m2)) <= tolerance * float(m2)


def data(seed: int, rows: int, columns: int, offset: float) -> Any:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, columns)) * 10.0 ** generator.integers(-2, 3, columns) + offset


def random_parts(rows: int, seed: int) -> list[slice]:
    generator = np.random.default_rng(seed)
    cuts = np.unique(generator.integers(0, rows + 1, generator.integers(0, rows + 1)))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 60), OFFSETS)
def test_any_split_in_any_order_merges_to_the_exact_moments(seed: int, rows: int, offset: float) -> None:
    x = data(seed, rows, 2, offset)
    parts = [Moments.from_batch(x[part]) for part in random_parts(rows, seed)]
    np.random.default_rng(seed).shuffle(parts)
    merged = reduce(Moments.merge, parts)
    assert_exact(merged, list(x.T))
    assert_exact(reduce(lambda a, b: b.merge(a), parts), list(x.T))
    assert_exact(Moments.from_batch(x), list(x.T))


def test_row_by_row_at_an_offset_of_1e8_is_exact_where_one_float64_mean_is_not() -> None:
    x = data(0, 3000, 1, 0.0) / 100 + 1e8
    merged = reduce(Moments.merge, (Moments.from_batch(row[None]) for row in x))
    assert_exact(merged, [x[:, 0]])
    # The same merge with the low part thrown away each time: what the second part is for.
    plain = Moments.empty(1)
    for row in x:
        step = plain.merge(Moments.from_batch(row[None]))
        plain = Moments(step.count, step.mean, torch.zeros(1, dtype=torch.float64), step.m2)
    exact = float(exact_moments(x[:, 0])[2])
    assert abs(float(plain.m2) - exact) > 1e-11 * exact


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 40), OFFSETS)
def test_weights_nan_and_merging_together(seed: int, rows: int, offset: float) -> None:
    generator = np.random.default_rng(seed)
    x = data(seed, rows, 3, offset)
    x[generator.random(x.shape) < 0.3] = np.nan
    weights = generator.integers(0, 4, rows) * generator.choice([1.0, 0.37])
    parts = [Moments.from_batch(x[part], weights=weights[part], skip_nan=True) for part in random_parts(rows, seed)]
    merged = reduce(Moments.merge, parts)
    for feature in range(3):
        seen = ~np.isnan(x[:, feature])
        one = Moments(*(t[feature : feature + 1] for t in (merged.count, merged.mean, merged.mean_low, merged.m2)))
        assert_exact(one, [x[seen, feature]], weights[seen])


@pytest.mark.parametrize("block", [1, 7, 64, 2**17])
@pytest.mark.parametrize("shape", [(6, 3), (5, 4, 7), (3, 2, 4, 5), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_of_tensors_of_any_rank_and_any_block_size(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int, block: int
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(blocks, "_BLOCK_MIN_ROWS", 1)
    x = torch.from_numpy(data(1, int(np.prod(shape)), 1, 1e8).reshape(shape))
    moments = Moments.from_batch(x, channel_axis=axis)
    assert_exact(moments, list(x.movedim(axis, 0).flatten(1).numpy()))
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert_exact(Moments.from_batch(strided, channel_axis=axis), list(x.movedim(axis, 0).flatten(1).numpy()))


@pytest.mark.parametrize("block", [5, 2**17])
def test_a_mask_leaves_out_padding_whatever_it_holds(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(blocks, "_BLOCK_MIN_ROWS", 1)
    x = torch.randn(4, 2, 6, dtype=torch.float64) + 100
    lengths = torch.tensor([6, 1, 3, 0])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    x = x.masked_fill(~mask.unsqueeze(1), torch.nan)
    x[3, 0] = torch.inf
    real = x.movedim(1, 0)[:, mask]
    assert_exact(Moments.from_batch(x, mask=mask), list(real.numpy()))
    weights = torch.tensor([1.0, 2.5, 0.5, 1.0], dtype=torch.float64)
    per_value = weights.unsqueeze(1).expand(4, 6)[mask]
    assert_exact(Moments.from_batch(x, mask=mask, weights=weights), list(real.numpy()), per_value)
    assert_exact(Moments.from_batch(x, mask=mask, weights=weights.unsqueeze(1)), list(real.numpy()), per_value)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int16, torch.int64, torch.bool]
)
def test_every_real_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    x = (torch.rand(50, 2) * 4).to(dtype)
    assert_exact(Moments.from_batch(x), list(x.double().T.numpy()))


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((70000, 1), 60000.0, dtype=torch.float16)
    x[::2] = -60000
    moments = Moments.from_batch(x)
    assert abs(float(moments.mean)) <= 1e-16 * 60000
    assert float(moments.std()) == float(x[0].double().abs())


def test_numpy_enters_without_a_copy_and_is_never_written() -> None:
    x = np.random.default_rng(0).standard_normal((10, 2))
    assert as_tensor(x).data_ptr() == x.ctypes.data
    x.flags.writeable = False
    before = x.copy()
    assert as_tensor(x).data_ptr() == x.ctypes.data
    assert_exact(Moments.from_batch(x), list(before.T))
    np.testing.assert_array_equal(x, before)
    for other in (x[::-1], x.astype(">f8"), x.astype(np.longdouble), np.asfortranarray(x), x.tolist()):
        np.testing.assert_allclose(Moments.from_batch(other).var().numpy(), x.var(0), rtol=1e-14)


def test_a_float64_tensor_and_its_gradient_are_left_alone() -> None:
    x = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    moments = Moments.from_batch(x)
    assert torch.equal(x, before)
    assert not moments.mean.requires_grad


def test_channel_axis_none_is_one_statistic_of_all_values() -> None:
    x = data(3, 12, 5, 7.0)
    assert_exact(Moments.from_batch(x, channel_axis=None), [x.ravel()])
    assert_exact(Moments.from_batch(x[0], channel_axis=None), [x[0]])
    assert float(Moments.from_batch(3.5, channel_axis=None).mean) == 3.5


def test_empty_batches_and_what_is_undefined() -> None:
    empty = Moments.from_batch(np.zeros((0, 3)))
    assert empty.count.tolist() == [0, 0, 0]
    assert empty.mean.tolist() == [0, 0, 0]
    assert torch.isnan(empty.var()).all()
    one = Moments.from_batch([[1e8 + 0.5, 2, 3]])
    for merged in (empty.merge(one), one.merge(empty)):
        assert merged.mean.tolist() == [1e8 + 0.5, 2, 3]
        assert merged.var().tolist() == [0, 0, 0]
        assert torch.isnan(merged.var(ddof=1)).all()
    assert float(Moments.from_batch(np.zeros((4, 0))).merge(Moments.empty(0)).count.sum()) == 0


def test_bad_values_spoil_their_own_channel_only() -> None:
    x = np.ones((5, 4)) * [1, 2, 3, 4]
    x[2, 0], x[3, 2] = np.nan, np.inf
    moments = Moments.from_batch(x)
    assert torch.isnan(moments.mean).tolist() == [True, False, True, False]
    assert torch.isnan(moments.m2).tolist() == [True, False, True, False]
    assert moments.mean[1::2].tolist() == [2, 4]
    assert Moments.from_batch(x, skip_nan=True).mean[0] == 1


def test_constant_data_have_no_variance_at_any_magnitude() -> None:
    for value in (0.1, 1 / 3, 1e8 / 3, 1e-200, 1e150 / 7):
        assert float(Moments.from_batch(np.full((1001, 1), value)).m2) <= 1e-30 * value**2


def test_bessel() -> None:
    x = data(5, 9, 2, 3.0)
    moments, scatter = Moments.from_batch(x), Scatter.from_batch(x)
    np.testing.assert_allclose(moments.var(ddof=1).numpy(), x.var(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(moments.std(ddof=1).numpy(), x.std(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(scatter.cov(ddof=1).numpy(), np.cov(x.T), rtol=1e-12)
    assert bessel_factor(5) == 1.25
    assert np.isnan(bessel_factor(1))
    assert bessel_factor(torch.tensor([5.0, 1.0]))[0] == 1.25


@settings(max_examples=25)
@given(SEEDS, st.integers(2, 40), OFFSETS)
def test_scatter_of_any_split(seed: int, rows: int, offset: float) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, 3)) @ generator.standard_normal((3, 3)) + offset
    weights = generator.random(rows) + 0.1
    merged = reduce(Scatter.merge, (Scatter.from_batch(x[p], weights=weights[p]) for p in random_parts(rows, seed)))
    mean, scatter = extended_scatter(x, weights)
    bound = np.sqrt(np.outer(np.diag(scatter), np.diag(scatter)))
    assert (np.abs(merged.scatter.numpy() - scatter) <= 1e-12 * bound).all()
    np.testing.assert_allclose(merged.mean.numpy(), mean, rtol=1e-15, atol=1e-14)
    assert_exact(merged.moments(), list(x.T), weights)


@pytest.mark.parametrize("block", [4, 2**17])
def test_scatter_takes_positions_as_samples_and_leaves_out_incomplete_ones(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(blocks, "_BLOCK_MIN_ROWS", 1)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    x[1, 2, 3] = torch.nan
    mask = torch.rand(4, 5) < 0.8
    rows = x.movedim(1, -1)[mask]
    rows = rows[~rows.isnan().any(1)]
    got = Scatter.from_batch(x, mask=mask, skip_nan=True)
    assert float(got.count) == len(rows)
    np.testing.assert_allclose(got.cov().numpy(), np.cov(rows.numpy().T, bias=True), rtol=1e-11, atol=1e-14)
    absent = Scatter.from_batch([[1.0, 2.0], [torch.nan, torch.inf], [3.0, 0.0]], weights=[1, 0, 2])
    np.testing.assert_allclose(absent.cov().numpy(), np.cov([[1, 3, 3], [2, 0, 0]], bias=True), rtol=1e-14)
    spoilt = torch.isnan(Scatter.from_batch(x).scatter)
    assert spoilt.sum() == 5
    assert spoilt[2].all()


def test_cov_is_exactly_symmetric() -> None:
    cov = Scatter.from_batch(torch.randn(101, 37) + 1e3).cov()
    assert torch.equal(cov, cov.T)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_pooling_is_merging(offset):
    """All at once, sets of any size, empty ones too, give what merging one after the other does."""
    whole = torch.randn(40, 3, dtype=torch.float64) + offset
    parts = [Moments.from_batch(part) for part in whole.split([7, 0, 1, 20, 12])]
    count, mean, m2 = pooled(
        *(torch.stack([getattr(part, name) for part in parts]) for name in ("count", "mean", "m2"))
    )
    merged = reduce(Moments.merge, parts)
    # One float64 holds a mean of 1e8 to 1e-8.
    torch.testing.assert_close(mean, merged.mean, rtol=1e-15, atol=1e-12)
    torch.testing.assert_close(m2, merged.m2, rtol=1e-12 + 1e-15 * offset, atol=0)
    assert torch.equal(count, merged.count)


def test_pooling_nothing_gives_nothing():
    zero = torch.zeros(4, 3, dtype=torch.float64)
    for value in pooled(zero[:, :1], zero, zero):
        assert torch.equal(value, torch.zeros_like(value))


def test_dictionaries_and_devices() -> None:
    for made in (Moments.from_batch(data(1, 5, 3, 1e8)), Scatter.from_batch(data(1, 5, 3, 1e8))):
        again = type(made).from_dict(made.to_dict())
        assert all(torch.equal(value, again.to_dict()[name]) for name, value in made.to_dict().items())
        assert made.to("cpu").device.type == "cpu"
        with pytest.raises(InputError, match=r"needs the tensors \['count', .*got \['mean'\]"):
            type(made).from_dict({"mean": made.mean})


def test_merging_leaves_both_as_they_were() -> None:
    a, b = Scatter.from_batch(data(1, 5, 2, 0.0)), Scatter.from_batch(data(2, 5, 2, 0.0))
    before = [t.clone() for t in (*a.to_dict().values(), *b.to_dict().values())]
    a.merge(b)
    assert all(torch.equal(t, u) for t, u in zip((*a.to_dict().values(), *b.to_dict().values()), before, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: Moments.from_batch(np.ones(3)),
            ShapeError,
            r"channel_axis=1 needs data with more axes, got shape \(3,\)",
        ),
        (
            lambda: Moments.from_batch(torch.ones(2, 2) * 1j),
            DtypeError,
            "expected real numbers, got a tensor of torch.com",
        ),
        (lambda: Moments.from_batch(np.array([["a"]])), DtypeError, "expected real numbers, got an array of <U1"),
        (lambda: Moments.from_batch(np.ones((3, 2)), weights=[1, 2]), ShapeError, r"weights must have shape \(3,\)"),
        (
            lambda: Moments.from_batch(np.ones((3, 2)), weights=[1, -2, 0]),
            InputError,
            "weights must be finite and not neg",
        ),
        (lambda: Moments.from_batch(np.ones((3, 2)), mask=[1, 0, 1]), DtypeError, "mask must be boolean"),
        (
            lambda: Moments.from_batch(np.ones((3, 2, 4)), mask=np.ones((3, 2, 4), bool)),
            ShapeError,
            r"mask must have shape \(3,\) or \(3, 4\).*got \(3, 2, 4\)",
        ),
        (lambda: Moments.empty(2).merge(Moments.empty(3)), ShapeError, "cannot merge statistics of 3 features into 2"),
        (lambda: Moments.empty(2).merge(Scatter.empty(2)), DtypeError, "expected Moments to merge, got Scatter"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_temporaries_stay_small(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 4, 500, 1000) * 100).to(dtype).transpose(2, 3)  # strides that no kernel reads
    seen = [part.numel() for part, _ in operator.pieces(x, None, 1)]
    assert max(seen) <= blocks._BLOCK_ELEMENTS
    assert sum(seen) == x.numel()
    np.testing.assert_allclose(Moments.from_batch(x).var(), x.double().var((0, 2, 3), correction=0), rtol=1e-12)


def test_what_a_kernel_can_read_is_not_cut_or_copied() -> None:
    x = torch.randn(6, 4, 500, 50)
    last, first = x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous()
    for data, axis in (
        (x, 1),
        (last, 1),
        (last.permute(0, 2, 3, 1), -1),
        (first, 0),
        (x[:, :, 0, 0], 1),
        (x[:, :, 0], 1),
    ):
        [(part, _)] = operator.pieces(data, None, axis)
        assert part.data_ptr() == data.data_ptr()
