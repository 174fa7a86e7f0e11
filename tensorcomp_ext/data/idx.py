"""MNIST-format data: IDX files, packed or plain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .dataset import Dataset
from .packed import find, need, unpacked

_IMAGES_MAGIC = 0x00000803  # unsigned bytes, three dimensions
_LABELS_MAGIC = 0x00000801  # unsigned bytes, one dimension
_CHUNK = 1 << 20

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_KUZUSHIJI_CLASSES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def read_mnist(root: Path, train: bool = True) -> Dataset:
    """MNIST (LeCun et al. 1998): 60,000 training and 10,000 test images of 1x28x28."""
    digits = tuple(map(str, range(10)))
    return _read(root, train, "mnist", ("mnist", "MNIST/raw"), (0.1307,), (0.3081,), digits)


def read_fashion_mnist(root: Path, train: bool = True) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images of 1x28x28."""
    folders = ("fashion-mnist", "FashionMNIST/raw")
    return _read(root, train, "fashion-mnist", folders, (0.2860,), (0.3530,), _FASHION_CLASSES)


def read_kmnist(root: Path, train: bool = True) -> Dataset:
    """Kuzushiji-MNIST (Clanuwat et al. 2018): 60,000 training and 10,000 test images of 1x28x28."""
    folders = ("kmnist", "KMNIST/raw")
    return _read(root, train, "kmnist", folders, (0.1918,), (0.3483,), _KUZUSHIJI_CLASSES)


def _read(
    root: Path,
    train: bool,
    name: str,
    folders: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: tuple[str, ...],
) -> Dataset:
    candidates = [root, *(root / folder for folder in folders)]
    sets = (("train", "train"), ("test", "t10k")) if train else (("test", "t10k"),)
    folder = next((c for c in candidates if _find(c, f"{sets[0][1]}-images-idx3-ubyte")), root)
    parts: dict[str, torch.Tensor] = {}
    for split, prefix in sets:
        image_file = _need(folder, f"{prefix}-images-idx3-ubyte", name)
        label_file = _need(folder, f"{prefix}-labels-idx1-ubyte", name)
        images = read_idx(image_file, _IMAGES_MAGIC)
        labels = read_idx(label_file, _LABELS_MAGIC)
        if len(images) != len(labels):
            raise ValueError(
                f"{name}: {image_file} has {len(images)} images but {label_file} has {len(labels)} labels"
            )
        parts[f"{split}_images"] = torch.from_numpy(images)[:, None]
        parts[f"{split}_labels"] = torch.from_numpy(labels).long()
    if not train:
        parts |= {"train_images": parts["test_images"][:0], "train_labels": parts["test_labels"][:0]}
    return Dataset(name=name, mean=mean, std=std, classes=classes, **parts)


def _stems(stem: str) -> tuple[str, str]:
    """Spellings of a file's name: some mirrors write the last hyphen as a dot."""
    return stem, stem.replace("-idx", ".idx")


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for name in _stems(stem) if (path := find(folder, name))), None)


def _need(folder: Path, stem: str, name: str) -> Path:
    return _find(folder, stem) or need(folder, stem, name)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """One IDX file of unsigned bytes: big-endian magic number and sizes, then the values.

    Arguments:
        path: file; decompressed where its name ends in .gz or .xz.
        magic: expected magic number; its last byte is the number of dimensions.

    Returns uint8 of the sizes in the header. Raises ValueError for another magic number, a file shorter or
    longer than its header says, an empty one, or damaged compression.
    """
    dimensions = magic & 0xFF
    header_bytes = 4 + 4 * dimensions
    header = b""
    with unpacked(path) as file:
        header = file.read(header_bytes)
        if len(header) < header_bytes:
            raise ValueError(f"{path} is truncated: its header needs {header_bytes} bytes, got {len(header)}")
        found, *shape = (int(value) for value in np.frombuffer(header, ">u4"))
        if found != magic:
            raise ValueError(
                f"{path} is not the expected IDX file: magic number 0x{magic:08x}, got 0x{found:08x}"
            )
        expected = int(np.prod(shape, dtype=object))
        # In pieces, so that a false header cannot ask for more memory than the file fills.
        content = bytearray()
        while len(content) <= expected and (piece := file.read(min(_CHUNK, expected + 1 - len(content)))):
            content += piece
    if expected == 0:
        raise ValueError(f"{path} is empty: its header gives the sizes {shape}")
    if len(content) != expected:
        held = f"only {len(content)}" if len(content) < expected else "more"
        raise ValueError(f"{path} is truncated or damaged: {expected} bytes of data for {shape}, got {held}")
    return np.frombuffer(content, np.uint8).reshape(shape)
