"""CIFAR-10, binary version."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from .dataset import CIFAR10_MEAN, CIFAR10_STD, Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ROW = 1 + 3 * 32 * 32  # label, then the red, green and blue planes
_BINARY = "the binary version, cifar-10-binary.tar.gz with data_batch_*.bin and test_batch.bin"


def read_cifar10(root: Path, train: bool = True) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 3x32x32; as many data_batch_N.bin as there are, and test_batch.bin.

    Arguments:
        root: cifar-10-batches-bin, or the folder above it.
        train: False reads test_batch.bin alone.

    Raises FileNotFoundError where files are missing, naming the binary version where only the pickled one is
    there (it is never unpickled: a pickle can run any program); ValueError for truncated or wrong files.
    """
    folder = next(
        (f for f in (root, root / "cifar-10-batches-bin") if (f / "test_batch.bin").is_file()), None
    )
    if folder is None:
        for pickled in (root, root / "cifar-10-batches-py"):
            if (pickled / "test_batch").is_file() or (pickled / "data_batch_1").is_file():
                raise FileNotFoundError(f"cifar10: {pickled} holds the pickled version; needed is {_BINARY}")
        raise FileNotFoundError(f"cifar10: no test_batch.bin in {root}; needed is {_BINARY}")
    test = _read_rows(folder / "test_batch.bin")
    batches = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"data_batch_(\d+)\.bin", path.name))
    }
    if train and not batches:
        raise FileNotFoundError(f"cifar10: no data_batch_*.bin in {folder}; needed is {_BINARY}")
    rows = [_read_rows(batches[number]) for number in sorted(batches)] if train else [test[:0]]
    training = np.concatenate(rows)
    return Dataset(
        name="cifar10",
        train_images=_images(training),
        train_labels=torch.from_numpy(training[:, 0].astype(np.int64)),
        test_images=_images(test),
        test_labels=torch.from_numpy(test[:, 0].astype(np.int64)),
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        classes=CLASSES,
    )


def _read_rows(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size == 0 or size % _ROW:
        raise ValueError(
            f"{path} is truncated or not a CIFAR-10 binary file: "
            f"its size must be a positive multiple of {_ROW} bytes, got {size}"
        )
    rows = np.fromfile(path, np.uint8).reshape(-1, _ROW)
    if (rows[:, 0] >= len(CLASSES)).any():
        row = int(np.argmax(rows[:, 0] >= len(CLASSES)))
        raise ValueError(
            f"{path} is damaged or not a CIFAR-10 binary file: row {row} has label {rows[row, 0]}, not 0..9"
        )
    return rows


def _images(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows[:, 1:]).reshape(-1, 3, 32, 32))
