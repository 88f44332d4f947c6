"""The GPU's benchmark from end to end on the CPU, with a made-up clock and card: its time on a card is dear."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install batchnorm[gpu])")

from benchmarks import bench_batch_norm_gpu as benchmark
from benchmarks import harness

CARD = SimpleNamespace(name="a card", multi_processor_count=2, L2_cache_size=1 << 12)


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(call: Callable[[], object]) -> float:
        begun = time.perf_counter()
        call()
        return (time.perf_counter() - begun) * 1e3

    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(benchmark, "SHAPES", ((8, 9, 5, 5), (8, 9, 4, 4), (4, 16, 3, 3)))
    monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(benchmark, "why_not", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: CARD)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(harness.options, "quick", True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_checks_times_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "gpu.csv"
    assert benchmark.main(path) == 0
    rows = rows_of(path)
    # Two shapes in two types, each with and without an addition, by three contenders.
    assert len(rows) == 2 * 2 * 2 * 3
    assert {row["contender"] for row in rows} == set(benchmark.CONTENDERS)
    for row in rows:
        assert row["device"] == "a card"
        assert row["passed"] == ("True" if row["contender"] == "ours" else "")
        assert float(row["ms 20%"]) <= float(row["ms"]) <= float(row["ms 80%"])
        moved = (7, 10) if row["kind"] == "add+relu" else (5, 8)
        assert float(row["read twice"]) / float(row["of the ceiling"]) == pytest.approx(moved[1] / moved[0])
    shown = capsys.readouterr().out
    assert shown.count("x eager") == 2 * len(rows) // 3  # as it goes, and in the table
    assert "all checks passed" in shown
    assert "WRONG" not in shown


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_a_wrong_result_fails(
    wrong: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = benchmark.Ours.forward

    def forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = right(self, x, residual)
        return torch.cat([y[:-1], y[-1:] * wrong])

    monkeypatch.setattr(benchmark.Ours, "forward", forward)
    assert benchmark.main(tmp_path / "gpu.csv") == 1
    shown = capsys.readouterr().out
    assert "8 checks FAILED" in shown
    assert shown.count("WRONG") == 16


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "why_not", lambda: "no NVIDIA GPU here")
    assert benchmark.main(Path("never.csv")) == 2
    assert capsys.readouterr().err == "no benchmark of the GPU kernels: no NVIDIA GPU here\n"
    assert not Path("never.csv").exists()
