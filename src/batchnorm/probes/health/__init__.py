"""The doctor's rules, their codes, and what they find."""

from __future__ import annotations

from batchnorm.probes.health.config import DoctorConfig, find_config, read_config
from batchnorm.probes.health.diagnosis import diagnose
from batchnorm.probes.health.finding import SEVERITIES, Diagnosis, Finding, Severity
from batchnorm.probes.health.rule import Rule, Sign, rule, rules, selected
from batchnorm.probes.health.subject import Subject

# Importing a module of rules registers them.

__all__ = [
    "SEVERITIES",
    "Diagnosis",
    "DoctorConfig",
    "Finding",
    "Rule",
    "Severity",
    "Sign",
    "Subject",
    "diagnose",
    "find_config",
    "read_config",
    "rule",
    "rules",
    "selected",
]
