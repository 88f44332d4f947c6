"""The self-test must pass here, cover every operator, and fail when something is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from batchnorm.ops import native, reference, selftest
from batchnorm.ops.schema import SCHEMAS


def test_it_passes_and_covers_everything():
    checks = selftest.run(["cpu"])
    assert [check for check in checks if not check.passed] == []
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        for memory_format in ("contiguous", "channels_last"):
            here = [c for c in checks if (c.dtype, c.memory_format, c.device) == (dtype, memory_format, "cpu")]
            assert {check.op.split(" + ")[0] for check in here} == set(SCHEMAS)
            assert all(math.isfinite(c.error) and c.error < 0.01 for c in here)
    assert any(check.note for check in checks)
    kernels = set(native.status().operators)
    for check in checks:
        assert (check.implementation == "native") == (check.op.split(" + ")[0] in kernels)


@pytest.mark.parametrize("spoil", [lambda y: y * 1.001, lambda y: y * float("nan")], ids=["inexact", "NaN"])
def test_it_notices_a_wrong_result(monkeypatch, spoil):
    right = reference.grad_sums

    class Spoilt:
        def __getattr__(self, name):
            original = getattr(torch.ops.batchnorm, name)
            if name != "grad_sums":
                return original
            return lambda *args: tuple(spoil(value) for value in right(*args))

    results = selftest._results
    monkeypatch.setattr(
        selftest, "_results", lambda ops, data: results(Spoilt() if ops is torch.ops.batchnorm else ops, data)
    )
    failed = {check.op for check in selftest.run(["cpu"]) if not check.passed and check.dtype == "float32"}
    # grad_input takes the sums, so that it is wrong with them.
    assert failed == {"grad_sums", "grad_input"}


def test_the_same_seed_gives_the_same_checks():
    assert selftest.run(["cpu"], seed=3) == selftest.run(["cpu"], seed=3)
    assert selftest.run(["cpu"], seed=3) != selftest.run(["cpu"], seed=4)
