"""The short examples run, and come to what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_averaged_weights_need_statistics_of_their_own():
    found = example("recalibrate_after_ema").main([])
    assert found["average, recalibrated"] > 0.9
    assert found["average, recalibrated"] > found["average, statistics averaged"] + 0.05


def test_a_folded_and_exported_convnet_answers_as_before(tmp_path):
    found = example("fold_and_export").main(["--out", str(tmp_path / "digits.pt2")])
    assert (tmp_path / "digits.pt2").exists()
    assert found["before"] > 0.85
    assert found["after"] == pytest.approx(found["before"], abs=0.005)
    assert found["difference"] < 1e-3


def test_files_are_learned_from_and_shipped_with_the_network():
    found = example("data_larger_than_memory").main(["--rows", "16000"])
    assert found["rows"] == 16000
    assert found["explained"] > 0.9


def test_normalizations_are_compared_on_a_network(tmp_path, capsys):
    comparison = example("compare_your_network").main(
        ["--steps", "20", "--seeds", "2", "--out", str(tmp_path / "page.html")]
    )
    assert str(comparison.verdict) in capsys.readouterr().out
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_every_example_has_a_test():
    tested = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tested or f'"{path.name}"' in tested
