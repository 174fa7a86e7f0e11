"""What every reader returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
SVHN_MEAN = (0.4377, 0.4438, 0.4728)
SVHN_STD = (0.1980, 0.2010, 0.1970)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Dataset:
    """Images and labels of a classification set, in memory.

    Attributes:
        name: as given to `data.load`.
        train_images, test_images: uint8 [N, C, H, W], 0..255.
        train_labels, test_labels: int64 [N], 0..len(classes) - 1.
        mean, std: per channel, of images scaled to 0..1; what `normalize` uses.
        classes: names of the classes.

    Raises ValueError where these do not fit together, TypeError for other types.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            if not isinstance(getattr(self, name), torch.Tensor):
                raise TypeError(
                    f"{self.name}: {name} must be a torch.Tensor, got {type(getattr(self, name)).__name__}"
                )
        classes: Any = self.classes
        if not isinstance(classes, (tuple, list)):
            raise TypeError(f"{self.name}: classes must be a tuple of names, got {classes!r}")
        for split in ("train", "test"):
            images, labels = self.split(split)
            if images.dim() != 4 or images.dtype != torch.uint8:
                raise ValueError(
                    f"{self.name}: {split} images must be uint8 [N, C, H, W], "
                    f"got {images.dtype} {list(images.shape)}"
                )
            if labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{self.name}: {split} has {images.shape[0]} images but {list(labels.shape)} labels"
                )
            if labels.dtype != torch.int64:
                raise ValueError(f"{self.name}: {split} labels must be int64, got {labels.dtype}")
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
                raise ValueError(
                    f"{self.name}: {split} labels must be in 0..{len(self.classes) - 1}, "
                    f"got {int(labels.min())}..{int(labels.max())}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: training images are {list(self.train_images.shape[1:])}, "
                f"test images {list(self.test_images.shape[1:])}"
            )
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"{self.name}: mean and std must have one entry for each of {self.channels} channels, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(0 <= entry <= 1 for entry in self.mean):
            raise ValueError(f"{self.name}: mean must be of pixels scaled to 0..1, got {self.mean}")
        if not all(0 < entry < math.inf for entry in self.std):
            raise ValueError(f"{self.name}: std must be positive and finite, got {self.std}")

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train_images.shape[2], self.train_images.shape[3]

    def split(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of "train" or "test"; ValueError for another name."""
        if name == "train":
            return self.train_images, self.train_labels
        if name == "test":
            return self.test_images, self.test_labels
        raise ValueError(f'{self.name}: split must be "train" or "test", got {name!r}')

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(images / 255 - mean) / std as float32, on the images' device and in their memory format.

        Arguments:
            images: uint8 [N, C, H, W].

        Raises TypeError for another dtype, since images already scaled would be scaled twice.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"{self.name}: normalize takes uint8 images, got {images.dtype}")
        columns = _column if images.device.type == "cpu" else _kept_column
        mean, std = (columns(tuple(values), images.device) for values in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)

    def with_normalization(self, mean: Sequence[float], std: Sequence[float]) -> Dataset:
        """The same images with another mean and std, such as those of pretrained weights."""
        return replace(self, mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def first(self, train: int | None = None, test: int | None = None) -> Dataset:
        """The first so many training and test images; None keeps all. ValueError for a number below 1."""
        for split, number in (("train", train), ("test", test)):
            if number is not None and number < 1:
                raise ValueError(f"{self.name}: {split} must keep at least 1 image, got {number}")
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def without_training(self) -> Dataset:
        """The test images alone."""
        return replace(self, train_images=self.train_images[:0], train_labels=self.train_labels[:0])

    def padded(self, size: int) -> Dataset:
        """The same images with black (0) borders, centred in size x size; ValueError if larger."""
        height, width = self.image_size
        if (height, width) == (size, size):
            return self
        if size < max(height, width):
            raise ValueError(f"{self.name}: images of {height}x{width} cannot be padded to {size}x{size}")
        top, left = (size - height) // 2, (size - width) // 2
        border = (left, size - width - left, top, size - height - top)
        return replace(
            self,
            train_images=F.pad(self.train_images, border),
            test_images=F.pad(self.test_images, border),
        )


def _column(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 [1, C, 1, 1]."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


# Sent to an accelerator once: it would be waited for with every batch.
_kept_column = lru_cache(maxsize=64)(_column)
