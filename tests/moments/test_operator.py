"""The operator batchnorm::moments: the C++ kernel and the reference against exact arithmetic and against each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.moments import Moments
from batchnorm.moments.operator import Sums, compute, reference
from oracles.moments import exact_moments

OPERATOR = "moments"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 3, 7, 15, 16, 17, 33, 64, 100, 513, 1030]


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same(ours: Sums, expected: Sums, tolerance: float = 1e-12) -> None:
    """Within ``tolerance``; the mean relative to the deviation, m2 to itself."""
    spread = (expected.m2 / expected.n.clamp(min=1)).sqrt().nan_to_num() + 1e-6 * expected.mean.abs().nan_to_num()
    for name, got, wanted in zip(Sums._fields, ours, expected, strict=True):
        assert got.dtype == torch.float64, name
        assert got.shape == wanted.shape, name
        if name == "mean":
            got, wanted = ours.mean - expected.mean, torch.where(wanted.isnan(), wanted, 0)
            assert torch.equal(got.isnan(), wanted.isnan())
            assert bool((got.nan_to_num().abs() <= tolerance * spread).all())
        elif name != "mean_low":
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=0, equal_nan=True, msg=lambda m, n=name: n + m)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory."""
    padded = x.new_zeros(2 * x.shape[0] + 1, *[size + 3 for size in x.shape[1:]])
    inner = padded[1 : 2 * x.shape[0] : 2][(slice(None), *[slice(2, size + 2) for size in x.shape[1:]])]
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {"dense": x, "sliced": inner.copy_(x), "channels last": last, "columns": x.mT.contiguous().mT}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
def test_the_kernel_equals_the_reference(instruction_set: str, columns: int, dtype: torch.dtype) -> None:  # noqa: ARG001
    for rows in (0, 1, 5, 300):
        x = (torch.randn(rows, columns, dtype=torch.float64) * 3 + 10).to(dtype)
        with_nan = x.masked_fill(torch.rand(rows, columns) < 0.3, torch.nan)
        weights = (torch.rand(rows, dtype=torch.float64) - 0.2).clamp(min=0)
        for data in (x, with_nan):
            for memory in layouts(data).values():
                for w in (None, weights):
                    for skip_nan in (False, True):
                        assert_same(compute(memory, w, skip_nan), Sums(*reference(memory, w, skip_nan)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5), (70, 3, 49), (2, 3, 9000), (5, 1, 600), (1, 4, 1), (4, 3, 0), (2, 0, 5)])
def test_channels_with_positions(instruction_set: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:  # noqa: ARG001
    x = (torch.randn(shape, dtype=torch.float64) * 3 - 7).to(dtype)
    for data in (x, x.masked_fill(torch.rand(shape) < 0.1, torch.nan)):
        for memory in (*layouts(data).values(), data.expand(shape), data[:1].expand(shape)):
            assert_same(compute(memory, None, True), Sums(*reference(memory, None, True)))


@pytest.mark.usefixtures("kernel")
@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
    st.sampled_from([0.0, -1e4, 1e8]),
    st.sampled_from(DTYPES[:2]),
    st.booleans(),
)
def test_exact_arithmetic(seed: int, rows: int, offset: float, dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 3, dtype=torch.float64, generator=generator) * 100 + offset).to(dtype)
    missing = torch.rand(x.shape, generator=generator) < 0.2
    weights = torch.rand(rows, dtype=torch.float64, generator=generator) if weighted else None
    for sums in (
        compute(x.masked_fill(missing, torch.nan), weights, True),
        Sums(*reference(x.masked_fill(missing, torch.nan), weights, True)),
    ):
        for c in range(3):
            seen = ~missing[:, c]
            values = x[seen, c].double()
            count, mean, m2 = exact_moments(values.tolist(), None if weights is None else weights[seen].tolist())
            spread = float(m2 / count) ** 0.5 if count else 0.0
            assert abs(float(sums.n[c]) - float(count)) <= 1e-12 * float(count)
            got = Fraction(float(sums.mean[c])) + Fraction(float(sums.mean_low[c]))
            assert float(abs(got - mean)) <= 1e-12 * (spread + 1e-6 * abs(float(mean)))
            assert float(abs(Fraction(float(sums.m2[c])) - m2)) <= 1e-12 * float(m2)
            assert float(sums.low[c]) == (values.min() if len(values) else torch.inf)
            assert float(sums.high[c]) == (values.max() if len(values) else -torch.inf)


