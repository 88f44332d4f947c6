"""The doctor's rules, their codes, and what they find."""

from __future__ import annotations

from batchnorm.probes.health import (
    activations,
    batches,
    channels,
    dimensions,
    disagreement,
    inputs,
    modes,
    settings,
    stale,
    state,
    structure,
    training,
)
from batchnorm.probes.health.config import DoctorConfig, find_config, read_config
from batchnorm.probes.health.diagnosis import diagnose
from batchnorm.probes.health.finding import SEVERITIES, Diagnosis, Finding, Severity
from batchnorm.probes.health.rule import Rule, Sign, rule, rules, selected
from batchnorm.probes.health.subject import Subject

# Importing a module of rules registers them.
RULES_ABOUT = (
    *(structure, dimensions, modes, settings, training, state, channels),  # the model alone
    *(stale, disagreement, batches, activations, inputs),  # data
)
"""The modules of the rules."""

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
