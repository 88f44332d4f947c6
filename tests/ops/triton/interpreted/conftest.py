"""The ways that a step can be launched, on shapes small enough for the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import triton.language as tl
from triton.runtime import interpreter

from batchnorm.ops.triton import plan
from ops.triton.interpreted.ways import ROUTES, take


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a kilobyte, any number to a program, two tiles a group: small tensors are cut as large ones are.

    A unit is one program's unless a test takes another way: programs that meet would wait for ever here.
    """
    monkeypatch.setattr(plan, "_TILE_BYTES", 1024)
    monkeypatch.setattr(plan, "_LEAST_TILES", 1)
    monkeypatch.setattr(plan, "_RUNS", (64, 32))
    monkeypatch.setattr(plan, "_COLUMNS", 32)
    monkeypatch.setattr(plan, "GROUP", 2)
    monkeypatch.setattr(plan, "CHUNK", 4)
    take(ROUTES[0], monkeypatch)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way in turn; see :func:`take`."""
    request.getfixturevalue("small_tiles")
    take(request.param, monkeypatch)
    return request.param


class _Nothing:
    def restore(self) -> None:
        """Nothing was changed."""


@pytest.fixture(scope="session", autouse=True)
def _prepared_once() -> Iterator[None]:
    """The interpreter prepares the language anew at each call of a device function, which takes half of the time."""
    prepare = interpreter._patch_lang
    scope = prepare(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _: _Nothing()
    yield
    interpreter._patch_lang = prepare
    scope.restore()
