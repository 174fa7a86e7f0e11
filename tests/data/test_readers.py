"""Readers of data files: official layouts written byte by byte, then damaged in every way a user meets."""

import gzip
import lzma
import struct

import numpy as np
import pytest
import torch

from tensorcomp_ext import data

IDX_FILES = {
    "train-images-idx3-ubyte": (0x803, (12, 28, 28)),
    "train-labels-idx1-ubyte": (0x801, (12,)),
    "t10k-images-idx3-ubyte": (0x803, (5, 28, 28)),
    "t10k-labels-idx1-ubyte": (0x801, (5,)),
}


def idx_bytes(magic, shape, seed=0):
    high = 256 if len(shape) == 3 else 10
    values = np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + values.tobytes(), values


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def write_mnist(folder, ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, (magic, shape) in IDX_FILES.items():
        content, arrays[name] = idx_bytes(magic, shape)
        (folder / f"{name}{ending}").write_bytes(PACKERS[ending](content))
    return arrays


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "fashion-mnist"), ("kmnist", "KMNIST/raw")],
)
def test_idx_values(tmp_path, name, folder, ending):
    arrays = write_mnist(tmp_path / folder, ending)
    dataset = data.load(name, tmp_path)
    assert dataset.train_images.shape == (12, 1, 28, 28) and dataset.train_images.dtype == torch.uint8
    assert np.array_equal(dataset.train_images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(dataset.test_images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(dataset.train_labels.numpy(), arrays["train-labels-idx1-ubyte"])
    assert np.array_equal(dataset.test_labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert len(dataset.classes) == 10


def test_padding_centres_the_images(tmp_path):
    write_mnist(tmp_path)
    plain, padded = data.load("mnist", tmp_path), data.load("mnist", tmp_path, size=32)
    assert padded.image_size == (32, 32)
    assert torch.equal(padded.train_images[:, :, 2:30, 2:30], plain.train_images)
    assert padded.train_images.sum() == plain.train_images.sum()
    with pytest.raises(ValueError, match="28x28 cannot be padded to 20x20"):
        data.load("mnist", tmp_path, size=20)


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", list(IDX_FILES))
@pytest.mark.parametrize("damage", ["cut data", "cut header", "extra", "magic", "empty", "bytes"])
def test_damaged_idx(tmp_path, name, ending, damage):
    write_mnist(tmp_path, ending)
    content, _ = idx_bytes(*IDX_FILES[name])
    path = tmp_path / f"{name}{ending}"
    broken = {
        "cut data": content[:-1],
        "cut header": content[:6],
        "extra": content + b"\0",
        "magic": struct.pack(">I", 0x1803) + content[4:],
        "empty": b"",
        "bytes": b"<!DOCTYPE html><html><body>404</body></html>",
    }[damage]
    path.write_bytes(PACKERS[ending](broken))
    with pytest.raises(ValueError, match=path.name):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_damaged_gzip(tmp_path, damage):
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "not gzip":
        content = bytearray(b"PK\x03\x04 this is a zip file, not gzip")
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is truncated or damaged"):
        data.load("mnist", tmp_path)


def test_false_header_asks_for_no_memory(tmp_path):
    """A header that promises 2^62 bytes over a file of a few must fail at once."""
    write_mnist(tmp_path, ".gz")
    content = struct.pack(">4I", 0x803, 2**30, 2**16, 2**16) + b"\1" * 100
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="got only 100"):
        data.load("mnist", tmp_path)


def test_counts_that_differ(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(0x801, (11,))[0])
    with pytest.raises(ValueError, match=r"12 images but .* 11 labels"):
        data.load("mnist", tmp_path)


def test_label_out_of_range(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 5) + bytes([0, 1, 2, 10, 3]))
    with pytest.raises(ValueError, match=r"test labels must be in 0\.\.9, got 0\.\.10"):
        data.load("mnist", tmp_path)


def test_missing_idx_file(tmp_path):
    write_mnist(tmp_path, ".gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"
    ):
        data.load("mnist", tmp_path)


def write_cifar(folder, batches=(1, 2, 10), rows=4):
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for number, name in [*((n, f"data_batch_{n}.bin") for n in batches), (99, "test_batch.bin")]:
        values = np.random.default_rng(number).integers(0, 256, (rows, 3073), dtype=np.uint8)
        values[:, 0] %= 10
        values.tofile(folder / name)
        written[name] = values
    return written


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
@pytest.mark.parametrize("batches", [(1,), (1, 2, 10)])
def test_cifar_values(tmp_path, folder, batches):
    written = write_cifar(tmp_path / folder, batches)
    dataset = data.load("cifar10", tmp_path)
    rows = np.concatenate([written[f"data_batch_{n}.bin"] for n in batches])
    assert dataset.train_images.shape == (4 * len(batches), 3, 32, 32)
    assert np.array_equal(dataset.train_labels.numpy(), rows[:, 0])
    for channel, row, column in [(0, 0, 0), (1, 3, 31), (2, 31, 7)]:
        byte = 1 + channel * 1024 + row * 32 + column
        assert np.array_equal(dataset.train_images[:, channel, row, column].numpy(), rows[:, byte])
    assert dataset.classes[3] == "cat" and dataset.mean == data.CIFAR10_MEAN


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize("size", [0, 3072, 3073 * 4 - 1])
def test_truncated_cifar(tmp_path, name, size):
    write_cifar(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"{name} is truncated.*3073 bytes, got {size}"):
        data.load("cifar10", tmp_path)


def test_cifar_label_out_of_range(tmp_path):
    written = write_cifar(tmp_path)["data_batch_1.bin"]
    written[2, 0] = 128
    written.tofile(tmp_path / "data_batch_1.bin")
    with pytest.raises(ValueError, match="row 2 has label 128"):
        data.load("cifar10", tmp_path)


def test_damaged_cifar_test_images_are_told_before_missing_training_images(tmp_path):
    write_cifar(tmp_path, batches=())
    (tmp_path / "test_batch.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"test_batch\.bin is truncated"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_pickled_cifar_is_refused_unread(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / folder / name).write_bytes(b"\x80\x02}q\x01.")
    with pytest.raises(FileNotFoundError, match="pickled version; needed is the binary version"):
        data.load("cifar10", tmp_path)


def test_missing_cifar_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no test_batch\.bin.*binary version"):
        data.load("cifar10", tmp_path)
    write_cifar(tmp_path, batches=())
    with pytest.raises(FileNotFoundError, match=r"no data_batch_\*\.bin"):
        data.load("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load("cifar10", tmp_path / "absent")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
@pytest.mark.parametrize("present", [False, True])
def test_test_images_alone_need_no_training_files(tmp_path, name, present):
    if name == "cifar10":
        write_cifar(tmp_path, batches=(1,) if present else ())
    else:
        write_mnist(tmp_path, ".gz")
    for path in () if present else tmp_path.glob("train-*"):
        path.unlink()
    dataset = data.load(name, tmp_path, size=32, train=False)
    assert dataset.image_size == (32, 32) and len(dataset.train_labels) == 0
    assert len(dataset.test_labels) == (4 if name == "cifar10" else 5)
    if present:
        everything = data.load(name, tmp_path, size=32)
        assert torch.equal(dataset.test_images, everything.test_images) and len(everything.train_labels) > 0
        assert torch.equal(everything.without_training().test_labels, dataset.test_labels)
    else:
        with pytest.raises(FileNotFoundError, match=r"train-images|data_batch"):
            data.load(name, tmp_path)


def test_unknown_set_and_missing_root():
    with pytest.raises(ValueError, match=r"'stl10'; known: digits, mnist, fashion-mnist, kmnist, cifar10"):
        data.load("stl10", ".")
    with pytest.raises(ValueError, match="needs root"):
        data.load("mnist")
