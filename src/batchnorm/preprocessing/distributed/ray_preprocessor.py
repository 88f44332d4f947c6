"""An estimator as a preprocessor of Ray Data. Imported only where ray is wanted: its base class is ray's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ray.data.block import BlockAccessor
from ray.data.preprocessor import Preprocessor

from batchnorm.preprocessing.distributed.ray_data import ray_dataset
from batchnorm.preprocessing.distributed.ray_transform import transform, transform_table


class EstimatorPreprocessor(Preprocessor):
    """See ``to_ray_preprocessor`` of the estimators. ``estimator`` is the copy that it fits and uses."""

    def __init__(
        self,
        estimator: Any,
        columns: Sequence[str] | str | None = None,
        output_columns: Sequence[str] | str | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.estimator = copy.deepcopy(estimator)
        self.columns = [columns] if isinstance(columns, str) else columns
        self.output_columns = [output_columns] if isinstance(output_columns, str) else output_columns
        self.weights = weights

    def fit_status(self) -> Preprocessor.FitStatus:
        """Whether the estimator is fitted."""
        fitted = self.estimator.__sklearn_is_fitted__()
        return Preprocessor.FitStatus.FITTED if fitted else Preprocessor.FitStatus.NOT_FITTED

    def get_input_columns(self) -> list[str]:
        """The features, empty where they have not been chosen."""
        return list(self.columns or [])

    def get_output_columns(self) -> list[str]:
        """Where the results go."""
        return list(self.output_columns or self.columns or [])

    def _fit(self, ds: Any) -> Preprocessor:
        self.estimator.fit(ray_dataset(ds, self.columns, self.weights))
        return self

    def _transform(
        self,
        ds: Any,
        batch_size: int | None,
        num_cpus: float | None = None,
        memory: float | None = None,
        concurrency: int | None = None,
    ) -> Any:
        asked = {"batch_size": batch_size, "num_cpus": num_cpus, "memory": memory, "concurrency": concurrency}
        options = {name: value for name, value in asked.items() if value is not None}
        data = ray_dataset(ds, self.columns, self.weights)
        return transform(self.estimator, data, inverse=False, output_columns=self.output_columns, **options)

    def _transform_batch(self, data: Any) -> Any:
        if not (isinstance(data, Mapping) or hasattr(data, "columns")):
            return self.estimator.transform(data)
        table = BlockAccessor.for_block(BlockAccessor.batch_to_block(data)).to_arrow()
        columns = self.columns
        if columns is None:
            names = getattr(self.estimator, "feature_names_in_", None)
            columns = None if names is None else [str(name) for name in names]
        out = transform_table(self.estimator, table, columns, inverse=False, output_columns=self.output_columns)
        if isinstance(data, Mapping):
            return BlockAccessor.for_block(out).to_batch_format("numpy")
        if not hasattr(data, "index"):
            return out
        frame = BlockAccessor.for_block(out).to_pandas()
        frame.index = data.index
        return frame

    def _transform_pandas(self, df: Any) -> Any:
        return self._transform_batch(df)

    def _transform_numpy(self, np_data: Any) -> Any:
        return self._transform_batch(np_data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.estimator!r}, columns={self.columns!r})"
