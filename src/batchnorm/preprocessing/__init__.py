"""Centre, scale and whiten data: scikit-learn estimators that stream, merge, and go into the network.

NumPy arrays, torch tensors, tables of pandas, polars and pyarrow come back as they came. Statistics are exact in
float64 whatever the split of the data (``fit``, any sequence of ``partial_fit``, or ``merge`` of estimators fitted
elsewhere). Sparse matrices are taken where zeros stay zeros. With
``channel_axis=1`` data are (N, C, *) and statistics per channel. ``to_module()`` makes an ``nn.Module`` of a fitted
estimator, ``fold_into(layer)`` a part of the layer behind it, ``save(path)`` and :func:`load` keep it, without pickle;
:func:`save_model` and :func:`load_model` keep it together with the network behind it. :func:`transform_file` transforms
files of any size into such files, :func:`describe` says what was learned and what is suspicious in it.
"""

from __future__ import annotations

from batchnorm.preprocessing.alignment import CORAL
from batchnorm.preprocessing.artefact import SavedModel, load_model, save_model
from batchnorm.preprocessing.centering import MeanSubtractor
from batchnorm.preprocessing.describing import describe
from batchnorm.preprocessing.distributed import fit_files_on_ray, local, ray_dataset, transform_files_on_ray
from batchnorm.preprocessing.saving import load
from batchnorm.preprocessing.scaling import MinMaxScaler, StandardScaler
from batchnorm.preprocessing.sinks import transform_file
from batchnorm.preprocessing.sources import open_source
from batchnorm.preprocessing.whitening import Whitener

__all__ = [
    "CORAL",
    "MeanSubtractor",
    "MinMaxScaler",
    "SavedModel",
    "StandardScaler",
    "Whitener",
    "describe",
    "fit_files_on_ray",
    "load",
    "load_model",
    "local",
    "open_source",
    "ray_dataset",
    "save_model",
    "transform_file",
    "transform_files_on_ray",
]
