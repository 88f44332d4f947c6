"""What the doctor says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""From the worst on: the outputs are wrong; they probably are or training suffers; good to know."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one layer.

    Attributes:
        code: stable: ``"BN201"``.
        rule: the rule's name: ``"never-updated"``.
        severity: ``"error"``, ``"warning"`` or ``"info"``.
        layer: the module's path; ``""`` for the model as a whole.
        message: what is wrong, with its numbers.
        remedy: what to do, and the call that does it.
        numbers: what was measured, by name.
    """

    code: str
    rule: str
    severity: Severity
    layer: str
    message: str
    remedy: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON, which knows neither NaN nor infinity: those become their names."""
        return {
            "code": self.code,
            "rule": self.rule,
            "severity": self.severity,
            "layer": self.layer,
            "message": self.message,
            "remedy": self.remedy,
            "numbers": {name: _plain(value) for name, value in self.numbers.items()},
        }

    def __str__(self) -> str:
        return f"{self.code} {self.severity} {self.layer or 'the model'}: {self.message}"


@dataclass(frozen=True)
class Diagnosis:
    """The findings about a model, the worst first. Iterates and counts as they do; true where there are any.

    Attributes:
        findings: by severity, then code, then the order of the layers.
        layers: how many batch norms were looked at.
        checked: the codes of the rules that ran.
        skipped: codes of rules that could not run, and why: ``{"BN301": "needs batches"}``.
    """

    findings: tuple[Finding, ...]
    layers: int
    checked: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def codes(self) -> frozenset[str]:
        """The codes that were found."""
        return frozenset(finding.code for finding in self.findings)

    @property
    def worst(self) -> Severity | None:
        """The severity of the worst finding; None without one."""
        return self.findings[0].severity if self.findings else None

    def of(self, code: str) -> tuple[Finding, ...]:
        """The findings with ``code``."""
        return tuple(finding for finding in self.findings if finding.code == code)

    def counts(self) -> dict[Severity, int]:
        """How many findings of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "layers": self.layers,
            "counts": self.counts(),
            "findings": [finding.to_dict() for finding in self.findings],
            "checked": list(self.checked),
            "skipped": dict(self.skipped),
        }

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        layers = f"{self.layers} batch norm{'s' if self.layers != 1 else ''}"
        if not self.findings:
            return f"{layers} looked at, {len(self.checked)} rules, nothing found"
        lines = [f"{finding}\n    {finding.remedy}" for finding in self.findings]
        counts = ", ".join(f"{count} {severity}" for severity, count in self.counts().items() if count)
        return "\n".join([*lines, f"{layers} looked at: {counts}"])


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
