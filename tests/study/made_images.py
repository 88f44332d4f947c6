"""Small files in the formats of MNIST and CIFAR-10, made by the tests: noise over a mark for the class."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile

import numpy as np

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")


def idx(array):
    """An IDX file of unsigned bytes."""
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def labelled(count, shape, seed):
    """``count`` images of ``shape`` whose corner is as bright as their label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    images[..., :8, :8] = 25 * labels.reshape(-1, *[1] * len(shape))
    return images, labels


def mnist(folder, train=120, test=40, packed=False):
    """Write MNIST's four files into ``folder``; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        images, labels = labelled(count, (28, 28), seed=count)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = idx(array)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return folder


def cifar_rows(count, seed):
    """One file of CIFAR-10's binary version."""
    images, labels = labelled(count, (3, 32, 32), seed)
    return np.concatenate([labels[:, None].astype(np.uint8), images.reshape(count, -1)], axis=1).tobytes()


def cifar10(folder, rows=20):
    """Write CIFAR-10's six files into ``folder``; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(CIFAR_FILES):
        (folder / name).write_bytes(cifar_rows(rows, seed))
    return folder


def archive(path, files, mode="w:gz"):
    """Write a tar of ``files`` (name -> bytes) as the published one is laid out."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
