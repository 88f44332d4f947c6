"""The command line: thin commands over the library. ``batchnorm --help`` lists them."""

from __future__ import annotations

from batchnorm.cli.app import main

__all__ = ["main"]
