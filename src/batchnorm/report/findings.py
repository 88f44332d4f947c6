"""The doctor's findings for other programs: SARIF 2.1.0, and the annotations of GitHub's workflows.

Works on plain dictionaries, as :meth:`batchnorm.probes.Diagnosis.to_dict` gives them: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}

Finding = Mapping[str, Any]


def sarif(
    findings: Sequence[Finding], rules: Sequence[Mapping[str, str]], version: str, file: str | None, line: int = 1
) -> dict[str, Any]:
    """A SARIF log with one run.

    Args:
        findings: with code, rule, severity, layer, message, remedy and numbers.
        rules: code, name, severity, summary and explanation of those that were applied.
        version: of this package.
        file: of the model's source, relative to the repository, for the code scanners that want a place in a file.
        line: where in it the model is made.
    """
    order = {rule["code"]: index for index, rule in enumerate(rules)}
    driver = {
        "name": "batchnorm doctor",
        "version": version,
        "rules": [
            {
                "id": rule["code"],
                "name": rule["name"],
                "shortDescription": {"text": rule["summary"]},
                "fullDescription": {"text": rule["explanation"]},
                "defaultConfiguration": {"level": _LEVELS[rule["severity"]]},
            }
            for rule in rules
        ],
    }
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "results": [_result(finding, order[finding["code"]], file, line) for finding in findings],
            }
        ],
    }


def github(findings: Sequence[Finding], file: str | None, line: int = 1) -> str:
    """A line of GitHub's workflow commands for each finding."""
    lines = []
    for finding in findings:
        place = f"file={_property(PurePath(file).as_posix())},line={line}," if file else ""
        title = _property(f"{finding['code']} {finding['rule']}")
        text = f"{finding['layer'] or 'the model'}: {finding['message']}. {finding['remedy']}"
        lines.append(f"::{_COMMANDS[finding['severity']]} {place}title={title}::{_escaped(text)}")
    return "\n".join(lines)


def _result(finding: Finding, index: int, file: str | None, line: int) -> dict[str, Any]:
    name = finding["layer"] or "the model"
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": name, "kind": "module"}]}
    if file:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": PurePath(file).as_posix()},
            "region": {"startLine": line},
        }
    return {
        "ruleId": finding["code"],
        "ruleIndex": index,
        "level": _LEVELS[finding["severity"]],
        "message": {"text": f"{name}: {finding['message']}. {finding['remedy']}"},
        "locations": [location],
        # The same finding in the next run is the same alert, whatever its numbers are then.
        "partialFingerprints": {"layerAndCode/v1": f"{name}:{finding['code']}"},
        "properties": {"numbers": finding["numbers"]},
    }


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
