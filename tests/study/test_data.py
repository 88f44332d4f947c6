"""The data: sizes, strata, seeds."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm.study import data


@pytest.mark.parametrize(
    ("make", "sizes", "width"), [(data.digits, (1000, 300, 497), 64), (data.breast_cancer, (341, 114, 114), 30)]
)
def test_splits_share_nothing_and_miss_nothing(make, sizes, width):
    split = make(3)
    parts = (split.train, split.validation, split.test)
    assert tuple(len(labels) for _, labels in parts) == sizes
    assert split.features == width
    shares = [np.bincount(labels) / len(labels) for _, labels in parts]
    assert all(np.abs(one - shares[0]).max() < 0.01 for one in shares)
    rows = np.concatenate([features for features, _ in parts])
    whole, _ = data._load("load_digits" if width == 64 else "load_breast_cancer")
    scaled = whole / (16.0 if width == 64 else 1.0)
    assert np.array_equal(np.sort(rows.sum(1)), np.sort(scaled.sum(1)))


def test_a_seed_is_a_split():
    again, same, other = data.digits(1), data.digits(1), data.digits(2)
    assert np.array_equal(again.test[0], same.test[0])
    assert not np.array_equal(again.test[0], other.test[0])
    assert again.train[0].max() == 1.0
    assert data.digits(1, scale=1.0).train[0].max() == 16.0


def test_the_spiral_has_two_arms_through_the_whole_disc():
    split = data.spiral(0, points=400, noise=0.0)
    features = np.concatenate([split.train[0], split.validation[0], split.test[0]])
    labels = np.concatenate([split.train[1], split.validation[1], split.test[1]])
    radius = np.hypot(features[:, 0], features[:, 1])
    assert [len(split.train[1]), len(split.validation[1]), len(split.test[1])] == [200, 100, 100]
    assert radius.max() <= 1.0
    assert radius.min() < 0.15
    # Without noise a point lies on its arm: the angle follows from the radius.
    angle = 2 * np.pi * 1.5 * radius + np.pi * labels
    np.testing.assert_allclose(features, radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), atol=1e-12)
    assert not np.array_equal(data.spiral(1, points=400).train[0], data.spiral(0, points=400).train[0])
