"""What each section may be told: one frozen dataclass a section, its defaults, and its ``QUICK`` and ``FULL`` forms.

A module here is named as its section. Every value is a number, a string, a bool or a tuple of one kind, since it goes
to TOML and comes from it.
"""

from __future__ import annotations
