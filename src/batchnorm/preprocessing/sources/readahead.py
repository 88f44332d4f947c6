"""Read in the background while the caller computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any


def read_ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The items, with at most ``depth`` of them fetched by a thread before they are asked for.

    An error of the thread is raised here, in its place. Leaving early (``close``, an error of the caller) ends the
    thread before this returns, so that no file stays open behind the caller's back.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    left = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not left.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def fetch() -> None:
        try:
            for item in items:
                if not put("item", item):
                    break
            else:
                put("end", None)
        except BaseException as error:  # noqa: BLE001 -- it is the caller's, whatever it is
            put("error", error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=fetch, name="batchnorm-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            del value  # or it would live on while the next one is waited for
    finally:
        left.set()
        thread.join()
