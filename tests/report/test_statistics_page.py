"""The page of saved statistics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm._errors import OutputError
from batchnorm.preprocessing import CORAL, MeanSubtractor, MinMaxScaler, StandardScaler, Whitener, describe
from batchnorm.report import statistics
from report.samples import NASTY
from report.test_browser import CONTRASTS, DESKTOP, PHONE, Visit, browser  # noqa: F401 -- a fixture
from report.test_page import Page

pytest.importorskip("plotly")
pd = pytest.importorskip("pandas")

RNG = np.random.default_rng(0)
X = RNG.normal(5.0, 2.0, (200, 6))


def nasty() -> Any:
    """Names that try to be HTML, scales far apart, a constant, a dependent and an almost empty feature."""
    data = np.column_stack([X[:, :2], 1e9 + X[:, 2], X[:, 3] * 1e-4, np.ones(200), X[:, 0] + X[:, 1]])
    return pd.DataFrame(data, columns=[NASTY, "b", "stamp", "c", "one", "sum"])


ESTIMATORS = {
    "scaler": lambda: StandardScaler().fit(X),
    "wide": lambda: StandardScaler().fit(RNG.normal(size=(50, 300))),
    "nasty": lambda: StandardScaler().fit(nasty()),
    "minmax": lambda: MinMaxScaler().fit(nasty()),
    "mean": lambda: MeanSubtractor().fit(X),
    "pca": lambda: Whitener(n_components=3).fit(X),
    "zca": lambda: Whitener("zca", shrinkage=0.2).fit(RNG.normal(size=(90, 120))),
    "dependent": lambda: Whitener("pca-cor").fit(nasty()),
    "cholesky": lambda: Whitener("cholesky").fit(X),
    "coral": lambda: CORAL().fit(X, X * 2),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_that_is_known_is_on_the_page(name: str) -> None:
    about = describe(ESTIMATORS[name]())
    text = statistics.render(about, "stats.safetensors")
    page = Page(text)
    flat = " ".join(page.text.split())
    assert " ".join(about.title.split()) in flat
    for finding in about.findings:
        assert " ".join(finding.text.split()) in flat
    for feature in range(min(about.features, 5)):
        assert " ".join(about.name(feature).split()) in flat
    if about.spectrum is not None:
        assert f"{about.spectrum.kept} of {about.spectrum.rank} with variance" in flat
    charts = [div for div in page.all("div") if (div.get("class") or "").startswith("chart")]
    assert len(charts) == len(statistics.figures_of(about)) > 0
    assert "<script>window.attacked" not in text
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a") if link["href"].startswith("#")} <= set(ids)


def test_features_far_apart_are_shown_by_their_sizes() -> None:
    assert [figure.id for figure in statistics.figures_of(describe(ESTIMATORS["scaler"]()))] == ["means"]
    (sizes,) = statistics.figures_of(describe(ESTIMATORS["nasty"]()))
    assert (sizes.id, sizes.log_y) == ("sizes", True)


def test_torch_is_not_needed_to_draw(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; import batchnorm.report.statistics as made; print(made.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "batchnorm.report.statistics\n", done.stderr


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    about = describe(ESTIMATORS["scaler"]())
    assert statistics.build(about, tmp_path / "page.html", "s").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(OutputError, match="expected a file for the page, got the folder"):
        statistics.build(about, tmp_path, "s")
    assert [item.name for item in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.browser
@pytest.mark.parametrize("name", ["nasty", "zca"])
@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone", "desktop"])
def test_in_a_browser(browser: Any, tmp_path: Path, name: str, size: dict[str, int], scheme: str) -> None:  # noqa: F811
    file = statistics.build(describe(ESTIMATORS[name]()), tmp_path / "page.html", "stats.safetensors")
    seen = Visit(browser, file, size, scheme)
    try:
        assert seen.messages == []
        assert seen.requests == [seen.url]
        assert seen.page.evaluate("window.attacked") is None
        assert seen.page.evaluate("document.documentElement.scrollWidth") == size["width"]
        found = seen.page.evaluate(CONTRASTS)
        assert len(found) > 20
        assert [item for item in found if item[0] < 4.5] == []
    finally:
        seen.context.close()
