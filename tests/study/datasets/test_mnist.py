"""MNIST's files: what is read, what is refused and how, and what is said of files that aren't the published ones."""

from __future__ import annotations

import gzip
import re
import struct

import numpy as np
import pytest

from batchnorm import ConfigError, InputError
from batchnorm.study import datasets
from batchnorm.study.datasets import mnist
from study import made_images


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_written_is_read(tmp_path, packed):
    folder = made_images.mnist(tmp_path, train=30, test=20, packed=packed)
    images = mnist.read(folder)
    for part, count in ((images.train, 30), (images.test, 20)):
        pixels, labels = made_images.labelled(count, (28, 28), seed=count)
        np.testing.assert_array_equal(part[0], pixels[:, None])
        np.testing.assert_array_equal(part[1], labels)
        assert part[0].dtype == np.uint8
        assert part[1].dtype == np.int64
    assert len(images.unpublished) == 4


@pytest.mark.parametrize("place", ["MNIST/raw", "mnist"])
def test_where_other_programs_leave_them(tmp_path, place):
    made_images.mnist(tmp_path / place)
    assert len(mnist.read(tmp_path).train[1]) == 120


def test_a_dot_before_idx(tmp_path):
    for path in made_images.mnist(tmp_path).iterdir():
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(mnist.read(tmp_path).test[1]) == 40


def test_what_is_packed_is_told_by_its_content(tmp_path):
    """A browser unpacks what it fetches and keeps the name; others pack and drop it."""
    made_images.mnist(tmp_path)
    plain = tmp_path / "train-images-idx3-ubyte"
    plain.rename(tmp_path / "train-images-idx3-ubyte.gz")
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(gzip.compress(labels.read_bytes()))
    assert len(mnist.read(tmp_path).train[1]) == 120


def test_the_published_files_are_known_by_their_checksum(tmp_path, monkeypatch):
    made_images.mnist(tmp_path, packed=True)
    for path in tmp_path.iterdir():
        content = gzip.decompress(path.read_bytes())
        monkeypatch.setitem(mnist.PUBLISHED, path.name.removesuffix(".gz"), datasets.images.sha256(content))
    assert mnist.read(tmp_path).unpublished == ()
    told = []
    datasets.prepare(["mnist"], str(tmp_path), False, told.append)
    assert told == []


def test_the_checksums_have_their_form():
    sums = [*mnist.PUBLISHED.values(), *(checksum for checksum, _ in mnist.PACKED.values())]
    assert len(set(sums)) == 8
    assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in sums)
    assert mnist.PUBLISHED.keys() == mnist.PACKED.keys()


def test_other_files_are_a_note_and_no_error(tmp_path):
    made_images.mnist(tmp_path)
    told = []
    datasets.prepare(["mnist"], str(tmp_path), False, told.append)
    (note,) = told
    assert note.startswith("train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, ")
    assert "not the published MNIST (other SHA-256)" in note
    assert "\n" not in note


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def small_images(_):
    return made_images.idx(np.zeros((120, 8, 8)))


def other_labels(data):
    return data[:8] + bytes([11]) + data[9:]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES, lambda data: data[:-5], r"its header promises 120 x 28 x 28 = 94080 bytes, it holds 94075: fetch it"),
        (IMAGES, lambda data: data + b"\0", r"its header promises 120 x 28 x 28 = 94080 bytes, it holds 94081"),
        (IMAGES, lambda data: data[:10], r"is cut short: expected an IDX header of 16 bytes, got 10"),
        (IMAGES, lambda _: b"", r"is cut short: expected an IDX header of 16 bytes, got 0"),
        (IMAGES, lambda data: struct.pack(">I", 2049) + data[4:], r"expected the IDX magic number 2051 .*got 2049"),
        (IMAGES, lambda _: b"<!DOCTYPE html><html>", r"expected the IDX magic number 2051 .* it is another file"),
        (IMAGES, small_images, r"expected train images of 28 x 28 pixels, got 8 x 8"),
        (
            LABELS,
            lambda _: made_images.idx(np.arange(9)),
            r"120 train images and 9 train labels do not belong together",
        ),
        (LABELS, other_labels, r"train labels: expected labels of 0 to 9, got 11: is it another set's file\?"),
        (IMAGES, lambda data: gzip.compress(data)[:-20], r"is a damaged or cut gzip file \(.*\): fetch it again"),
        (IMAGES, lambda data: gzip.compress(data)[:30] + b"\1\2\3\4" * 9, r"is a damaged or cut gzip file"),
    ],
)
def test_what_is_refused(tmp_path, name, change, message):
    damage(made_images.mnist(tmp_path), name, change)
    with pytest.raises(InputError, match=message) as caught:
        mnist.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_set_without_images(tmp_path):
    made_images.mnist(tmp_path, test=0)
    with pytest.raises(InputError, match="t10k labels holds no images: expected at least one"):
        mnist.read(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    (made_images.mnist(tmp_path) / LABELS).unlink()
    with pytest.raises(
        datasets.MissingFilesError, match=rf"lacks {LABELS}: expected MNIST's four IDX files.*--download"
    ):
        datasets.prepare(["mnist"], str(tmp_path), False, print)


def test_no_folder():
    with pytest.raises(ConfigError, match=r"section mnist needs the files of MNIST: name their folder with --data-dir"):
        datasets.prepare(["mnist"], "", True, print)


def test_no_such_set(tmp_path):
    with pytest.raises(InputError, match="unknown set of images 'imagenet': expected mnist or cifar10"):
        datasets.load("imagenet", str(tmp_path))


def test_nothing_is_fetched_that_is_there(tmp_path, monkeypatch):
    made_images.mnist(tmp_path)
    monkeypatch.setattr(mnist, "fetch", None)
    datasets.prepare(["mnist"], str(tmp_path), True, lambda _: None)


def test_what_is_missing_is_fetched(tmp_path, monkeypatch):
    """From a folder in the place of the mirrors; the second gives what the first does not have."""
    there = made_images.mnist(tmp_path / "there", packed=True)
    here = tmp_path / "new" / "here"
    for name in made_images.MNIST_FILES:
        data = (there / f"{name}.gz").read_bytes()
        monkeypatch.setitem(mnist.PACKED, name, (datasets.images.sha256(data), len(data)))
        monkeypatch.setitem(mnist.PUBLISHED, name, datasets.images.sha256(gzip.decompress(data)))
    monkeypatch.setattr(mnist, "MIRRORS", ((tmp_path / "nowhere").as_uri() + "/", there.as_uri() + "/"))
    told = []
    datasets.prepare(["mnist"], str(here), True, told.append)
    assert sorted(path.name for path in here.iterdir()) == sorted(f"{name}.gz" for name in made_images.MNIST_FILES)
    assert [line.split(",")[0] for line in told[:2]] == ["fetching train-images-idx3-ubyte.gz"] * 2
    assert len(datasets.load("mnist", str(here)).test[1]) == 40
