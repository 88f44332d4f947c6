"""The page in a real browser: every plot drawn, nothing fetched, no error, nothing too wide, both themes readable."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchnorm import report
from report import samples

pytestmark = pytest.mark.browser

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1366, "height": 768}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# What is seen of a text: its colour and the first ground behind it that is not transparent.
CONTRASTS = """() => {
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const hidden = element.closest("svg, script, style, noscript, .chart") || !element.checkVisibility();
        if (!own || hidden) continue;
        const [first, second] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
        const ratio = (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05);
        found.push([ratio, element.tagName, element.textContent.slice(0, 40)]);
    }
    for (const text of document.querySelectorAll(".chart svg text")) {
        if (!text.textContent.trim() || text.closest(".hm, .heatmaplayer, .heatmap-label")) continue;
        const [first, second] = [light(parse(getComputedStyle(text).fill)), light(ground(text.closest(".chart")))];
        const ratio = (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05);
        found.push([ratio, "plot", text.textContent.slice(0, 40)]);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    required = os.environ.get("BATCHNORM_REQUIRE_BROWSER") == "1"
    executable = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if executable is None:
        message = f"no browser: none of {', '.join(BROWSERS)} is on the PATH"
        (pytest.fail if required else pytest.skip)(message)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        message = "no driver for the browser: pip install playwright"
        (pytest.fail if required else pytest.skip)(message)
    with sync_playwright() as driver:
        # Each launch has a fresh profile, which playwright removes.
        started = driver.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.build(samples.summary(), tmp_path_factory.mktemp("page") / "report.html")


class Visit:
    """An open page, with all that it asked for and complained about."""

    def __init__(self, browser: Any, file: Path, size: dict[str, int], scheme: str, touch: bool = False) -> None:
        self.context = browser.new_context(
            viewport=size, color_scheme=scheme, has_touch=touch, is_mobile=touch, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = file.as_uri()
        self.page.goto(self.url)
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector("html[data-plots=drawn]", timeout=60_000)

    def colours(self, selector: str, name: str = "stroke") -> str:
        script = f"(element) => getComputedStyle(element).{name}"
        return str(self.page.eval_on_selector(selector, script))


def until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something; playwright's wait_for_function would evaluate in the page, whose policy forbids that."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


@pytest.fixture
def visit(browser: Any, page_file: Path) -> Iterator[Any]:
    visits: list[Visit] = []

    def go(size: dict[str, int] = DESKTOP, scheme: str = "light", touch: bool = False) -> Visit:
        visits.append(Visit(browser, page_file, size, scheme, touch))
        return visits[-1]

    yield go
    for item in visits:
        item.context.close()


def test_every_plot_is_drawn_without_a_word_or_a_request(visit: Any) -> None:
    seen = visit()
    charts = seen.page.evaluate(
        """() => [...document.querySelectorAll(".chart")].map((chart) => ({
            id: chart.id,
            expected: chart._fullData.filter((trace) => trace.visible === true && trace.type !== "heatmap").length,
            drawn: chart.querySelectorAll("svg .scatterlayer .trace, svg .barlayer .trace").length,
            marks: chart.querySelectorAll("svg .point path, svg path.point, svg path.js-line, svg .points path").length,
            images: [...chart.querySelectorAll("svg .hm image")].filter((image) => image.getBBox().width > 20).length,
            heat: chart._fullData.some((trace) => trace.type === "heatmap"),
            width: chart.querySelector("svg.main-svg").getBoundingClientRect().width,
        }))"""
    )
    figures = [figure for section in samples.summary().sections for figure in section.figures]
    assert len(figures) == 7
    # Three grids side by side are three plots of one figure.
    assert len(charts) == len(figures) + 2
    for chart in charts:
        assert chart["drawn"] == chart["expected"], chart
        assert chart["images"] == int(chart["heat"]), chart
        assert chart["marks"] > 0 or chart["heat"], chart
        assert chart["width"] > 150, chart
    assert seen.messages == []
    assert seen.requests == [seen.url]
    assert seen.page.evaluate("window.attacked") is None


@pytest.mark.parametrize(("size", "touch"), [(PHONE, True), (DESKTOP, False)], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_screen(visit: Any, size: dict[str, int], touch: bool) -> None:
    seen = visit(size, touch=touch)
    seen.page.eval_on_selector_all("details", "(all) => { for (const item of all) item.open = true; }")
    assert seen.page.evaluate("document.documentElement.scrollWidth") == size["width"]
    seen.page.evaluate("window.scrollTo(500, 0)")
    assert seen.page.evaluate("window.scrollX") == 0
    too_wide = seen.page.evaluate(
        """() => [...document.querySelectorAll("main *")]
            .filter((element) => !element.closest(".scroll table, .command pre, svg") && element.checkVisibility())
            .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5)
            .map((element) => `${element.tagName}.${element.className}`)"""
    )
    assert too_wide == []
    if touch:
        # A wide table scrolls within itself.
        assert seen.page.evaluate(
            "[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable_in_both_themes(visit: Any, scheme: str) -> None:
    seen = visit(scheme=scheme)
    seen.page.eval_on_selector_all("details", "(all) => { for (const item of all) item.open = true; }")
    found = seen.page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert any(place == "plot" for _, place, _ in found)
    assert [item for item in found if item[0] < 4.5] == []


def test_the_theme_follows_the_system_and_the_button_and_takes_the_plots_along(visit: Any) -> None:
    seen = visit(scheme="dark")
    line = ".chart .js-line"
    dark = (seen.colours("body", "backgroundColor"), seen.colours(line))
    seen.page.click("#theme")
    seen.wait()
    light = (seen.colours("body", "backgroundColor"), seen.colours(line))
    assert dark[0] == "rgb(18, 21, 26)"
    assert light[0] == "rgb(250, 249, 246)"
    assert dark[1] != light[1]
    assert seen.page.inner_text("#theme") == "Dark theme"
    # The choice outlives the visit; the system no longer decides.
    seen.page.reload()
    seen.wait()
    assert seen.colours("body", "backgroundColor") == light[0]

    other = visit(scheme="light")
    assert (other.colours("body", "backgroundColor"), other.colours(line)) == light
    other.page.emulate_media(color_scheme="dark")
    until(lambda: other.colours(line) == dark[1])
    assert other.colours("body", "backgroundColor") == dark[0]


def test_a_series_is_hidden_and_shown_by_keyboard(visit: Any) -> None:
    seen = visit()
    figure = seen.page.locator("figure.figure").first
    lines = figure.locator(".js-line")
    before = lines.count()
    key = figure.locator(".keys button").first
    key.focus()
    seen.page.keyboard.press("Enter")
    assert key.get_attribute("aria-pressed") == "false"
    # The line and its band.
    assert lines.count() < before
    seen.page.click("#theme")
    seen.wait()
    assert lines.count() < before
    key.focus()
    seen.page.keyboard.press("Space")
    assert lines.count() == before


def test_the_contents_follow_the_reader(visit: Any) -> None:
    seen = visit()
    assert seen.page.inner_text(".toc [aria-current]") == "Summary"
    seen.page.click('.toc a[href="#identity"]')
    until(lambda: seen.page.eval_on_selector(".toc [aria-current]", "(link) => link.hash") == "#identity")
    assert seen.page.evaluate("document.getElementById('identity').getBoundingClientRect().top") < 200


def test_a_finger_on_a_plot_scrolls_the_page(visit: Any) -> None:
    seen = visit(PHONE, touch=True)
    assert seen.page.evaluate("[...document.querySelectorAll('.chart')].every((c) => c.layout.dragmode === false)")
    assert seen.page.locator(".modebar-btn").count() == 0
