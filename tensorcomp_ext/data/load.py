"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .cifar import read_cifar10, read_cifar100
from .dataset import Dataset
from .digits import read_digits
from .idx import read_fashion_mnist, read_kmnist, read_mnist
from .svhn import read_svhn

_READERS: dict[str, Callable[[Path, bool], Dataset]] = {
    "mnist": read_mnist,
    "fashion-mnist": read_fashion_mnist,
    "kmnist": read_kmnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "svhn": read_svhn,
}


def names() -> tuple[str, ...]:
    """The names `load` knows."""
    return ("digits", *_READERS)


def load(
    name: str, root: str | Path | None = None, *, size: int | None = None, train: bool = True
) -> Dataset:
    """Read a data set from files in its official format.

    Arguments:
        name: "digits" (scikit-learn's 8x8 handwritten digits, upscaled; needs no files), "mnist",
            "fashion-mnist", "kmnist" (IDX files, plain, .gz or .xz), "cifar10", "cifar100" (binary version)
            or "svhn" (cropped digits, .mat).
        root: folder that holds the files, or the folder above it; not used by digits.
        size: side of the images. Digits are upscaled to it (32 by default); the others are padded with black
            from their own size (None keeps that).
        train: False leaves the training images out, for which no file is needed then.

    Raises ValueError for an unknown name or for files that are truncated, damaged or of another format,
    naming the file; FileNotFoundError where files are missing.
    """
    if name not in names():
        raise ValueError(f"data.load: unknown data set {name!r}; known: {', '.join(names())}")
    if name == "digits":
        digits = read_digits(32 if size is None else size)
        return digits if train else digits.without_training()
    if root is None:
        raise ValueError(f"data.load: {name} needs root, the folder that holds its files")
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"data.load: {name}: no folder {folder}")
    dataset = _READERS[name](folder, train)
    return dataset if size is None else dataset.padded(size)
