"""Programs of a launch side by side in the interpreter, a thread each, where it runs one after the other.

So programs that wait for each other can be tried. Python's lock makes the threads take turns, in any order: what is
shown is that who waits is told and nobody waits for ever, not what a card's memory does between two processors.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import threading
import time
from typing import Any

import pytest
from triton.runtime import interpreter

SECONDS = 60.0
"""After which programs count as waiting for ever."""


class _Places(threading.local):
    """Which program a thread is."""

    place: tuple[int, int, int] | None = None


def _together(function: Any, places: _Places) -> Any:
    """A kernel's function, of which each call is a program; the last one begins them all and waits for them."""
    threads: list[threading.Thread] = []
    faults: list[BaseException] = []

    def one(place: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        places.place = place
        try:
            function(**arguments)
        except BaseException as fault:  # noqa: BLE001 - the test's thread raises it
            faults.append(fault)

    @functools.wraps(function)
    def program(**arguments: Any) -> None:
        assert places.place is not None
        threads.append(threading.Thread(target=one, args=(places.place, arguments), daemon=True))
        if len(threads) < interpreter.interpreter_builder.grid_dim[0]:
            return
        for thread in reversed(threads):  # against the order that everything else has
            thread.start()
        end = time.monotonic() + SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        left = [thread for thread in threads if thread.is_alive()]
        for thread in left:  # before the memory that they write to is given back
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError)
            )
            thread.join()
        if left:
            raise TimeoutError("programs wait for ever")
        if faults:
            raise faults[0]

    program.__signature__ = inspect.signature(function)  # type: ignore[attr-defined] # what the interpreter reads
    return program


def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the programs of each launch run side by side."""
    places, run = _Places(), interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "grid_idx",
        property(lambda _: places.place, lambda _, place: setattr(places, "place", place)),
        raising=False,
    )

    def call(self: Any, *arguments: Any, **constants: Any) -> Any:
        self.fn = _together(self.fn, places)
        return run(self, *arguments, **constants)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
