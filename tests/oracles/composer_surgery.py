"""composer's ``utils.module_surgery``, without the package around it, which needs torchvision to be imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


def module_surgery() -> Any:
    """The module; skips the test where mosaicml is not installed."""
    found = importlib.util.find_spec("composer")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mosaicml is not installed")
    (folder,) = found.submodule_search_locations
    for name, path in (("composer", folder), ("composer.utils", f"{folder}/utils")):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [path]
            sys.modules[name] = package
    return importlib.import_module("composer.utils.module_surgery")
