from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from batchnorm.ops import native, selftest
from cli.commandline import Outcome

Call = Callable[..., Outcome]


def check(**changes: Any) -> selftest.Check:
    made: dict[str, Any] = {
        "op": "train_forward",
        "device": "cpu",
        "dtype": "float32",
        "memory_format": "channels_last",
        "implementation": "native",
        "error": 2.1e-7,
        "peer_error": 7.3e-4,
        "tolerance": 7.4e-4,
        "passed": True,
        "note": "",
    }
    return selftest.Check(**(made | changes))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[selftest.Check]:
    checks: list[selftest.Check] = []
    monkeypatch.setattr(selftest, "run", lambda: checks)
    return checks


def test_each_check_is_shown_beside_torch(call: Call, found: list[selftest.Check]) -> None:
    found += [check(), check(op="stats [mask]", peer_error=None), check(dtype="bfloat16", note="mean 1e4")]
    outcome = call("selftest")
    assert outcome.code == 0
    assert outcome.out.startswith(f"implementation: {native.status().active} (")
    assert "cpu, float32, channels_last  " in outcome.out
    assert "cpu, bfloat16, channels_last, mean 1e4" in outcome.out
    row = next(line for line in outcome.out.splitlines() if "train_forward" in line)
    assert row.split() == ["train_forward", "native", "2.1e-07", "7.3e-04", "7.4e-04", "passed"]
    assert next(line for line in outcome.out.splitlines() if "stats [mask]" in line).split()[4] == "\u2013"
    assert outcome.out.endswith("all 3 checks passed\n")
    assert all(character == "\n" or character >= " " for character in outcome.out)


def test_a_failed_check_is_exit_code_1(call: Call, found: list[selftest.Check]) -> None:
    found += [check(), check(error=math.inf, passed=False)]
    outcome = call("selftest")
    assert outcome.code == 1
    assert "FAILED" in outcome.out
    assert outcome.out.endswith("1 of 2 checks failed\n")


def test_json_is_one_document_even_with_infinities(call: Call, found: list[selftest.Check]) -> None:
    found += [check(), check(error=math.nan, passed=False)]
    outcome = call("selftest", "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 1
    assert document["passed"] is False
    assert document["implementation"]["active"] in ("native", "reference")
    assert [item["error"] for item in document["checks"]] == [2.1e-7, None]


def test_the_real_checks_pass_here(call: Call) -> None:
    document = json.loads(call("selftest", "--json").out)
    assert document["passed"], [item for item in document["checks"] if not item["passed"]]
    assert len(document["checks"]) > 10
