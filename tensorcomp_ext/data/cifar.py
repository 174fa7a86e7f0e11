"""CIFAR-10 and CIFAR-100, binary versions."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from .dataset import CIFAR10_MEAN, CIFAR10_STD, CIFAR100_MEAN, CIFAR100_STD, Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FINE = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel "
    "can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
    "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion "
    "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
    "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea "
    "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table "
    "tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman "
    "worm"
)
FINE_CLASSES = tuple(_FINE.split())
_COARSE = 20  # CIFAR-100's rows have a label of twenty superclasses before that of the hundred classes.
_PIXELS = 3 * 32 * 32  # the red, green and blue planes
_BINARY = "the binary version, cifar-10-binary.tar.gz with data_batch_*.bin and test_batch.bin"
_BINARY_100 = "the binary version, cifar-100-binary.tar.gz with train.bin and test.bin"


def read_cifar10(root: Path, train: bool = True) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 3x32x32; as many data_batch_N.bin as there are, and test_batch.bin.

    Arguments:
        root: cifar-10-batches-bin, or the folder above it.
        train: False reads test_batch.bin alone.

    Raises FileNotFoundError where files are missing, naming the binary version where only the pickled one is
    there (it is never unpickled: a pickle can run any program); ValueError for truncated or wrong files.
    """
    pickled = (("cifar-10-batches-py", "test_batch"), ("cifar-10-batches-py", "data_batch_1"))
    folder = _folder(root, "cifar10", "cifar-10-batches-bin", "test_batch.bin", pickled, _BINARY)
    test = _read_rows(folder / "test_batch.bin", "CIFAR-10", (len(CLASSES),))
    batches = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"data_batch_(\d+)\.bin", path.name))
    }
    if train and not batches:
        raise FileNotFoundError(f"cifar10: no data_batch_*.bin in {folder}; needed is {_BINARY}")
    paths = [batches[number] for number in sorted(batches)] if train else []
    rows = np.concatenate([test[:0], *(_read_rows(path, "CIFAR-10", (len(CLASSES),)) for path in paths)])
    return _dataset("cifar10", rows, test, CIFAR10_MEAN, CIFAR10_STD, CLASSES)


def read_cifar100(root: Path, train: bool = True) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 3x32x32, a hundred classes.

    Arguments:
        root: cifar-100-binary, or the folder above it.
        train: False reads test.bin alone.

    Raises as `read_cifar10` does.
    """
    pickled = (("cifar-100-python", "test"), ("cifar-100-python", "train"))
    folder = _folder(root, "cifar100", "cifar-100-binary", "test.bin", pickled, _BINARY_100)
    limits = (_COARSE, len(FINE_CLASSES))
    test = _read_rows(folder / "test.bin", "CIFAR-100", limits)
    if train and not (folder / "train.bin").is_file():
        raise FileNotFoundError(f"cifar100: no train.bin in {folder}; needed is {_BINARY_100}")
    rows = _read_rows(folder / "train.bin", "CIFAR-100", limits) if train else test[:0]
    return _dataset("cifar100", rows, test, CIFAR100_MEAN, CIFAR100_STD, FINE_CLASSES)


def _folder(
    root: Path, name: str, inner: str, test: str, pickled: tuple[tuple[str, str], ...], needed: str
) -> Path:
    for folder in (root, root / inner):
        if (folder / test).is_file():
            return folder
    for above, file in pickled:
        for folder in (root, root / above):
            if (folder / file).is_file():
                raise FileNotFoundError(f"{name}: {folder} holds the pickled version; needed is {needed}")
    raise FileNotFoundError(f"{name}: no {test} in {root}; needed is {needed}")


def _read_rows(path: Path, kind: str, limits: tuple[int, ...]) -> np.ndarray:
    """uint8 [N, labels + 3072]; one label under each of ``limits`` before the pixels."""
    width, size = len(limits) + _PIXELS, path.stat().st_size
    if size == 0 or size % width:
        raise ValueError(
            f"{path} is truncated or not a {kind} binary file: "
            f"its size must be a positive multiple of {width} bytes, got {size}"
        )
    rows = np.fromfile(path, np.uint8).reshape(-1, width)
    for column, limit in enumerate(limits):
        wrong = rows[:, column] >= limit
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{path} is damaged or not a {kind} binary file: "
                f"row {row} has label {rows[row, column]}, not 0..{limit - 1}"
            )
    return rows


def _dataset(
    name: str,
    training: np.ndarray,
    test: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: tuple[str, ...],
) -> Dataset:
    labels = test.shape[1] - _PIXELS
    parts = {}
    for split, rows in (("train", training), ("test", test)):
        pixels = np.ascontiguousarray(rows[:, labels:]).reshape(-1, 3, 32, 32)
        parts[f"{split}_images"] = torch.from_numpy(pixels)
        parts[f"{split}_labels"] = torch.from_numpy(rows[:, labels - 1].astype(np.int64))
    return Dataset(name=name, mean=mean, std=std, classes=classes, **parts)
