"""ScatterSum and what Scatter is made of by it: splits, memory, and who owns the matrix."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm import DtypeError, InputError, ShapeError
from batchnorm.moments import Scatter, ScatterSum
from batchnorm.moments.products import add_products
from oracles.moments import assert_exact_scatter


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.sampled_from([0.0, -1e4, 1e8]), st.booleans())
def test_any_split_in_place_or_merged_is_exact(seed: int, rows: int, offset: float, weighted: bool) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, 3)) * 10.0 ** generator.integers(-2, 3, 3) + offset
    weights = generator.random(rows) + 0.1 if weighted else None
    cuts = np.unique(generator.integers(0, rows + 1, generator.integers(0, 12)))
    parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    batches = [(x[part], None if weights is None else weights[part]) for part in parts]
    streamed = ScatterSum(3)
    for batch, w in batches:
        streamed.add(batch, weights=w)
    ones = [Scatter.from_batch(batch, weights=w) for batch, w in batches]
    into = reduce(ScatterSum.merge, ones, ScatterSum(3))
    resumed = ScatterSum.resume(reduce(Scatter.merge, ones[: len(ones) // 2], Scatter.empty(3)))
    for batch, w in batches[len(ones) // 2 :]:
        resumed.add(batch, weights=w)
    for got in (
        streamed.result(),
        Scatter.from_batches(batches),
        reduce(Scatter.merge, ones),
        into.result(),
        resumed.result(),
    ):
        assert_exact_scatter(got, x, weights)


def test_a_sum_is_one_matrix_however_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def spy(*arguments: Any) -> None:
        seen.add(arguments[-1].data_ptr())
        add_products(*arguments)

    monkeypatch.setattr("batchnorm.moments.scatter.add_products", spy)
    x = torch.randn(60, 50)
    into = ScatterSum(50)
    for batch in x.split(7):
        into.add(batch)
    result = into.result(copy=False)
    assert seen == {result.scatter.data_ptr()}
    assert_exact_scatter(result, x)
    covariance = result.cov(out=result.scatter)
    assert covariance.data_ptr() == result.scatter.data_ptr()
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.double().numpy().T, bias=True), rtol=1e-12, atol=1e-14)


def test_what_has_been_handed_over_is_not_written_again() -> None:
    x = torch.randn(30, 4)
    into = ScatterSum(4).add(x)
    copied, taken = into.result(), into.result(copy=False)
    before = taken.scatter.clone()
    assert float(into.count) == 0
    into.add(x[:5])
    assert torch.equal(taken.scatter, before)
    assert torch.equal(copied.scatter, before)
    assert_exact_scatter(into.result(), x[:5])
    resumed = ScatterSum.resume(taken).add(x[:5])
    assert torch.equal(taken.scatter, before)
    assert_exact_scatter(resumed.result(), torch.cat([x, x[:5]]))
    over = ScatterSum.resume(taken, copy=False)
    assert over._products.data_ptr() == taken.scatter.data_ptr()
    assert_exact_scatter(over.result(copy=False), x)


def test_moments_of_a_sum() -> None:
    x = torch.randn(300, 5, dtype=torch.float64) + 1e8
    into = ScatterSum(5).add(x[:100]).add(x[100:])
    moments, expected = into.moments(), into.result().moments()
    for name, value in expected.to_dict().items():
        torch.testing.assert_close(moments.to_dict()[name], value, rtol=1e-14, atol=0)
    assert float(ScatterSum(3).moments().m2.sum()) == 0
    assert torch.isnan(ScatterSum(3).result().cov()).all()


def test_blocks_for_strides_and_types_that_no_kernel_reads() -> None:
    integers = torch.randint(0, 255, (40, 3, 6, 7), dtype=torch.uint8)
    rows = integers.movedim(1, -1).reshape(-1, 3)
    assert_exact_scatter(Scatter.from_batch(integers), rows.numpy())
    apart = integers.float().permute(0, 3, 1, 2)
    rows = apart.movedim(1, -1).reshape(-1, 7)
    weights = torch.rand(40, 3, 6, dtype=torch.float64)
    assert_exact_scatter(Scatter.from_batch(apart, weights=weights), rows.numpy(), weights.flatten().numpy())


def test_covariance_in_given_memory() -> None:
    scatter = Scatter.from_batch(torch.randn(80, 7))
    before, out = scatter.scatter.clone(), torch.empty(7, 7, dtype=torch.float64)
    assert scatter.cov(1, out=out) is out
    assert torch.equal(out, scatter.cov(1))
    assert torch.equal(out, out.T)
    assert torch.equal(scatter.scatter, before)


def test_symmetry_and_turning_go_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.moments.scatter._TURNED", 3)
    x = torch.randn(50, 10) + 3
    scatter = Scatter.from_batch(x)
    assert_exact_scatter(scatter, x)
    crooked = Scatter(scatter.count, scatter.mean, scatter.mean_low, scatter.scatter + torch.randn(10, 10) * 1e-9)
    covariance = crooked.cov()
    assert torch.equal(covariance, covariance.T)
    torch.testing.assert_close(covariance, (crooked.scatter + crooked.scatter.T) / 100, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Scatter.from_batches([]), InputError, "expected at least one batch, got none"),
        (lambda: ScatterSum(2).add(np.ones((3, 3))), ShapeError, "cannot add data of 3 features to statistics of 2"),
        (lambda: ScatterSum(2).merge(Scatter.empty(3)), ShapeError, "cannot add data of 3 features to statistics of 2"),
        (lambda: ScatterSum(1).add(np.array([["a"]])), DtypeError, "expected real numbers, got an array of <U1"),
        (lambda: ScatterSum(2).add(np.ones((3, 2)), weights=[1, -2, 0]), InputError, "weights must be finite"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
