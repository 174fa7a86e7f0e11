"""Street View House Numbers, cropped digits."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from .dataset import SVHN_MEAN, SVHN_STD, Dataset


def read_svhn(root: Path, train: bool = True) -> Dataset:
    """SVHN, format 2 (Netzer et al. 2011): 73,257 training and 26,032 test images of 3x32x32.

    The 531,131 extra images are not read. A zero is labelled 10 in the files and 0 here.

    Arguments:
        root: folder of train_32x32.mat and test_32x32.mat, or the one above it.
        train: False reads test_32x32.mat alone.

    Raises FileNotFoundError where files are missing; ValueError for truncated or wrong files.
    """
    folders = (root, root / "svhn", root / "SVHN")
    folder = next((f for f in folders if (f / "test_32x32.mat").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"svhn: no test_32x32.mat in {root}")
    if train and not (folder / "train_32x32.mat").is_file():
        raise FileNotFoundError(f"svhn: no train_32x32.mat in {folder}")
    test_images, test_labels = _read_mat(folder / "test_32x32.mat")
    train_images, train_labels = (
        _read_mat(folder / "train_32x32.mat") if train else (test_images[:0], test_labels[:0])
    )
    return Dataset(
        name="svhn",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        mean=SVHN_MEAN,
        std=SVHN_STD,
        classes=tuple(map(str, range(10))),
    )


def _read_mat(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, 32, 32] and labels of a MATLAB 5 file with X [32, 32, 3, N] and y [N, 1]."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        # The two arrays alone: other entries of such a file could be objects.
        content = loadmat(path, variable_names=("X", "y"))
    except (
        MatReadError,
        NotImplementedError,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        struct.error,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is truncated, damaged or no MATLAB 5 file: {error}") from error
    images, labels = content.get("X"), content.get("y")
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[:3] != (32, 32, 3)
    ):
        given = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else "none"
        raise ValueError(f"{path}: X must be uint8 [32, 32, 3, N], got {given}")
    count = images.shape[3]
    if not isinstance(labels, np.ndarray) or labels.shape != (count, 1) or labels.dtype.kind not in "iu":
        given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else "none"
        raise ValueError(f"{path}: y must be whole numbers [{count}, 1], got {given}")
    if count == 0:
        raise ValueError(f"{path} is empty: it has no images")
    digits = labels[:, 0].astype(np.int64)
    wrong = (digits < 1) | (digits > 10)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{path}: image {row} has label {digits[row]}, not 1..10")
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return torch.from_numpy(pixels), torch.from_numpy(digits % 10)
