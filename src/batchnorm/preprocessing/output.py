"""``set_output`` where the output is a stream: frames batch by batch."""

from __future__ import annotations

from functools import wraps
from typing import Any

from sklearn import get_config


def frames_wanted(estimator: Any) -> str | None:
    """The kind of frame that ``set_output`` or the configuration asks for, or None."""
    kind = getattr(estimator, "_sklearn_output_config", {}).get("transform")
    if kind is None:
        kind = get_config()["transform_output"]
    return None if kind in (None, "default") else str(kind)


def framed(estimator: Any, out: Any, values: Any) -> Any:
    """A transformed batch as the frame that is wanted, with the index of ``values`` where they have one."""
    kind = frames_wanted(estimator)
    if kind is None:
        return out
    names = list(estimator.get_feature_names_out())
    if kind == "pandas":
        import pandas as pd

        return pd.DataFrame(out, index=getattr(values, "index", None), columns=names, copy=False)
    import polars as pl

    return pl.DataFrame(out, schema=names, orient="row")


class StreamedOutput:
    """Keeps scikit-learn's wrapper of ``transform`` away from streams, which it would take for data."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # where scikit-learn wraps
        wrapped = cls.__dict__.get("transform")
        original = getattr(wrapped, "__wrapped__", None)
        if wrapped is None or original is None:
            return

        @wraps(original)
        def transform(self: Any, X: Any, *args: Any, **more: Any) -> Any:
            return (original if self._is_stream(X) else wrapped)(self, X, *args, **more)

        cls.transform = transform  # type: ignore[attr-defined]
