from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.preprocessing import MinMaxScaler, StandardScaler, Whitener, load
from cli.commandline import Outcome

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

pytestmark = pytest.mark.usefixtures("folder")

Call = Callable[..., Outcome]
X = np.random.default_rng(0).normal(50, 3, (300, 3))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    frame["id"], frame["w"] = [f"n{i}" for i in range(300)], np.arange(300) % 4
    frame.to_parquet("x.parquet")
    Path("parts").mkdir()
    for number, part in enumerate((frame[:100], frame[100:])):
        part.to_csv(f"parts/{number}.csv", index=False)
    return tmp_path


def test_what_is_learned_is_saved_and_told(call: Call) -> None:
    outcome = call("fit", "x.npy", "--out", "stats.safetensors")
    assert (outcome.code, outcome.err) == (0, "")
    assert [line.split()[0] for line in outcome.out.splitlines()] == ["learned", "rows", "features", "time", "written"]
    assert "StandardScaler()" in outcome.out
    np.testing.assert_allclose(load("stats.safetensors").mean_, X.mean(0), rtol=1e-14)
    assert all(character == "\n" or character >= " " for character in outcome.out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "minmax", "--range", "0,1", "--clip"], MinMaxScaler((0.0, 1.0), clip=True)),
        (["--method", "pca", "--n-components", "2"], Whitener(n_components=2)),
        (["--method", "zca", "--n-components", "0.9", "--eps", "1e-3"], Whitener("zca", n_components=0.9, eps=1e-3)),
        (["--method", "cholesky", "--shrinkage", "ledoit-wolf"], Whitener("cholesky", shrinkage="ledoit-wolf")),
        (
            ["--method", "pca-cor", "--shrinkage", "0.5", "--solver", "eigh"],
            Whitener("pca-cor", shrinkage=0.5, solver="eigh"),
        ),
    ],
)
def test_methods_and_their_settings(call: Call, arguments: list[str], expected: Any) -> None:
    assert call("fit", "x.npy", *arguments, "--out", "s.safetensors").code == 0
    found = load("s.safetensors")
    assert repr(found) == repr(expected)
    np.testing.assert_allclose(found.transform(X), expected.fit(X).transform(X), atol=1e-9)


def test_columns_weights_and_several_files(call: Call) -> None:
    outcome = call("fit", "x.parquet", "--columns", "c, a", "--weights", "w", "--out", "s.safetensors", "--json")
    document = json.loads(outcome.out)
    assert (document["rows"], document["samples"], document["features"]) == (300, (np.arange(300) % 4).sum(), 2)
    expected = StandardScaler().fit(X[:, [2, 0]], sample_weight=np.arange(300) % 4)
    np.testing.assert_allclose(load("s.safetensors").mean_, expected.mean_, rtol=1e-13)
    assert list(load("s.safetensors").feature_names_in_) == ["c", "a"]
    for sources in (["parts"], ["parts/*.csv"], ["parts/0.csv", "parts/1.csv"]):
        outcome = call("fit", *sources, "--exclude", "id,w", "--out", "t.safetensors", "--force", "--batch-rows", "7")
        assert outcome.code == 0, outcome.err
        np.testing.assert_allclose(load("t.safetensors").mean_, X.mean(0), rtol=1e-13)


def test_going_on_is_the_same_as_all_at_once(call: Call) -> None:
    np.save("one.npy", X[:80])
    np.save("two.npy", X[80:])
    call("fit", "one.npy", "--method", "zca", "--out", "s.safetensors")
    assert call("fit", "two.npy", "--continue", "s.safetensors", "--out", "s.safetensors").code == 0
    assert load("s.safetensors").n_samples_seen_ == 300
    np.testing.assert_allclose(load("s.safetensors").transform(X), Whitener("zca").fit(X).transform(X), atol=1e-9)
    before = Path("s.safetensors").read_bytes()
    np.save("wide.npy", np.ones((4, 9)))
    outcome = call("fit", "wide.npy", "--continue", "s.safetensors", "--out", "s.safetensors")
    assert outcome.code == 1
    assert "wide.npy: X has 9 features, but Whitener is expecting 3 features" in outcome.err
    assert Path("s.safetensors").read_bytes() == before


def test_what_is_constant_or_empty_is_told(call: Call) -> None:
    data = X.copy()
    data[:, 0], data[:, 2] = 1.0, np.nan
    np.save("bad.npy", data)
    outcome = call("fit", "bad.npy", "--out", "s.safetensors")
    assert outcome.code == 0
    assert "constant        1: 0\n" in outcome.out
    assert "without values  1: 2\n" in outcome.out
    assert outcome.err == "batchnorm: warning: StandardScaler saw only NaN in feature 2: its statistics are NaN\n"


