"""The doctor's findings for code scanners and for GitHub."""

from __future__ import annotations

from batchnorm.report.findings import github, sarif

FINDINGS = [
    {
        "code": "BN202",
        "rule": "vanishing-variance",
        "severity": "error",
        "layer": "layer1.0.bn1",
        "message": "running_var is 0 in 1 of 4 channels: 100%\nreally",
        "remedy": "bn.recalibrate(model, batches)",
        "numbers": {"channels": [3]},
    },
    {"code": "BN001", "rule": "bias", "severity": "info", "layer": "", "message": "m", "remedy": "r", "numbers": {}},
]
RULES = [
    {"code": "BN001", "name": "bias", "severity": "info", "summary": "A bias.", "explanation": "A bias.\n\nIt hurts."},
    {"code": "BN202", "name": "vanishing-variance", "severity": "warning", "summary": "s", "explanation": "e"},
]


def test_sarif_has_what_code_scanners_require():
    log = sarif(FINDINGS, RULES, "1.2.3", "src/net.py", 12)
    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    driver, results = log["runs"][0]["tool"]["driver"], log["runs"][0]["results"]
    assert driver["version"] == "1.2.3"
    assert [rule["id"] for rule in driver["rules"]] == ["BN001", "BN202"]
    assert driver["rules"][1]["defaultConfiguration"] == {"level": "warning"}
    first, second = results
    assert driver["rules"][first["ruleIndex"]]["id"] == first["ruleId"] == "BN202"
    assert (first["level"], second["level"]) == ("error", "note")
    (location,) = first["locations"]
    assert location["logicalLocations"] == [{"fullyQualifiedName": "layer1.0.bn1", "kind": "module"}]
    assert location["physicalLocation"]["artifactLocation"] == {"uri": "src/net.py"}
    assert location["physicalLocation"]["region"] == {"startLine": 12}
    assert first["message"]["text"].startswith("layer1.0.bn1: running_var is 0")
    assert first["partialFingerprints"] != second["partialFingerprints"]


def test_sarif_without_a_file_has_no_place_in_one():
    (result, _) = sarif(FINDINGS, RULES, "1", None)["runs"][0]["results"]
    assert "physicalLocation" not in result["locations"][0]


def test_github_annotations_are_one_line_each():
    lines = github(FINDINGS, "src/net.py", 12).splitlines()
    assert lines == [
        "::error file=src/net.py,line=12,title=BN202 vanishing-variance::layer1.0.bn1: running_var is 0 in 1 of 4 "
        "channels: 100%25%0Areally. bn.recalibrate(model, batches)",
        "::notice file=src/net.py,line=12,title=BN001 bias::the model: m. r",
    ]
    assert github(FINDINGS[1:], None) == "::notice title=BN001 bias::the model: m. r"
