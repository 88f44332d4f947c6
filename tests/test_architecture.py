"""The directions of import, the one public door, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

PACKAGE = Path(batchnorm.__file__).parent
# The way of the data: a room may know those to its left. preprocessing and ops are siblings and don't know each other.
ORDER = ("moments", "preprocessing", "ops", "nn", "probes", "surgery", "study", "report", "cli")
SIBLINGS = {("ops", "preprocessing"), ("preprocessing", "ops")}
PRIVATE = {"_checks", "_errors", "_gpu", "_gpu_probe", "_library"}  # below all rooms
# A file that may import one module to its right, inside a function that a user calls.
EXCEPTIONS = {
    "probes/watching/handle.py": ("report", "watch.to_html() draws the records that the watch holds"),
    "study/comparison/result.py": ("report", "comparison.to_html() draws the document that it holds"),
}


def imports(path: Path) -> set[str]:
    """The rooms of the package that a file imports, at whatever depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "batchnorm":
                names = [f"batchnorm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value]
            names = [name for name in names if isinstance(name, str)]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("batchnorm.")}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room in PRIVATE:
        assert imports(path) <= PRIVATE
        return
    allowed, _ = EXCEPTIONS.get(path.relative_to(PACKAGE).as_posix(), (None, ""))
    for other in imports(path) & set(ORDER) - {room, allowed}:
        assert ORDER.index(other) < ORDER.index(room), f"{room} must not import {other}"
        assert (room, other) not in SIBLINGS, f"{room} must not import {other}"


def test_the_test_of_directions_sees_imports():
    assert imports(PACKAGE / "nn" / "batch_norm.py") >= {"ops"}
    assert imports(PACKAGE / "ops" / "reference.py") >= {"moments"}
    for path, (room, _) in EXCEPTIONS.items():
        assert room in imports(PACKAGE / path), f"{path} no longer needs its exception"


def python(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


LIBRARIES = {"torch", "numpy"}
HEAVY = {"sklearn", "plotly", "jinja2", "pandas", "polars", "ray", "pyarrow", "triton", "rich", "click"}
HEAVY |= {"lightning", "tensorboard"}


def test_import_is_lean():
    loaded = set(python("import sys, batchnorm; print(*sys.modules)").split())
    assert loaded.isdisjoint(HEAVY | LIBRARIES)


@pytest.mark.parametrize("room", ["nn", "ops", "moments", "probes", "surgery"])
def test_rooms_that_need_torch_alone(room):
    loaded = set(python(f"import sys, batchnorm; batchnorm.{room}; print(*sys.modules)").split())
    assert loaded.isdisjoint(HEAVY), loaded & HEAVY


def test_the_public_door():
    for name in batchnorm.__all__:
        assert getattr(batchnorm, name) is not None
    assert dir(batchnorm) == sorted(batchnorm.__all__)
    with pytest.raises(AttributeError, match="module 'batchnorm' has no attribute 'batchnorm2d'"):
        _ = batchnorm.batchnorm2d


@pytest.mark.parametrize("room", sorted(batchnorm._ROOMS))
def test_every_name_that_a_room_exports_exists(room):
    module = getattr(batchnorm, room)
    if hasattr(module, "__all__"):
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_no_file_is_a_giant():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path.name: length for path, length in lengths.items() if length > 350} == {}


def test_every_error_is_also_the_kind_that_users_expect():
    for name in batchnorm.__all__:
        thing = getattr(batchnorm, name)
        if isinstance(thing, type) and issubclass(thing, Exception) and thing is not batchnorm.BatchnormError:
            assert issubclass(thing, batchnorm.BatchnormError)
            assert issubclass(thing, ValueError | TypeError | OSError | ImportError | RuntimeError), name
