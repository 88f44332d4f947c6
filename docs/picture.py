"""Takes the README's picture of the report: runs the default study (or takes a finished run) and opens its page.

    python docs/picture.py [RUN]

Needs a Chromium on the PATH; the page is opened from disk.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
WIDTH = 1366
COLOURS = 160  # enough for two hues and their shades, and half the bytes


def browser() -> str:
    """The system's browser."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise SystemExit("expected a Chromium on the PATH: install one")


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "runs" / "picture"
    if not (run / "report.html").exists():
        subprocess.run(["batchnorm", "study", "--out", str(run)], check=True)
    target = HERE / "images" / "report.png"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--hide-scrollbars"])
        page = chromium.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto((run / "report.html").resolve().as_uri())
        page.wait_for_selector("html[data-plots=drawn]")
        bottom = page.evaluate("document.querySelector('figure.figure').getBoundingClientRect().bottom + scrollY")
        page.set_viewport_size({"width": WIDTH, "height": int(bottom) + 24})
        page.wait_for_timeout(600)  # the plots follow the new size
        page.screenshot(path=str(target))
        chromium.close()
    Image.open(target).quantize(COLOURS).save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main()
