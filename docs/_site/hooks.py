"""What the site does to pages that are written to be read in the repository as well.

- Links that leave ``docs/`` go to copies: the changelog and the contributors' guide become pages, examples and sources
  become pages with their code, results of benchmarks files.
- Formulas become MathML, which browsers draw by themselves: the site loads no script or font from elsewhere.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
FOLDERS = {"docs/rules": "doctor.md"}
LINK = re.compile(r"(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
LINE = re.compile(r'<a class="line-(?P<line>\d+)" href="(?P<where>[^"]*)">')
MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>', re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files elsewhere in the repository."""
    for source, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    wanted = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    for file in files.documentation_pages():
        for match in LINK.finditer(file.content_string):
            target = _in_repository(file.src_uri, match["target"])
            if target is None or target in PAGES or target.startswith("docs/"):
                continue
            if (ROOT / target).is_file():
                wanted.add(target)
    for target in sorted(wanted):
        path = ROOT / target
        if path.suffix == ".py":
            shown = InclusionLevel.INCLUDED if target.startswith("examples/") else InclusionLevel.NOT_IN_NAV
            page = File.generated(config, _page_of(target), content=_code_page(target, path), inclusion=shown)
            files.append(page)
        else:
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links that leave ``docs/`` to what :func:`on_files` put in their place."""

    def turned(match: re.Match[str]) -> str:
        target = _in_repository(page.file.src_uri, match["target"])
        if target is None:
            return match[0]
        anchor = match["anchor"] or ""
        path = ROOT / target
        if path.suffix == ".py" and (line := _line_of(path, match["text"].strip("[]`"))) is not None:
            # Anchors of lines are unknown to mkdocs, which would warn: the address gets its own in on_page_content.
            anchor, attributes = "", f"{{ .line-{line} }}"
        else:
            attributes = ""
        where = posixpath.relpath(_page_of(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match['text']}({where}{anchor}){attributes}"

    return LINK.sub(turned, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Draw formulas; lead links to code to its line."""

    def drawn(match: re.Match[str]) -> str:
        block = match["inline"] is None
        source = html.unescape(match["block"] if block else match["inline"])
        return latex2mathml.converter.convert(source.strip(), display="block" if block else "inline")

    return LINE.sub(r'<a href="\g<where>#__codelineno-0-\g<line>">', MATH.sub(drawn, content))


def _in_repository(page: str, target: str) -> str | None:
    """The path from the repository's root that a link of this page means, where it leaves ``docs/``."""
    if re.match(r"[a-z]+:|/", target):
        return None
    if page in PAGES.values() and page != "index.md":  # written to stand in the root
        return target
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith(("docs/", "..")) else path


def _page_of(target: str) -> str:
    """Where the site has this file of the repository."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return FOLDERS.get(target) or target.removeprefix("docs/")
    return target.removesuffix(".py") + ".md" if target.endswith(".py") else target


def _code_page(target: str, path: Path) -> str:
    code = path.read_text(encoding="utf-8")
    name = path.name if target.startswith("examples/") else target
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n```` {{.python linenums=1}}\n{code}````\n"


def _line_of(path: Path, name: str) -> int | None:
    """Where ``name`` (``function``, ``Class.method``) is defined."""
    if not re.fullmatch(r"[\w.]+", name):
        return None
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    line = None
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node.name == part
        ]
        if not found:
            return None
        line, body = found[0].lineno, found[0].body
    return line
