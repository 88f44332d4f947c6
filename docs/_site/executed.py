"""Runs the code of pages, and writes what it prints and draws into them: ``python docs/_site/executed.py [PAGE ...]``.

A page's blocks of ``python`` run one after the other with shared names. What one prints stands in a block of ``text``
right behind it. ``<!-- figure NAME.svg ... -->`` holds code that a reader need not see, and which draws
``images/NAME.svg`` beside the page; it has ``draw`` (drawing.py) and ``figure``, the path to write to. A comment
``<!-- tolerance 0.1 -->`` before a block of text says by what share its numbers may differ elsewhere (.01 without).
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import drawing
import torch

DOCS = Path(__file__).parents[1]
FOLDERS = ("tutorial", "howto")
TOLERANCE = 0.01
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?:\n(?:<!-- tolerance (?P<tolerance>[\d.]+) -->\n+)?```text\n(?P<text>.*?)^```\n)?"
    r"|^<!-- figure (?P<figure>[\w.-]+\.svg)\n(?P<drawing>.*?)^-->\n",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Printed:
    """What a block printed, and where the page says what it prints."""

    page: Path
    line: int
    expected: str
    got: str
    tolerance: float
    span: tuple[int, int]


def pages() -> list[Path]:
    """The pages whose outputs are kept."""
    return [path for folder in FOLDERS for path in sorted((DOCS / folder).glob("*.md"))]


def execute(page: Path, images: Path) -> Iterator[Printed]:
    """Run a page; figures are written to ``images``. Names live as long as the page."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    for block in BLOCK.finditer(text):
        kind = "code" if block["figure"] is None else "drawing"
        line = text[: block.start(kind)].count("\n")
        program = compile("\n" * line + block[kind], str(page), "exec")
        if kind == "drawing":
            exec(program, {**names, "draw": drawing, "figure": images / block["figure"]})
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program, names)
        got = "".join(f"{row.rstrip()}\n" for row in out.getvalue().splitlines())
        tolerance = float(block["tolerance"] or TOLERANCE)
        yield Printed(page, line, block["text"] or "", got, tolerance, block.span("text"))


def differs(expected: str, got: str, tolerance: float) -> str | None:
    """How two outputs differ: in words, or in a number by more than ``tolerance`` of it and its last printed digit."""
    if (words := _words(expected)) != (others := _words(got)):
        return f"expected {words!r}, got {others!r}"
    for a, b in zip(NUMBER.findall(expected), NUMBER.findall(got), strict=True):
        mantissa, _, exponent = a.partition("e")
        digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        if abs(float(a) - float(b)) > tolerance * abs(float(a)) + 1.001 * digit:
            return f"expected {a}, got {b}"
    return None


def _words(text: str) -> list[str]:
    return NUMBER.sub("#", text).split()


def main() -> None:
    """Write outputs and figures into the pages."""
    for page in [Path(name).resolve() for name in sys.argv[1:]] or pages():
        text = page.read_text(encoding="utf-8")
        for printed in reversed(list(execute(page, page.parent / "images"))):
            if printed.span == (-1, -1):
                if printed.got:
                    raise SystemExit(f"{page}:{printed.line}: expected a block of text for what this prints")
            elif differs(printed.expected, printed.got, 0):
                text = text[: printed.span[0]] + printed.got + text[printed.span[1] :]
        page.write_text(text, encoding="utf-8")
        print(page.relative_to(DOCS))


if __name__ == "__main__":
    main()
