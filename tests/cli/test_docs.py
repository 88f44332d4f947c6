"""The commands of docs/command-line.md run, in their order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cli.commandline import Outcome

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("plotly")

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
Call = Callable[..., Outcome]


def test_every_command_runs(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, rows in (("x", 300), ("more", 100)):
        np.save(f"{name}.npy", rng.normal(3, 2, (rows, 5)))
    Path("parts").mkdir()
    frame = pd.DataFrame({"id": range(300), "age": rng.normal(40, 9, 300), "income": rng.lognormal(9, 1, 300)})
    frame["label"], frame["w"] = "yes", rng.random(300)
    frame.to_parquet("train.parquet")
    frame.to_parquet("test.parquet")
    frame[:100].to_csv("parts/0.csv", index=False)
    frame[100:].to_csv("parts/1.csv", index=False)
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) >= 15
    for command in commands:
        program, *arguments = shlex.split(command)
        outcome = call(*arguments)
        assert (program, outcome.code) == ("batchnorm", 0), f"{command}: {outcome.err}"
