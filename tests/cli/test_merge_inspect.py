from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchnorm.preprocessing import MinMaxScaler, StandardScaler, Whitener, load
from cli.commandline import Outcome

pytestmark = pytest.mark.usefixtures("folder")

Call = Callable[..., Outcome]
X = np.random.default_rng(0).normal(50, 3, (300, 3))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, part in enumerate(np.split(X, [50, 170])):
        StandardScaler().fit(part).save(f"{number}.safetensors")
    return tmp_path


def test_merged_parts_are_the_whole(call: Call) -> None:
    files = [f"{number}.safetensors" for number in range(3)]
    outcome = call("merge", *files, "--out", "all.safetensors")
    assert (outcome.code, outcome.err) == (0, "")
    assert "merged      3 files\n" in outcome.out
    assert "samples     300\n" in outcome.out
    np.testing.assert_allclose(load("all.safetensors").var_, X.var(0), rtol=1e-13)
    document = json.loads(call("merge", *files, "--out", "all.safetensors", "--force", "--json").out)
    assert (document["merged"], document["samples"], document["features"]) == (3, 300, 3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            MinMaxScaler().fit(X),
            "other.safetensors does not fit 0.safetensors: expected another StandardScaler to merge",
        ),
        (
            StandardScaler().fit(X[:, :2]),
            "other.safetensors does not fit 0.safetensors: cannot merge StandardScalers of",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(call: Call, other: StandardScaler, message: str) -> None:
    other.save("other.safetensors")
    outcome = call("merge", "0.safetensors", "1.safetensors", "other.safetensors", "--out", "all.safetensors")
    assert (outcome.code, outcome.out) == (1, "")
    assert message in outcome.err
    assert not Path("all.safetensors").exists()
    assert call("merge", "0.safetensors", "--out", "all.safetensors").code == 2
    outcome = call("merge", "0.safetensors", "1.safetensors", "--out", "other.safetensors")
    assert "other.safetensors exists already" in outcome.err


def test_what_is_learned_is_shown(call: Call) -> None:
    data = np.random.default_rng(1).normal(size=(400, 40))
    data[:, 33] = 2.0
    data[:, 7] = data[:, 6]
    Whitener("zca").fit(data).save("w.safetensors")
    outcome = call("inspect", "w.safetensors")
    assert (outcome.code, outcome.err) == (0, "")
    for words in (
        "Whitener(method='zca')",
        "directions kept   38 of 38 with variance",
        "without variance  2",
        "1 direction has no variance, beside the constant features, and is dropped",
        "Constant: 33",
        "20 features more: --all shows them",
    ):
        assert words in outcome.out, words
    lines = outcome.out.splitlines()
    # What is worth a look comes first.
    first = lines.index(next(line for line in lines if line.startswith(" feature"))) + 2
    assert [line.split()[0] for line in lines[first : first + 4]] == ["6", "7", "33", "0"]
    assert "--all" not in call("inspect", "w.safetensors", "--all").out
    assert all(character == "\n" or character >= " " for character in outcome.out)
    document = json.loads(call("inspect", "w.safetensors", "--json").out)
    assert len(document["columns"]["mean"]) == 40
    assert document["spectrum"]["rank"] == 38
    assert {finding["kind"] for finding in document["findings"]} == {"constant", "rank"}


def test_the_page_of_statistics(call: Call, folder: Path) -> None:
    pytest.importorskip("plotly")
    outcome = call("inspect", "0.safetensors", "--html", "page.html")
    assert outcome.out.endswith(f"The page: {folder / 'page.html'}\n")
    assert "Means, and one deviation to each side" in Path("page.html").read_text()
    assert "page.html exists already" in call("inspect", "0.safetensors", "--html", "page.html").err
    assert call("inspect", "0.safetensors", "--html", "page.html", "--force").code == 0


@pytest.mark.parametrize("command", [["inspect"], ["merge", "0.safetensors"]])
def test_damaged_files(call: Call, command: list[str]) -> None:
    data = Path("0.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:-9])
    Path("empty.safetensors").touch()
    rest = ["--out", "m.safetensors"] if command[0] == "merge" else []
    for name, message in (
        ("cut.safetensors", "'cut.safetensors' is truncated, damaged or no safetensors file"),
        ("empty.safetensors", "'empty.safetensors' is truncated, damaged or no safetensors file"),
        ("gone.safetensors", "cannot read the statistics file 'gone.safetensors': No such file or directory"),
    ):
        outcome = call(*command, name, *rest)
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err.count("\n") == 1
        assert message in outcome.err
    assert not Path("m.safetensors").exists()
