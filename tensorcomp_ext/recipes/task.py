"""What a network is trained for: where batches come from, what is minimised and what is counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorcomp_ext.data import Dataset
from tensorcomp_ext.plan.modes import evaluating

from .augment import crop_and_flip
from .checkpoint import checksum
from .evaluate import Accuracy, answers_of, check_classes, device_of, dtype_of, evaluate, sent
from .options import check_flag, check_known

_MIRRORED = ("cifar10", "cifar100")
"""Data sets whose images mean the same mirrored."""


class Batch(NamedTuple):
    """Some examples: what the network is called with, and what it should say."""

    inputs: tuple[Tensor, ...]
    labels: Tensor


class Task(ABC):
    """Examples by number, a loss and a count of right answers: all that the training loop asks for.

    Attributes:
        name: of the data, for messages and checkpoints.
    """

    name: str

    @property
    @abstractmethod
    def size(self) -> int:
        """Training examples."""

    @property
    def test_size(self) -> int | None:
        """Test examples; None where the task does not say."""
        return None

    def check(self, name: str, model: nn.Module) -> None:
        """Refuse a network that is not for this task, before any work; it is asked about a few examples.

        Args:
            name: of the caller, for messages.

        Raises:
            ValueError: the network cannot read the examples, or its answers are not of this task.
        """
        self.tried(name, model)

    def trial(self) -> Tensor:
        """Numbers of the examples about which a network is asked before any work."""
        return torch.zeros(1, dtype=torch.int64)

    def tried(self, name: str, model: nn.Module) -> tuple[Any, Tensor]:
        """What a network answers to those examples in evaluation, and their labels; see :meth:`check`."""
        batch = self.batch_for(model, self.trial(), torch.Generator().manual_seed(0))
        # Not in inference mode: whatever the network keeps of this call must be of use in training.
        with evaluating(model), torch.no_grad():
            return answers_of(name, model, batch.inputs, f"what {self.name} holds"), batch.labels

    @abstractmethod
    def batch(self, indices: Tensor, generator: torch.Generator, device: torch.device) -> Batch:
        """The training examples of these numbers on ``device``; what is random comes from ``generator``."""

    def batch_for(self, model: nn.Module, indices: Tensor, generator: torch.Generator) -> Batch:
        """The training examples of these numbers as a network reads them: on its device."""
        return self.batch(indices, generator, device_of(model))

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What is minimised, the mean over a batch.

        Parts of a batch, by ``accumulate`` or of several processes, weigh the same: where examples have
        different numbers of answers, as sentences have of tokens, that is not the mean over all answers.
        """

    @abstractmethod
    def count(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """How many answers of a batch are right, and how many there are: int64, without dimensions."""

    def asked(self, labels: Tensor) -> Tensor | None:
        """Which of a batch's answers are asked for, bool of the outputs' shape but the last; None for all."""
        return None

    @abstractmethod
    def evaluate(self, model: nn.Module) -> tuple[Accuracy, dict[str, float]]:
        """Right answers on the test examples, and further figures of them by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the result of a run, in JSON types."""


class ImageTask(Task):
    """Images to classes: mean cross-entropy.

    Images are read in the network's dtype. For a network on CUDA the training images stay on its device from
    the first batch on, where they take less than a quarter of its free memory.

    Args:
        dataset: training images are learned from, test images evaluated.
        augment: shift by up to 4 pixels and mirror; None does so for CIFAR only, as digits must not be
            mirrored.
        label_smoothing: weight of the uniform distribution in the targets, 0..1.
        channels_last: memory format of the images.

    Raises:
        ValueError, TypeError: a label_smoothing outside [0, 1], options of other types.
    """

    _held: tuple[Dataset, torch.device, Tensor, Tensor] | None = None

    def __init__(
        self,
        dataset: Dataset,
        *,
        augment: bool | None = None,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        check_known("ImageTask", "label_smoothing", label_smoothing)
        check_flag("ImageTask", "channels_last", channels_last)
        if augment is not None:
            check_flag("ImageTask", "augment", augment)
        self.name = dataset.name
        self.dataset = dataset
        self.augment = dataset.name in _MIRRORED if augment is None else augment
        self.label_smoothing = label_smoothing
        self.channels_last = channels_last

    @property
    def size(self) -> int:
        return len(self.dataset.train_labels)

    @property
    def test_size(self) -> int:
        return len(self.dataset.test_labels)

    def check(self, name: str, model: nn.Module) -> None:
        answers, _ = self.tried(name, model)
        if type(self).loss is ImageTask.loss:  # another loss may ask for other answers
            check_classes(name, answers, self.dataset.train_labels, self.name)

    def batch(self, indices: Tensor, generator: torch.Generator, device: torch.device) -> Batch:
        images, labels = self._training(device)
        indices = sent(indices, images.device)
        images = images[indices]
        if self.augment:
            images = crop_and_flip(images, generator)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        normalized = self.dataset.normalize(sent(images, device, layout))
        return Batch((normalized,), sent(labels[indices], device))

    def batch_for(self, model: nn.Module, indices: Tensor, generator: torch.Generator) -> Batch:
        inputs, labels = super().batch_for(model, indices, generator)
        dtype = dtype_of(model)
        return Batch(tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs), labels)

    def _training(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Training images and labels, on a CUDA device where they fit."""
        images, labels = self.dataset.train_images, self.dataset.train_labels
        if device.type != "cuda":
            return images, labels
        if self._held is None or self._held[0] is not self.dataset or self._held[1] != device:
            if 4 * images.nbytes < torch.cuda.mem_get_info(device)[0]:
                images, labels = images.to(device), labels.to(device)
            self._held = self.dataset, device, images, labels
        return self._held[2:]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing)

    def count(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        correct = (outputs.detach().argmax(1) == labels).sum()
        return correct, labels.new_full((), len(labels))

    def evaluate(self, model: nn.Module) -> tuple[Accuracy, dict[str, float]]:
        return evaluate(model, self.dataset, channels_last=self.channels_last), {}

    def settings(self) -> dict[str, Any]:
        return {
            "dataset": self.name,
            "images": self.size,
            "augment": self.augment,
            "label_smoothing": self.label_smoothing,
            "channels_last": self.channels_last,
            "mean": list(map(float, self.dataset.mean)),
            "std": list(map(float, self.dataset.std)),
            "fingerprint": checksum(self.dataset.train_images, self.dataset.train_labels),
        }


def as_task(
    name: str,
    data: Any,
    *,
    augment: bool | None = None,
    label_smoothing: float = 0.0,
    channels_last: bool = False,
) -> Task:
    """A task as it is; a ``Dataset`` as the task of classifying its images.

    Args:
        name: of the caller, for messages.
        augment, label_smoothing, channels_last: of :class:`ImageTask`.

    Raises:
        ValueError: options of images given beside a task, which has its own.
        TypeError: another object.
    """
    if isinstance(data, Task):
        given = {"augment": augment, "label_smoothing": label_smoothing, "channels_last": channels_last}
        for option, value in given.items():
            if value:
                raise ValueError(
                    f"{name}: {option} is for a Dataset of images; a Task has options of its own"
                )
        return data
    if isinstance(data, Dataset):
        return ImageTask(data, augment=augment, label_smoothing=label_smoothing, channels_last=channels_last)
    raise TypeError(
        f"{name}: dataset must be a tensorcomp_ext.data.Dataset, as tensorcomp_ext.data.load gives it, or a "
        f"recipes.Task, got {type(data).__name__}"
    )
