"""Docstrings as Markdown: the package's are written for ``help()``, in the words of reStructuredText.

Roles become code that links to the reference where it has the name, ``.. math::`` becomes a formula, a literal block a
block of code, and sections (Args, Raises, Parameters, Attributes, ...) become a heading and a list.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

import batchnorm

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):`(~?)([^`]+)`")
SPREAD = re.compile(r":[a-z]+:`[^`]*\n[^`]*`")  # a role over two lines
ENTRY = re.compile(r"(?P<names>\*{0,2}[\w./]+(?:,\s+\*{0,2}[\w./]+)*): +(?P<text>\S)")
SECTION = re.compile(r"(?P<name>[A-Z]\w+(?: \w+)?):$")
UNDERLINED = re.compile(r"-{3,}$")
# The functions at the top have their entries where they live.
HOMES: dict[str, str] = batchnorm._FUNCTIONS
LISTED = frozenset({"Args", "Raises", "Attributes", "Returns", "Yields", "Warns", "Shape", "Parameters"})


class Markdown(griffe.Extension):
    """Rewrites every docstring that is collected."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object."""
        if obj.docstring is not None:
            obj.docstring.value = converted(obj.docstring.value)


def converted(text: str) -> str:
    """The docstring ``text`` as Markdown."""
    out: list[str] = []
    text = SPREAD.sub(lambda match: " ".join(match[0].split()), text.expandtabs())
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        depth = len(line) - len(line.lstrip())
        block, after = _indented(lines, at + 1, depth + 2)
        item = "    " if 0 < depth < 4 else ""  # inside an item of a list
        if line.lstrip().startswith(".. math::"):
            formula = " ".join([line.partition("::")[2].strip(), *(each.strip() for each in block)]).strip()
            out += ["", f"{item}$$ {formula} $$", ""]
            at = after
        elif (match := SECTION.match(line)) and match["name"] in LISTED and block:
            out += ["", f"**{match['name']}**", "", *_entries(block), ""]
            at = after
        elif at + 1 < len(lines) and UNDERLINED.match(lines[at + 1]) and line.strip():
            at += 2
            end = at
            while end < len(lines) and not (end + 1 < len(lines) and UNDERLINED.match(lines[end + 1])):
                end += 1
            out += ["", f"**{line.strip()}**", "", *_entries(lines[at:end]), ""]
            at = end
        elif line.rstrip().endswith("::") and block:
            shown = line.rstrip()[:-1] if line.strip() != "::" else ""
            out += [
                _inline(shown),
                "",
                "```text",
                *textwrap.dedent("\n".join(block)).strip("\n").split("\n"),
                "```",
                "",
            ]
            at = after
        elif line.startswith(">>> "):
            end = at
            while end < len(lines) and lines[end].strip():
                end += 1
            shown = [re.sub(r"\s+# doctest: .*", "", each) for each in lines[at:end]]
            out += ["", "```pycon", *shown, "```", ""]
            at = end
        elif line.startswith("    ") and (not out or not out[-1].strip()):
            # An indented paragraph is a formula in plain letters.
            paragraph, after = _indented(lines, at)
            out += ["```text", *textwrap.dedent("\n".join(paragraph)).strip("\n").split("\n"), "```", ""]
            at = after
        elif item:
            out.append(item + _inline(line.strip()))
            at += 1
        else:
            if line.startswith("- ") and out and out[-1].strip() and not out[-1].startswith(("- ", "  ")):
                out.append("")  # Markdown wants a blank line before a list
            out.append(_inline(line))
            at += 1
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def _indented(lines: list[str], start: int, depth: int = 2) -> tuple[list[str], int]:
    """The lines from ``start`` on that are indented by ``depth`` or blank, and where the next one is."""
    end = start
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * depth)):
        end += 1
    return lines[start:end], end


def _entries(block: list[str]) -> list[str]:
    """``name: what it is`` as items of a list; other paragraphs as they are."""
    lines = textwrap.dedent("\n".join(block)).strip("\n").split("\n")
    out: list[str] = []
    inside = False
    for line in lines:
        if match := ENTRY.match(line):
            names = ", ".join(f"`{name.strip()}`" for name in match["names"].split(","))
            out.append(f"- {names}: {_inline(line[match.start('text') :])}")
            inside = True
        elif not line.strip():
            out.append("")
            inside = False
        elif line.startswith("  "):
            out.append(f"    {_inline(line.strip())}" if inside else _inline(line.strip()))
        else:
            if inside:
                out.append("")
                inside = False
            out.append(_inline(line))
    return out


def _inline(line: str) -> str:
    line = re.sub(r":math:`([^`]+)`", r"$\1$", line)
    return ROLE.sub(_linked, line)


def _linked(match: re.Match[str]) -> str:
    target = match[2]
    shown = target.rpartition(".")[2] if match[1] else target
    if target.startswith("batchnorm.") and "._" not in target:
        name = target.removeprefix("batchnorm.")
        target = f"batchnorm.{HOMES[name]}.{name}" if name in HOMES else target
        # An optional reference: code without a link where the site has no such name.
        return f'<autoref identifier="{target}" optional>`{shown}`</autoref>'
    return f"`{shown}`"
