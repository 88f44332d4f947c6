"""axe-core finds nothing serious on any kind of page, in either theme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.preprocessing import StandardScaler, describe
from batchnorm.report import pair, statistics, watch
from batchnorm.report.page import render
from report import samples, watch_samples
from report.test_browser import DESKTOP, PHONE, Visit, browser  # noqa: F401 -- a fixture
from report.test_pair import other

pytestmark = pytest.mark.browser

PAGES = {
    "study": lambda: render(samples.summary()),
    "pair": lambda: pair.render(pair.Run("before", samples.summary()), pair.Run("after", other())),
    "statistics": lambda: statistics.render(
        describe(StandardScaler().fit(np.random.default_rng(0).normal(5.0, 2.0, (200, 6)))), "statistics.safetensors"
    ),
    "watch": lambda: watch.render([watch_samples.record(step) for step in range(0, 200, 20)]),
}


@pytest.fixture(scope="module", params=PAGES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("accessible") / f"{request.param}.html"
    path.write_text(PAGES[request.param](), encoding="utf-8")
    return path


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", PHONE)], ids=["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, file: Path, scheme: str, size: dict[str, int]) -> None:  # noqa: F811
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    seen = Visit(browser, file, size, scheme)
    try:
        seen.page.eval_on_selector_all("details", "(all) => { for (const item of all) item.open = true; }")
        found = axe.run(seen.page).response
        assert len(found["passes"]) > 10
        assert [
            (item["id"], item["impact"], item["nodes"][0]["html"][:200])
            for item in found["violations"]
            if item["impact"] in ("serious", "critical")
        ] == []
        assert seen.messages == []
    finally:
        seen.context.close()
