"""What docs/peers.md says of other libraries holds for the installed ones."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest
import sklearn.decomposition
import sklearn.preprocessing
import torch
from torch.nn.utils import fusion

from oracles.absent_torchvision import stand_in

os.environ.setdefault("KERAS_BACKEND", "torch")
PAGE = Path(__file__).parents[2] / "docs" / "peers.md"


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_torch_has_no_mask_no_cpu_sync_and_no_whitening():
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"):
        assert parameters(getattr(torch.nn, name).forward) == {"self", "input"}
    assert not [name for name in dir(torch.nn) if "enorm" in name or "hite" in name or "Iter" in name]
    # Raised where a process group of several is initialized: tests/distributed compares with ours there.
    assert "SyncBatchNorm expected input tensor to be on" in inspect.getsource(torch.nn.SyncBatchNorm.forward)
    assert "activation" not in parameters(torch.nn.BatchNorm2d)
    assert {"LayerNorm", "GroupNorm", "InstanceNorm2d", "RMSNorm"} <= set(dir(torch.nn))
    assert callable(fusion.fuse_conv_bn_eval)
    assert parameters(torch.optim.swa_utils.update_bn) == {"loader", "model", "device"}


def test_torch_thaws_in_training_mode():
    layer = torch.nn.BatchNorm1d(3).eval()
    layer.train()
    layer(torch.randn(8, 3))
    assert layer.num_batches_tracked == 1


def test_keras_has_masks_renormalization_and_statistics_over_replicas_of_tensorflow_only():
    import keras

    layer = keras.layers.BatchNormalization
    assert {"training", "mask"} <= parameters(layer.call)
    assert {"renorm", "synchronized", "axis"} <= parameters(layer.__init__)
    assert "Only applicable with the TensorFlow backend" in " ".join(layer.__doc__.split())
    assert callable(keras.layers.Normalization.adapt)
    found = {name for name in dir(keras.layers) if name.endswith("Normalization")}
    assert {"GroupNormalization", "LayerNormalization", "RMSNormalization", "SpectralNormalization"} <= found
    assert {"Hashing", "Discretization", "CategoryEncoding"} <= set(dir(keras.layers))


def test_timm_has_activations_other_normalizations_and_no_mask():
    stand_in()
    from timm import layers

    assert "act_layer" in parameters(layers.BatchNormAct2d.__init__)
    assert "mask" not in parameters(layers.BatchNormAct2d.forward)
    wanted = {"EvoNorm2dS0", "FilterResponseNormAct2d", "GroupNormAct", "RmsNorm"}
    assert wanted <= set(dir(layers))
    assert callable(layers.freeze_batch_norm_2d)
    assert callable(layers.convert_sync_batchnorm)


def test_scikit_learn_whitens_by_pca_and_does_not_merge():
    assert "whiten" in parameters(sklearn.decomposition.PCA.__init__)
    assert not hasattr(sklearn.decomposition.PCA, "partial_fit")
    assert hasattr(sklearn.decomposition.IncrementalPCA, "partial_fit")
    for estimator in (sklearn.preprocessing.StandardScaler, sklearn.preprocessing.MinMaxScaler):
        assert hasattr(estimator, "partial_fit")
        assert not hasattr(estimator, "merge")
    assert {"QuantileTransformer", "RobustScaler", "PowerTransformer", "OneHotEncoder"} <= set(
        dir(sklearn.preprocessing)
    )


def test_fvcore_recalibrates():
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    assert callable(precise.update_bn_stats)


def test_the_versions_named_are_the_installed_ones():
    import keras

    text = PAGE.read_text(encoding="utf-8")
    for name, version in (
        ("torch", torch.__version__),
        ("Keras", keras.__version__),
        ("scikit-learn", sklearn.__version__),
    ):
        assert f"{name} {'.'.join(version.split('.')[:2])}" in text
