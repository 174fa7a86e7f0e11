"""Readers for the image sets of the experiments: digits, MNIST format, CIFAR-10 binary version."""

from .dataset import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD, Dataset
from .load import load, names

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Dataset",
    "load",
    "names",
]
