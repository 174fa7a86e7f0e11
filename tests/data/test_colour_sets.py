"""CIFAR-100 and SVHN: official layouts written by hand, then damaged."""

import numpy as np
import pytest
import torch
from scipy.io import savemat

from tensorcomp_ext import data


def write_cifar100(folder, rows=6):
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, name in enumerate(("train.bin", "test.bin")):
        values = np.random.default_rng(seed).integers(0, 256, (rows, 3074), dtype=np.uint8)
        values[:, 0] %= 20
        values[:, 1] %= 100
        values.tofile(folder / name)
        written[name] = values
    return written


@pytest.mark.parametrize("folder", [".", "cifar-100-binary"])
def test_cifar100_values(tmp_path, folder):
    written = write_cifar100(tmp_path / folder)
    dataset = data.load("cifar100", tmp_path)
    assert dataset.train_images.shape == (6, 3, 32, 32) and len(dataset.classes) == 100
    for images, labels, rows in (
        (dataset.train_images, dataset.train_labels, written["train.bin"]),
        (dataset.test_images, dataset.test_labels, written["test.bin"]),
    ):
        assert np.array_equal(labels.numpy(), rows[:, 1])
        for channel, row, column in [(0, 0, 0), (1, 3, 31), (2, 31, 7)]:
            byte = 2 + channel * 1024 + row * 32 + column
            assert np.array_equal(images[:, channel, row, column].numpy(), rows[:, byte])
    assert dataset.classes[0] == "apple" and dataset.classes[69] == "rocket" and dataset.classes[99] == "worm"
    assert tuple(sorted(dataset.classes)) == dataset.classes


@pytest.mark.parametrize(("column", "label"), [(0, 20), (1, 100)])
def test_cifar100_label_out_of_range(tmp_path, column, label):
    written = write_cifar100(tmp_path)["test.bin"]
    written[4, column] = label
    written.tofile(tmp_path / "test.bin")
    with pytest.raises(ValueError, match=rf"test\.bin is damaged.*row 4 has label {label}"):
        data.load("cifar100", tmp_path)


def test_cifar100_missing_pickled_truncated(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"\x80\x02}q\x01.")
    with pytest.raises(FileNotFoundError, match=r"pickled version; needed is .*cifar-100-binary"):
        data.load("cifar100", tmp_path)
    write_cifar100(tmp_path)
    (tmp_path / "train.bin").unlink()
    assert len(data.load("cifar100", tmp_path, train=False).train_labels) == 0
    with pytest.raises(FileNotFoundError, match=r"no train\.bin"):
        data.load("cifar100", tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match=r"train\.bin is truncated.*3074 bytes, got 3073"):
        data.load("cifar100", tmp_path)


def write_svhn(folder, rows=7, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, split in enumerate(("train", "test")):
        generator = np.random.default_rng(seed)
        content = {
            "X": generator.integers(0, 256, (32, 32, 3, rows), dtype=np.uint8),
            "y": (np.arange(rows) % 10 + 1).astype(np.uint8)[:, None],
        }
        written[split] = content | changed
        savemat(folder / f"{split}_32x32.mat", written[split], do_compression=True)
    return written


@pytest.mark.parametrize("folder", [".", "svhn"])
def test_svhn_values(tmp_path, folder):
    written = write_svhn(tmp_path / folder, rows=12)
    dataset = data.load("svhn", tmp_path)
    assert dataset.train_images.shape == (12, 3, 32, 32) and dataset.train_images.is_contiguous()
    for images, split in ((dataset.train_images, "train"), (dataset.test_images, "test")):
        for index, channel, row, column in [(0, 0, 0, 0), (3, 1, 4, 31), (11, 2, 31, 6)]:
            assert images[index, channel, row, column] == written[split]["X"][row, column, channel, index]
    assert dataset.test_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert len(data.load("svhn", tmp_path, train=False).train_labels) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 7))}, r"X must be uint8 \[32, 32, 3, N\], got float64"),
        ({"X": np.zeros((7, 32, 32, 3), np.uint8)}, "X must be uint8"),
        ({"X": "text"}, "X must be uint8"),
        ({"y": np.ones((6, 1), np.uint8)}, r"y must be whole numbers \[7, 1\], got uint8 \[6, 1\]"),
        ({"y": np.full((7, 1), 1.5)}, "y must be whole numbers"),
        ({"y": np.array([[1], [2], [0], [3], [4], [5], [6]], np.uint8)}, "image 2 has label 0, not 1..10"),
        ({"y": np.array([[11], [2], [1], [3], [4], [5], [6]], np.uint8)}, "image 0 has label 11"),
    ],
)
def test_wrong_svhn(tmp_path, changed, message):
    write_svhn(tmp_path, **changed)
    with pytest.raises(ValueError, match=rf"_32x32\.mat: {message}"):
        data.load("svhn", tmp_path)


@pytest.mark.parametrize("size", [0, 3, 127, 140, 4000])
def test_truncated_svhn(tmp_path, size):
    write_svhn(tmp_path)
    content = (tmp_path / "test_32x32.mat").read_bytes()
    assert size < len(content)
    (tmp_path / "test_32x32.mat").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"test_32x32\.mat"):
        data.load("svhn", tmp_path)


def test_missing_svhn(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no test_32x32\.mat"):
        data.load("svhn", tmp_path)
    write_svhn(tmp_path)
    (tmp_path / "train_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"no train_32x32\.mat"):
        data.load("svhn", tmp_path)


def test_normalisation_of_new_sets(tmp_path):
    write_cifar100(tmp_path)
    write_svhn(tmp_path)
    for name in ("cifar100", "svhn"):
        dataset = data.load(name, tmp_path, size=34)
        x = dataset.normalize(dataset.test_images)
        pixel = dataset.test_images[1, 2, 5, 7].double() / 255
        assert x.shape[2:] == (34, 34)
        torch.testing.assert_close(
            x[1, 2, 5, 7].double(), (pixel - dataset.mean[2]) / dataset.std[2], rtol=1e-5, atol=1e-6
        )
