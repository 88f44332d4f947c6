"""CIFAR-10's binary version, in a folder and in its archive; the pickled version is refused."""

from __future__ import annotations

import gzip
import pickle
import re

import numpy as np
import pytest

from batchnorm import InputError
from batchnorm.study import datasets
from batchnorm.study.datasets import cifar10
from study import made_images


def files(rows=20):
    return {name: made_images.cifar_rows(rows, seed) for seed, name in enumerate(made_images.CIFAR_FILES)}


def check(images, rows=20):
    assert images.train[0].shape == (5 * rows, 3, 32, 32)
    assert images.test[0].shape == (rows, 3, 32, 32)
    for seed in range(6):
        pixels, labels = made_images.labelled(rows, (3, 32, 32), seed)
        part = images.test if seed == 5 else tuple(each[seed * rows : (seed + 1) * rows] for each in images.train)
        np.testing.assert_array_equal(part[0], pixels)
        np.testing.assert_array_equal(part[1], labels)


@pytest.mark.parametrize("place", ["", "cifar-10-batches-bin"])
def test_files_in_a_folder(tmp_path, place):
    made_images.cifar10(tmp_path / place)
    images = cifar10.read(tmp_path)
    check(images)
    assert images.unpublished == made_images.CIFAR_FILES


def test_packed_files(tmp_path):
    for name, data in files().items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    check(cifar10.read(tmp_path))


@pytest.mark.parametrize(("name", "mode"), [("cifar-10-binary.tar.gz", "w:gz"), ("cifar-10-binary.tar", "w")])
def test_an_archive(tmp_path, name, mode):
    made_images.archive(tmp_path / name, {"batches.meta.txt": b"airplane\n", **files()}, mode)
    check(cifar10.read(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is unpacked on the disk


def test_one_row_is_writable(tmp_path):
    made_images.cifar10(tmp_path, rows=1)
    assert cifar10.read(tmp_path).test[0].flags.writeable


def test_the_checksums_have_their_form():
    sums = [*cifar10.PUBLISHED.values(), cifar10.ARCHIVE.sha256]
    assert len(set(sums)) == 7
    assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in sums)
    assert tuple(cifar10.PUBLISHED) == made_images.CIFAR_FILES


def test_the_pickled_version_is_refused_unread(tmp_path):
    class Mine:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for number in range(1, 6):
        (batches / f"data_batch_{number}").write_bytes(pickle.dumps(Mine()))
    with pytest.raises(
        datasets.MissingFilesError,
        match=r"holds cifar-10-batches-py, the Python version .* pickled and is not read, as that runs the code in it: "
        r"put cifar-10-binary\.tar\.gz, the binary version, there or use --download",
    ):
        cifar10.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data[:-1],
            r"data_batch_2\.bin: expected rows of 3073 bytes .* got 61459 bytes, which is no whole",
        ),
        (lambda data: b"\x0a" + data[1:], r"data_batch_2\.bin: expected labels of 0 to 9, got 10: is it another set's"),
        (lambda _: b"", r"data_batch_2\.bin holds no images"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    path = made_images.cifar10(tmp_path) / "data_batch_2.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        cifar10.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    (made_images.cifar10(tmp_path) / "test_batch.bin").unlink()
    with pytest.raises(datasets.MissingFilesError, match=r"lacks test_batch\.bin: expected the six files"):
        cifar10.read(tmp_path)


def test_a_cut_archive(tmp_path):
    path = made_images.archive(tmp_path / "cifar-10-binary.tar.gz", files())
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(
        InputError, match=r"cifar-10-binary\.tar\.gz is a damaged or cut archive \(.*\): fetch it again"
    ):
        cifar10.read(tmp_path)


def test_another_archive(tmp_path):
    made_images.archive(tmp_path / "cifar-10-binary.tar.gz", {"data_batch_1": b"pickled"})
    with pytest.raises(InputError, match=r"lacks data_batch_1\.bin, .*: expected the binary version of CIFAR-10"):
        cifar10.read(tmp_path)


def test_the_archive_is_fetched(tmp_path, monkeypatch):
    path = made_images.archive(tmp_path / "published.tar.gz", files(3))
    data = path.read_bytes()
    source = datasets.fetching.Source(cifar10.ARCHIVE.name, (path.as_uri(),), datasets.images.sha256(data), len(data))
    monkeypatch.setattr(cifar10, "ARCHIVE", source)
    datasets.prepare(["cifar10"], str(tmp_path / "here"), True, lambda _: None)
    check(datasets.load("cifar10", str(tmp_path / "here")), rows=3)