def test_images_by_channel(call: Call) -> None:
    image = pytest.importorskip("PIL.Image")
    Path("images").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        image.fromarray(one).save(f"images/{number}.png")
    assert call("fit", "images", "--channel-axis", "1", "--out", "s.safetensors").code == 0
    np.testing.assert_allclose(load("s.safetensors").mean_, pixels.mean((0, 1, 2)), rtol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npy"], "no such file or folder: 'missing.npy'"),
        (["x.nyp"], "no such file or folder: 'x.nyp'; did you mean 'x.npy'?"),
        (["empty.csv"], "empty.csv: the file is empty (0 bytes)"),
        (["head.csv"], "Found no samples in head.csv"),
        (["notes.txt"], "notes.txt: cannot tell by its suffix how to read it"),
        (["x.parquet"], "x.parquet: column 'id' holds text, expected numbers"),
        (["x.parquet", "--columns", "a,q"], "x.parquet: no column 'q'"),
        (["x.parquet", "--exclude", "q"], "x.parquet: no column 'q'"),
        (["x.npy", "--exclude", "q"], "x.npy: this kind of file has no columns with names"),
        (["broken.npy"], "broken.npy: "),
        (["broken.parquet"], "broken.parquet: cannot be read as Parquet: "),
        (["infinite.npy"], "infinite.npy: Input X contains infinity: row 2, column 1"),
        (["x.npy", "--continue", "x.npy"], "'x.npy' is truncated, damaged or no safetensors file"),
        (["x.npy", "--method", "pca", "--n-components", "9"], "n_components=9"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(call: Call, folder: Path, arguments: list[str], message: str) -> None:
    Path("empty.csv").touch()
    Path("head.csv").write_text("a,b\n")
    Path("notes.txt").write_text("1,2\n")
    Path("broken.npy").write_bytes(Path("x.npy").read_bytes()[:1000])
    Path("broken.parquet").write_bytes(Path("x.parquet").read_bytes()[:1000])
    np.save("infinite.npy", np.where(np.indices((9, 3)).sum(0) * np.eye(9, 3, -1) == 3, np.inf, 1.0))
    before = sorted(folder.iterdir())
    outcome = call("fit", *arguments, "--out", "s.safetensors")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("batchnorm: ")
    assert message in outcome.err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "a", "--exclude", "b"], "--columns and --exclude exclude each other"),
        (
            ["--continue", "s.safetensors", "--method", "zca"],
            "--continue keeps the method and the settings of its file",
        ),
        (["--continue", "s.safetensors", "--eps", "1"], "--continue keeps the method and the settings of its file"),
        (["--range", "0,1"], "--range is for --method minmax"),
        (["--method", "minmax", "--n-components", "2"], "--n-components is for --method pca or zca or cholesky"),
        (["--method", "minmax", "--range", "1"], "expected two numbers parted by a comma, got '1'"),
        (["--method", "pca", "--n-components", "many"], "expected a number of components, or a share of the variance"),
        (["--method", "pca", "--shrinkage", "some"], "expected ledoit-wolf or a number from 0 to 1, got 'some'"),
        (["--columns", " , "], "expected names parted by commas"),
        (["--out", "stats.npy"], "expected a name that ends in .safetensors, got 'stats.npy'"),
        (["--method", "magic"], "'magic' is not one of 'standard'"),
        (["--ray", "local", "--batch-rows", "9"], "--batch-rows is not for --ray"),
    ],
)
def test_wrong_usage(call: Call, arguments: list[str], message: str) -> None:
    outcome = call("fit", "x.npy", "--out", "s.safetensors", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.endswith("(see batchnorm fit --help)\n")
    assert call("fit", "x.npy").code == 2  # no --out


def test_nothing_is_replaced_unless_asked(call: Call) -> None:
    Path("s.safetensors").write_text("precious")
    outcome = call("fit", "x.npy", "--out", "s.safetensors")
    assert outcome.err == "batchnorm: s.safetensors exists already: name another file, or replace it with --force\n"
    assert Path("s.safetensors").read_text() == "precious"
    assert call("fit", "x.npy", "--out", "s.safetensors", "--force").code == 0
    outcome = call("fit", "x.npy", "--out", "nowhere/s.safetensors")
    assert outcome.err == "batchnorm: cannot write nowhere/s.safetensors: there is no folder nowhere, create it first\n"


def test_ctrl_c_leaves_nothing(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.cli.options.Meter.__call__", interrupt)
    before = sorted(folder.iterdir())
    outcome = call("fit", "x.npy", "--out", "s.safetensors")
    assert (outcome.code, outcome.out, outcome.err.strip()) == (130, "", "batchnorm: interrupted")
    assert sorted(folder.iterdir()) == before