def nasty(rows: int) -> dict[str, torch.Tensor]:
    """Columns whose first values say nothing about the others."""
    noise = torch.randn(rows, dtype=torch.float64)
    outlier, nan_first, steps, late = noise + 1e8, noise + 1e8, noise.clone(), torch.full_like(noise, torch.nan)
    outlier[0] = -1e9
    nan_first[: rows // 3] = torch.nan
    steps += torch.arange(rows, dtype=torch.float64).div(700, rounding_mode="floor") * 1e8
    late[-2:] = torch.tensor([1e8, 1e8 + 1])
    return {
        "sorted": noise.sort().values + 1e8,
        "outlier": outlier,
        "nan first": nan_first,
        "steps": steps,
        "late": late,
    }


@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("kind", nasty(9).keys())
def test_origins_that_are_far_from_the_mean(instruction_set: str, kind: str, width: int) -> None:  # noqa: ARG001
    column = nasty(5000)[kind]
    _, mean, m2 = exact_moments(column[~column.isnan()].tolist())
    for weights in (None, torch.ones(5000, dtype=torch.float64)):
        sums = compute(column.unsqueeze(1).expand(-1, width).contiguous(), weights, True)
        for c in (0, width - 1):
            assert float(abs(Fraction(float(sums.m2[c])) - m2)) <= 1e-12 * float(m2)
            got = Fraction(float(sums.mean[c])) + Fraction(float(sums.mean_low[c]))
            assert float(abs(got - mean)) <= 1e-12 * float(m2 / 5000) ** 0.5 + 1e-18 * abs(float(mean))


def test_infinity_spoils_its_own_channel_and_is_an_extreme(instruction_set: str) -> None:  # noqa: ARG001
    x = torch.randn(3000, 5)
    x[7, 1], x[2999, 3] = torch.inf, -torch.inf
    for skip_nan in (False, True):
        for weights in (None, torch.ones(3000, dtype=torch.float64)):
            sums = compute(x, weights, skip_nan)
            assert sums.mean.isnan().tolist() == [False, True, False, True, False]
            assert sums.m2.isnan().tolist() == [False, True, False, True, False]
            assert sums.n.tolist() == [3000] * 5
            assert (float(sums.high[1]), float(sums.low[3])) == (torch.inf, -torch.inf)


@pytest.mark.usefixtures("kernel", "threads")
@pytest.mark.parametrize("shape", [(20_000, 10), (20_000, 300), (3, 200_000), (8, 3, 50_000), (90, 40, 300)])
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) + 1e4
    x[torch.rand(shape) < 0.01] = torch.nan
    expected = Sums(*reference(x, None, True))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first = compute(x, None, True)
        assert_same(first, expected)
        assert all(torch.equal(a, b) for a, b in zip(first, compute(x, None, True), strict=True))


@pytest.mark.usefixtures("kernel")
def test_constants_have_no_variance() -> None:
    for value in (0.1, 1e8 / 3, 1e-150, -7.0):
        sums = compute(torch.full((5000, 3), value, dtype=torch.float64), None, True)
        assert sums.m2.tolist() == [0, 0, 0]
        assert sums.mean.tolist() == [value] * 3


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    weights = torch.rand(6, dtype=torch.float64) if weighted else None
    torch.library.opcheck(torch.ops.batchnorm.moments.default, (torch.randn(6, 4), weights, True))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("x", "weights", "text"),
    [
        (torch.ones(3), None, r"expected x of shape \(N, C\) or \(N, C, P\), got 1 dimensions"),
        (torch.ones(3, 2, dtype=torch.int64), None, "expected a floating point tensor"),
        (torch.ones(3, 2), torch.ones(2, dtype=torch.float64), r"expected weights of shape \(N,\), float64"),
        (torch.ones(3, 2), torch.ones(3), r"expected weights of shape \(N,\), float64"),
    ],
)
def test_arguments(x: torch.Tensor, weights: Any, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        compute(x, weights, True)


ORDERS = {
    "moments first": "import batchnorm.moments, batchnorm.ops",
    "operators first": "import batchnorm.ops, batchnorm.preprocessing",
    "preprocessing alone": "import batchnorm.preprocessing",
    "library first": "from batchnorm._library import load; load(); import batchnorm.ops",
    "library last": "import batchnorm._library as l; load = l.load; l.load = lambda: l.Library(None)\n"
    "import batchnorm.ops.registration, batchnorm.moments; l.load = load; load()",
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_kernels_and_schemas_meet_in_any_order(order: str) -> None:
    code = f"""
{order}
import torch
from batchnorm._library import has_kernel
assert has_kernel("moments")
print(torch.ops.batchnorm.moments(torch.ones(4, 2), None, False)[0].tolist())
if "ops" in {order!r}:
    assert has_kernel("stats")
    print(torch.ops.batchnorm.stats(torch.ones(4, 2), None)[1].tolist())
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("[4.0, 4.0]")
    assert finished.stderr == ""


def test_moments_of_the_batch_come_from_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "batchnorm.moments.statistics.compute", lambda x, w, s: (calls.append(x.shape), compute(x, w, s))[1]
    )
    x = torch.randn(100, 3, 5, 5)
    moments = Moments.from_batch(x)
    assert calls == [(100, 3, 25)]
    torch.testing.assert_close(moments.mean, x.double().mean((0, 2, 3)))
