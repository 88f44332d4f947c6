"""``bn.compare``: normalizations compared on a user's own network and data.

>>> import batchnorm as bn
>>> comparison = bn.compare(make_model, (X, y), variants=("none", "batch"))          # doctest: +SKIP
>>> print(comparison.verdict)                                                          # doctest: +SKIP

What a finished or interrupted comparison says (:class:`Comparison`, its verdict and its page) needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchnorm.study.comparison.result import Comparison
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.comparison.verdict import Judgement, Verdict

if TYPE_CHECKING:
    from batchnorm.study.comparison.api import compare
    from batchnorm.study.comparison.building import Deferred

__all__ = ["CompareConfig", "Comparison", "Deferred", "Judgement", "Verdict", "compare"]


def __getattr__(name: str) -> Any:
    # These two need torch; a page is rebuilt without it.
    if name == "compare":
        from batchnorm.study.comparison.api import compare

        return compare
    if name == "Deferred":
        from batchnorm.study.comparison.building import Deferred

        return Deferred
    raise AttributeError(f"module 'batchnorm.study.comparison' has no attribute {name!r}")
