"""Beyond one process: estimators over the datasets of a Ray cluster, and over the ranks of torch.distributed.

``fit``, ``partial_fit`` and ``transform`` take a Ray Dataset as they take an array; :func:`ray_dataset` chooses its
columns and weights. Inside a torch.distributed job ``fit`` is collective, but for :func:`local`. ray is imported where
it is used, and nowhere before.
"""

from __future__ import annotations

from batchnorm.preprocessing.distributed.ranks import local
from batchnorm.preprocessing.distributed.ray_data import RayDataset, ray_dataset
from batchnorm.preprocessing.distributed.ray_files import fit_files_on_ray, transform_files_on_ray

__all__ = ["RayDataset", "fit_files_on_ray", "local", "ray_dataset", "transform_files_on_ray"]
