"""The documentation site builds strictly, holds every public name, and loads nothing from elsewhere."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = (
    "batchnorm",
    "batchnorm.moments",
    "batchnorm.nn",
    "batchnorm.nn.functional",
    "batchnorm.ops",
    "batchnorm.ops.native",
    "batchnorm.preprocessing",
    "batchnorm.probes",
    "batchnorm.report",
    "batchnorm.study",
    "batchnorm.study.comparison",
    "batchnorm.surgery",
)
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc=[\"']?(?P<src>[^\"'\s>]+)"
    r"|<link\b(?P<link>[^>]*)>|url\((?P<url>[^)]*)\)|@import (?P<imported>[^;]*)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built anew; any warning fails it."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def public_names() -> dict[str, object]:
    """What ``__all__`` names in each room, without modules and the version."""
    names = {f"{room}.{name}": getattr(room_, name) for room, room_ in _rooms() for name in room_.__all__}
    return {
        name: value for name, value in names.items() if not inspect.ismodule(value) and name != "batchnorm.__version__"
    }


def _rooms():
    return ((room, importlib.import_module(room)) for room in ROOMS)


def test_the_site(site):
    texts = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    _every_public_name_has_an_entry(texts)
    _nothing_is_loaded_from_elsewhere(site, texts)
    _docstrings_are_rendered(texts)
    _formulas_are_drawn(texts)
    _links_to_code_meet_their_line(site, texts)


def _every_public_name_has_an_entry(texts):
    anchors = {
        a for page, text in texts.items() if page.startswith("reference/") for a in re.findall(r' id="([^"]+)"', text)
    }
    named = public_names()
    shown = {id(named[name]) for name in named if name in anchors}
    # At the top stand functions of the rooms, and a room may show another's: the same object counts once.
    missing = [name for name, value in named.items() if name not in anchors and id(value) not in shown]
    assert missing == []
    index = texts["reference/index.html"]
    for name, value in named.items():
        if inspect.isfunction(value) and name.count(".") == 1:
            assert f">{name.replace('batchnorm', 'bn')}</code>" in index, f"{name} is not on the reference's first page"


def _nothing_is_loaded_from_elsewhere(site, texts):
    sheets = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.css")}
    assert sheets
    for name, text in {**texts, **sheets}.items():
        without_code = re.sub(r"<(code|pre)\b.*?</\1>", "", text, flags=re.DOTALL)
        for match in LOADED.finditer(without_code):
            if match["link"] is not None:
                if not re.search(r"rel=[\"']?(stylesheet|icon|preload|preconnect|modulepreload)", match["link"]):
                    continue
                found = re.search(r"href=[\"']?([^\"'\s>]+)", match["link"])
                address = found[1] if found else ""
            else:
                address = (match["src"] or match["url"] or match["imported"] or "").strip("\"' ")
            assert not urlsplit(address).netloc, f"{name} loads {address}"


def _docstrings_are_rendered(texts):
    for name, text in texts.items():
        if name.startswith("reference/"):
            words = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<pre\b.*?</pre>", "", text, flags=re.DOTALL)))
            assert not re.search(r":(class|func|meth|mod|math|data|attr):|\.\. math::", words), name
            assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", words), name


def _formulas_are_drawn(texts):
    assert texts["derivations/batch-norm.html"].count("<math") > 20
    assert texts["reference/nn.html"].count('display="block"') >= 8
    for name, text in texts.items():
        assert 'class="arithmatex"' not in text, name
        assert "$$" not in re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL), name


def _links_to_code_meet_their_line(site, texts):
    links = 0
    for name in ("derivations/batch-norm.html", "derivations/whitening.html"):
        for address, line in re.findall(r'href="([^"#]+\.html)#__codelineno-0-(\d+)"', texts[name]):
            target = (site / name).parent / address
            assert f'id="__codelineno-0-{line}"' in target.read_text(encoding="utf-8")
            links += 1
    assert links > 20
