"""The rules by their codes.

A rule is a function of a :class:`~batchnorm.probes.health.subject.Subject` that yields :class:`Sign` objects. Its
docstring is its page in short: what it finds, why that hurts, its false alarms; ``docs/rules`` has the whole page.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from batchnorm._errors import InputError
from batchnorm.probes.health.finding import Finding, Severity
from batchnorm.probes.health.layer_state import to_move

if TYPE_CHECKING:
    from batchnorm.probes.health.subject import Subject

Need = Literal["model", "wiring", "optimizer", "batches"]
"""What a rule looks at beyond the modules themselves: how they are connected, an optimizer, or data."""


@dataclass(frozen=True)
class Sign:
    """What a rule yields: a :class:`~batchnorm.probes.health.finding.Finding` without what the rule itself knows.

    ``severity`` takes the place of the rule's own where a case is milder or worse.
    """

    layer: str
    message: str
    remedy: str
    numbers: dict[str, Any] = field(default_factory=dict)
    severity: Severity | None = None


Check = Callable[["Subject"], Iterable[Sign]]


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        code: ``BN`` and three digits: 0xx structure, 1xx settings, 2xx state, 3xx data.
        name: in words, with hyphens.
        severity: of its findings, unless a case says otherwise.
        needs: what it cannot do without.
        check: the function.
    """

    code: str
    name: str
    severity: Severity
    needs: Need
    check: Check

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return self.explanation.split("\n", 1)[0]

    @property
    def explanation(self) -> str:
        """Its docstring: what it finds, why it hurts, its false alarms."""
        return inspect.cleandoc(self.check.__doc__ or "")

    def findings(self, subject: Subject) -> Iterator[Finding]:
        """What it finds about ``subject``."""
        for sign in self.check(subject):
            severity, remedy = sign.severity or self.severity, sign.remedy
            if "bn.recalibrate(" in remedy and "track_running_stats" not in remedy:
                module = next((layer.module for layer in subject.layers if sign.layer in layer.names), None)
                before = None if module is None else to_move(module, sign.layer)
                remedy = f"{remedy}; before that {before}" if before else remedy
            yield Finding(self.code, self.name, severity, sign.layer, sign.message, remedy, sign.numbers)


_RULES: dict[str, Rule] = {}


def rule(code: str, name: str, severity: Severity, needs: Need = "model") -> Callable[[Check], Check]:
    """Register the decorated check under ``code``."""

    def register(check: Check) -> Check:
        assert code not in _RULES, f"{code} is taken"
        _RULES[code] = Rule(code, name, severity, needs, check)
        return check

    return register


def rules() -> tuple[Rule, ...]:
    """All rules, by code."""
    return tuple(_RULES[code] for code in sorted(_RULES))


def selected(select: Collection[str] | None = None, ignore: Collection[str] = ()) -> tuple[Rule, ...]:
    """The rules that ``select`` names and ``ignore`` does not.

    Args:
        select: codes, names, or beginnings and patterns of them: ``"BN201"``, ``"BN2"``, ``"never-updated"``,
            ``"BN3*"``. None for all.
        ignore: likewise.

    Raises:
        InputError: (ValueError) something selects no rule at all.
    """
    # A lone name is a list of one, not of its letters.
    select = [select] if isinstance(select, str) else select
    ignore = [ignore] if isinstance(ignore, str) else ignore
    for wanted in (*(select or ()), *ignore):
        if not any(matches(candidate, wanted) for candidate in rules()):
            raise InputError(f"expected a rule's code or name, got {wanted!r}: batchnorm doctor --rules lists them")
    return tuple(
        candidate
        for candidate in rules()
        if (select is None or any(matches(candidate, wanted) for wanted in select))
        and not any(matches(candidate, unwanted) for unwanted in ignore)
    )


def matches(candidate: Rule | Finding, wanted: str) -> bool:
    """Whether ``wanted`` (a code or the beginning of one, a name, a pattern) means this rule, or this finding's."""
    name = candidate.name if isinstance(candidate, Rule) else candidate.rule
    # BN, BN2, BN201: the beginning of a code.
    if wanted.upper().startswith("BN") and (wanted[2:].isdigit() or len(wanted) == 2):
        return candidate.code.startswith(wanted.upper())
    return any(fnmatch.fnmatchcase(text, wanted) for text in (candidate.code, name))
