"""The pair of processes that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from distributed.pair import Pair, running


@pytest.fixture(scope="session")
def pair() -> Iterator[Callable[[], Pair]]:
    yield from running()
