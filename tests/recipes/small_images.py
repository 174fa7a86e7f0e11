"""A set small enough to train in a second: four kinds of bright quadrant."""

import torch

from tensorcomp_ext.data import Dataset


def quadrants(train=160, test=80, channels=1, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(train + test) % 4
    images = torch.randint(0, 120, (train + test, channels, size, size), generator=generator)
    half = size // 2
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        images[i, :, row * half : (row + 1) * half, column * half : (column + 1) * half] += 60
    images = images.to(torch.uint8)
    return Dataset(
        name="quadrants",
        train_images=images[:train],
        train_labels=labels[:train],
        test_images=images[train:],
        test_labels=labels[train:],
        mean=(0.3,) * channels,
        std=(0.2,) * channels,
        classes=("a", "b", "c", "d"),
    )
