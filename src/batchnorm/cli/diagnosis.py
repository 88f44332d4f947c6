"""How a diagnosis, and what was done about it, look in a terminal."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from batchnorm.report.terminal import simple_table

if TYPE_CHECKING:
    from batchnorm.probes.health import Diagnosis, Finding
    from batchnorm.surgery import Changes

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}
_LAYERS = 4


def screen(found: Diagnosis, model: str, every: bool) -> RenderableType:
    """All of a diagnosis; with ``every``, no layers taken together."""
    parts: list[RenderableType] = []
    for _, group in itertools.groupby(found, key=lambda finding: (finding.severity, finding.code)):
        same = list(group)
        for together in [[finding] for finding in same] if every else _alike(same):
            parts += _entry(together)
    return Group(*parts, _summary(found, model))


def change_table(done: Changes) -> RenderableType:
    """What an operation did to a model, a line for each layer."""
    if not done:
        return Text("Nothing was changed.")
    table = simple_table(("layer", "what was done"))
    for change in done:
        lost = Text(f" (lost: {change.lost})", "yellow") if change.lost else Text()
        table.add_row(Text(change.layer or "the model"), Text.assemble(change.what, lost))
    return table


def _alike(findings: list[Finding]) -> list[list[Finding]]:
    """Findings with one remedy are one entry: the first is shown with its numbers, the others by their layers."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        # A remedy that names the layer is the same for each.
        groups.setdefault(finding.remedy.replace(repr(finding.layer), ""), []).append(finding)
    return list(groups.values())


def _remedy(findings: list[Finding]) -> str:
    """The remedy of all: where it names the layer, it names them all."""
    first = findings[0]
    if len(findings) == 1 or not first.layer:
        return first.remedy
    names = [repr(finding.layer) for finding in findings]
    shown = names if len(names) <= _LAYERS + 1 else [*names[:_LAYERS], "..."]
    return first.remedy.replace(repr(first.layer), f"[{', '.join(shown)}]")


def _entry(findings: list[Finding]) -> list[RenderableType]:
    first = findings[0]
    head = Text.assemble(
        (first.code, _STYLES[first.severity]), " ", (first.rule, "bold"), "  ", (first.layer or "the model", "cyan")
    )
    lines: list[RenderableType] = [head, Padding(Text(first.message), (0, 0, 0, 2))]
    if len(findings) > 1:
        others = [finding.layer for finding in findings[1:]]
        more = f" and {len(others) - _LAYERS} more" if len(others) > _LAYERS else ""
        lines.append(Padding(Text(f"likewise {', '.join(others[:_LAYERS])}{more}", "dim"), (0, 0, 0, 2)))
    lines += [Padding(Text.assemble(("\u2192 ", "green"), _remedy(findings)), (0, 0, 0, 2)), Text()]
    return lines


def _summary(found: Diagnosis, model: str) -> Text:
    layers = f"{found.layers} batch norm{'' if found.layers == 1 else 's'}"
    rules = f"{len(found.checked)} rule{'' if len(found.checked) == 1 else 's'}"
    counts = [
        Text(f"{count} {severity}{'' if count == 1 or severity == 'info' else 's'}", _STYLES[severity])
        for severity, count in found.counts().items()
        if count
    ]
    told = Text(", ").join(counts) if counts else Text("nothing found", "bold green")
    waiting = sorted(set(found.skipped.values()))
    left = f"; {len(found.skipped)} rules not applied ({', '.join(waiting)})" if found.skipped else ""
    return Text.assemble((model, "bold"), f": {layers}, {rules}: ", told, (left, "dim"))
