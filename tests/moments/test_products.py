"""The operator batchnorm::add_products and what is made of its sums: ScatterSum and Scatter, kernel and reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from batchnorm.moments import Scatter, ScatterSum, products
from batchnorm.moments.products import add_products, reference
from oracles.moments import assert_exact_scatter

OPERATOR = "add_products"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = {"kernel": add_products, "reference": reference}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Scatter by the kernel, and by the reference."""
    if request.param == "kernel":
        request.getfixturevalue("kernel")
    monkeypatch.setattr("batchnorm.moments.scatter.add_products", IMPLEMENTATIONS[request.param])
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def summed(
    operator: Callable[..., None], x: torch.Tensor, weights: torch.Tensor | None = None, skip_nan: bool = False
) -> Scatter:
    """What an implementation makes of ``x`` alone."""
    into = ScatterSum(x.shape[1])
    operator(x, weights, skip_nan, into._count, into._origin, into._total, into._products)
    return into.result()


def assert_same(ours: Scatter, expected: Scatter, tolerance: float = 1e-12) -> None:
    """Within ``tolerance``, products relative to the deviations of both channels; NaN in the same places."""
    mean = expected.mean.abs().nan_to_num()
    spread = expected.scatter.diagonal().clamp(min=0).sqrt().nan_to_num() + 1e-9 * mean  # of a single value, 0
    torch.testing.assert_close(ours.count, expected.count, rtol=1e-14, atol=0)
    for got, wanted, unit in (
        (ours.mean, expected.mean, spread + 1e-3 * mean),
        (ours.scatter, expected.scatter, torch.outer(spread, spread)),
    ):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert bool(((got - wanted).nan_to_num().abs() <= tolerance * unit).all())
    assert torch.equal(ours.scatter.nan_to_num(), ours.scatter.T.nan_to_num())


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory."""
    padded = x.new_zeros(2 * x.shape[0] + 1, *[size + 3 for size in x.shape[1:]])
    inner = padded[1 : 2 * x.shape[0] : 2][(slice(None), *[slice(2, size + 2) for size in x.shape[1:]])]
    apart = x.new_zeros(*x.shape, 2)[..., 1]
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {
        "dense": x,
        "sliced": inner.copy_(x),
        "apart": apart.copy_(x),
        "channels last": last,
        "columns": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "transposed": x.mT.contiguous().mT,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [*range(1, 36), 40, 47, 64, 70, 100, 193, 260])
def test_the_kernel_equals_the_reference(instruction_set: str, columns: int, dtype: torch.dtype) -> None:  # noqa: ARG001
    for rows in (0, 1, 9, 300) if columns < 36 else (7, 300):
        x = (torch.randn(rows, columns, dtype=torch.float64) * 3 + 10).to(dtype)
        with_nan = x.masked_fill(torch.rand(rows, columns) < 0.2 / columns, torch.nan)
        weights = (torch.rand(rows, dtype=torch.float64) - 0.2).clamp(min=0)
        for number, memory in enumerate(layouts(x).values()):
            w = weights if number % 2 else None
            assert_same(summed(add_products, memory, w), summed(reference, x, w))
        for number, memory in enumerate(layouts(with_nan).values()):
            for skip_nan in (False, True):
                w = None if number % 2 else weights
                assert_same(summed(add_products, memory, w, skip_nan), summed(reference, with_nan, w, skip_nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5), (70, 3, 49), (2, 3, 900), (5, 1, 600), (1, 4, 1), (4, 3, 0), (2, 0, 5)])
def test_channels_with_positions(instruction_set: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:  # noqa: ARG001
    x = (torch.randn(shape, dtype=torch.float64) * 3 - 7).to(dtype)
    for data in (x, x.masked_fill(torch.rand(shape) < 0.1, torch.nan)):
        for memory in (*layouts(data).values(), data[:1].expand(shape)):
            assert_same(summed(add_products, memory, None, True), summed(reference, memory, None, True))


def nasty(rows: int) -> dict[str, torch.Tensor]:
    """Columns whose first values say nothing about the others."""
    noise = torch.randn(rows, dtype=torch.float64)
    outlier, steps, jump, late = noise + 1e8, noise.clone(), noise.clone(), torch.zeros_like(noise)
    outlier[0] = -1e9
    steps += torch.arange(rows, dtype=torch.float64).div(70, rounding_mode="floor") * 1e8
    jump[rows // 50 :] += 1e8
    late[-2:] = torch.tensor([1e8, 1e8 + 1])
    return {"sorted": noise.sort().values + 1e8, "outlier": outlier, "steps": steps, "jump": jump, "late": late}


@pytest.mark.parametrize("kind", nasty(9).keys())
def test_origins_that_are_far_from_the_mean(implementation: str, kind: str) -> None:  # noqa: ARG001
    column = nasty(3000)[kind]
    x = torch.stack([column, torch.randn(3000, dtype=torch.float64), column.flip(0)], dim=1)
    assert_exact_scatter(Scatter.from_batch(x), x)
    assert_exact_scatter(Scatter.from_batches(x.split(171)), x)
    assert_exact_scatter(Scatter.from_batches([x.new_zeros(0, 3), x[:1], x[1:]]), x)


@pytest.mark.usefixtures("kernel")
def test_the_origin_follows_the_data() -> None:
    # The first block has no variance at all and lies a million deviations from what comes after it.
    x = torch.cat([torch.full((128, 2), -1e6), torch.randn(200_000, 2)]).double()
    into = ScatterSum(2).add(x)
    deviation = (into.moments().var() ** 0.5).max()
    assert bool(((into._origin - into.moments().mean).abs() < 5 * deviation).all())
    torch.testing.assert_close(into.result().cov(), torch.cov(x.T, correction=0), rtol=1e-12, atol=0)


def test_constants_have_no_variance(implementation: str) -> None:
    for value in (0.1, 1e8 / 3, 1e-150, -7.0):
        x = torch.full((1000, 3), value, dtype=torch.float64)
        x[:, 1] = torch.arange(1000)
        scatter = Scatter.from_batch(x)
        allowed = 0 if implementation == "kernel" else 1e-28 * 1000 * value * value
        assert float(scatter.scatter[0, 0]) <= allowed
        assert abs(float(scatter.scatter[0, 1])) <= 1e6 * allowed**0.5


def test_a_sample_that_is_incomplete_or_has_no_weight_is_absent(implementation: str) -> None:  # noqa: ARG001
    x = torch.randn(700, 20, dtype=torch.float64) + 1e4
    weights = torch.rand(700, dtype=torch.float64)
    weights[::7] = 0
    holes = x.clone()
    holes[::7] = torch.inf
    holes[torch.arange(3, 700, 5), torch.arange(3, 700, 5) % 20] = torch.nan
    kept = (weights > 0) & ~holes.isnan().any(1)
    got = Scatter.from_batch(holes, weights=weights, skip_nan=True)
    assert_exact_scatter(got, x[kept].numpy(), weights[kept].numpy())
    whole = Scatter.from_batch(holes.masked_fill(holes.isinf(), 1.0), skip_nan=True)
    kept = ~holes.isnan().any(1)
    assert_exact_scatter(whole, torch.where(holes.isinf(), 1.0, holes)[kept].numpy())
    nothing = Scatter.from_batch(torch.full((300, 4), torch.nan), skip_nan=True)
    assert float(nothing.count) == 0
    assert not nothing.scatter.any()


def test_bad_values_spoil_their_own_products_only(implementation: str) -> None:  # noqa: ARG001
    x = torch.randn(500, 30, dtype=torch.float64)
    x[3, 1], x[499, 7], x[0, 20] = torch.nan, torch.inf, -torch.inf
    spoilt = torch.zeros(30, dtype=torch.bool)
    spoilt[[1, 7, 20]] = True
    got = Scatter.from_batch(x)
    assert torch.equal(got.scatter.isnan(), spoilt.unsqueeze(0) | spoilt.unsqueeze(1))
    assert torch.equal(got.mean.isnan(), spoilt)
    kept = ~spoilt
    assert_exact_scatter(Scatter(got.count, got.mean[kept], got.mean_low[kept], got.scatter[kept][:, kept]), x[:, kept])


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("shape", [(40_000, 12), (3_000, 150), (9_000, 140), (700, 300), (12, 20, 3_000)])
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) + 1e4
    x[len(x) // 2 :, 0] += 1e3
    x[torch.rand(shape) < 0.3 / x.shape[1]] = torch.nan
    expected = summed(reference, x, None, True)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, second = summed(add_products, x, None, True), summed(add_products, x, None, True)
        assert_same(first, expected)
        assert torch.equal(first.scatter, second.scatter)


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    weights = torch.rand(6, dtype=torch.float64) if weighted else None
    into = ScatterSum(4).add(torch.randn(5, 4))
    sums = into._count, into._origin, into._total, into._products.tril()
    torch.library.opcheck(torch.ops.batchnorm.add_products.default, (torch.randn(6, 4), weights, True, *sums))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("x", "weights", "products", "text"),
    [
        (torch.ones(3), None, torch.zeros(2, 2), r"expected x of shape \(N, C\) or \(N, C, P\), got 1 dimensions"),
        (torch.ones(3, 2, dtype=torch.int64), None, torch.zeros(2, 2), "expected a floating point tensor"),
        (torch.ones(3, 2), torch.ones(3), torch.zeros(2, 2), r"expected weights of shape \(N,\), float64"),
        (torch.ones(3, 2), None, torch.zeros(2, 3), "expected products to be 4 contiguous float64 values"),
        (
            torch.ones(3, 2),
            None,
            torch.zeros(2, 4, dtype=torch.float64)[:, ::2],
            "expected products to be 4 contiguous float64 values",
        ),
    ],
)
def test_arguments(x: torch.Tensor, weights: Any, products: torch.Tensor, text: str) -> None:
    into = ScatterSum(2)
    with pytest.raises(RuntimeError, match=text):
        add_products(x, weights, True, into._count, into._origin, into._total, products.double())


def test_the_reference_adds_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr("batchnorm.moments.blocks._BLOCK_MIN_ROWS", 4)
    x = torch.randn(90, 5, 3, dtype=torch.float64) + 1e8
    x[4, 2, 1] = torch.nan
    rows = x.movedim(1, -1).reshape(-1, 5)
    assert_exact_scatter(summed(reference, x, None, True), rows[~rows.isnan().any(1)].numpy())
