"""The Dataset record and the digits."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorcomp_ext import data

SHARED = Path(os.environ.get("TENSORCOMP_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return data.load("digits")


def test_digits_split_is_fixed_and_stratified(digits):
    assert digits.train_images.shape == (1442, 1, 32, 32)
    assert digits.test_images.shape == (355, 1, 32, 32)
    total = digits.train_labels.bincount() + digits.test_labels.bincount()
    assert torch.equal(digits.test_labels.bincount(), total // 5)
    again = data.load("digits")
    assert torch.equal(again.test_images, digits.test_images)
    alone = data.load("digits", train=False)
    assert len(alone.train_labels) == 0 and torch.equal(alone.test_images, digits.test_images)


@pytest.mark.parametrize("size", [8, 16, 28])
def test_digits_are_the_originals_upscaled(size):
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    dataset = data.load("digits", size=size)
    assert dataset.image_size == (size, size)
    # Averaged back over its blocks, the image is the original up to the blur of the interpolation.
    first = min(np.flatnonzero(raw.target == label)[4] for label in range(10))
    assert dataset.test_labels[0] == raw.target[first]
    back = torch.nn.functional.adaptive_avg_pool2d(dataset.test_images[0].float(), 8)[0].numpy()
    original = raw.images[first] * 255 / 16
    tolerance = 0.003 if size == 8 else 0.25
    assert np.linalg.norm(back - original) <= tolerance * np.linalg.norm(original)


def test_digits_too_small():
    with pytest.raises(ValueError, match="at least 8"):
        data.load("digits", size=7)


def test_normalize_matches_its_equation(digits):
    images = digits.train_images[:9]
    expected = (images.double() / 255 - digits.mean[0]) / digits.std[0]
    assert torch.allclose(digits.normalize(images).double(), expected, atol=1e-5)
    everything = digits.normalize(digits.train_images)
    assert abs(everything.mean()) < 1e-4 and abs(everything.std() - 1) < 1e-3
    with pytest.raises(TypeError, match="uint8"):
        digits.normalize(images.float())


def test_normalize_keeps_channels_last():
    dataset = _small(3).with_normalization(data.IMAGENET_MEAN, data.IMAGENET_STD)
    images = dataset.train_images.to(memory_format=torch.channels_last)
    result = dataset.normalize(images)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, dataset.normalize(dataset.train_images))


def _small(channels, **changes):
    fields = {
        "name": "small",
        "train_images": torch.randint(0, 256, (6, channels, 5, 5), dtype=torch.uint8),
        "train_labels": torch.arange(6) % 3,
        "test_images": torch.randint(0, 256, (4, channels, 5, 5), dtype=torch.uint8),
        "test_labels": torch.arange(4) % 3,
        "mean": (0.5,) * channels,
        "std": (0.25,) * channels,
        "classes": ("a", "b", "c"),
    }
    return data.Dataset(**{**fields, **changes})


def test_first_keeps_the_beginning():
    dataset = _small(1)
    part = dataset.first(train=4, test=2)
    assert torch.equal(part.train_images, dataset.train_images[:4]) and len(part.test_labels) == 2
    assert len(dataset.first(train=2).test_labels) == 4
    with pytest.raises(ValueError, match="at least 1"):
        dataset.first(train=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(6, 1, 5, 5)}, "train images must be uint8"),
        ({"train_labels": torch.zeros(5, dtype=torch.long)}, "6 images but"),
        ({"test_labels": torch.full((4,), 3)}, r"labels must be in 0\.\.2"),
        ({"test_images": torch.zeros(4, 1, 6, 5, dtype=torch.uint8)}, "test images"),
        (
            {"train_labels": torch.arange(6, dtype=torch.int32) % 3},
            "labels must be int64, got torch.int32",
        ),
        ({"test_labels": torch.zeros(4)}, "test labels must be int64, got torch.float32"),
        ({"mean": (math.inf,)}, "mean must be of pixels scaled to 0..1"),
        ({"mean": (127.0,)}, "mean must be of pixels scaled to 0..1"),
        ({"std": (math.nan,)}, r"std must be positive and finite, got \(nan,\)"),
        ({"std": (math.inf,)}, "std must be positive and finite"),
        ({"mean": (0.5, 0.5)}, "one entry for each of 1 channels"),
        ({"std": (0.0,)}, "std must be positive"),
    ],
)
def test_inconsistent_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        _small(1, **changes)


def test_split_name_and_frozen():
    dataset = _small(1)
    with pytest.raises(ValueError, match='"train" or "test"'):
        dataset.split("valid")
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.mean = (0.0,)


@pytest.mark.parametrize(("name", "train", "test"), [("mnist", 60000, 10000), ("cifar10", 30000, 5000)])
def test_unpacked_real_files(name, train, test):
    """Reads the official files where a folder of them is given in TENSORCOMP_DATA."""
    try:
        dataset = data.load(name, SHARED)
    except FileNotFoundError as error:
        pytest.skip(f"{error}; set TENSORCOMP_DATA to a folder with the official files")
    assert len(dataset.train_labels) >= min(train, 10000) and len(dataset.test_labels) >= test
    # Each channel's mean must be the published one to the digits published.
    images = dataset.train_images[:10000].double() / 255
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor(dataset.mean).double(), atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": torch.zeros(6, 1, 5, 5).numpy()},
            "train_images must be a torch.Tensor, got ndarray",
        ),
        ({"test_labels": [0, 1, 2, 0]}, "test_labels must be a torch.Tensor, got list"),
        ({"classes": 3}, "classes must be a tuple of names, got 3"),
        ({"classes": "abc"}, "classes must be a tuple of names, got 'abc'"),
    ],
)
def test_fields_of_other_types(changes, message):
    with pytest.raises(TypeError, match=message):
        _small(1, **changes)
