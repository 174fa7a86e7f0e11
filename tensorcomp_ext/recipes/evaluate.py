"""Counting correct answers, and how tensors get to where a network is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from tensorcomp_ext.data import Dataset
from tensorcomp_ext.plan.modes import evaluating


class Accuracy(NamedTuple):
    """How many of how many images were classified correctly."""

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """Correct / total, 0..1."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{100 * self.fraction:.2f} % ({self.correct:,} of {self.total:,})"


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; CPU for a model without any."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a model reads images in: the dtype of its first floating parameter; float32 without any."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def sent(
    tensor: torch.Tensor, device: torch.device, layout: torch.memory_format = torch.preserve_format
) -> torch.Tensor:
    """A tensor on a device, in a memory format; the host does not wait for a copy to CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Memory that is not pinned would be waited for; in another format it would be copied on the host.
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, memory_format=layout)


def answers_of(name: str, model: nn.Module, inputs: tuple[torch.Tensor, ...], what: str) -> Any:
    """What a network answers to a batch.

    Args:
        name: of the caller, for messages; ``what`` the batch is of.

    Raises:
        ValueError: the network fails.
    """
    try:
        return model(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = ", ".join(str(list(x.shape[1:])) for x in inputs)
        raise ValueError(f"{name}: the network cannot read {what}, {shapes} each: {error}") from error


def check_classes(name: str, answers: Any, labels: torch.Tensor, what: str) -> None:
    """ValueError unless answers have a last dimension more than labels, of all the classes these name."""
    classes, dims = int(labels.max()) + 1, labels.dim() + 1
    if isinstance(answers, torch.Tensor) and answers.dim() == dims and answers.shape[-1] >= classes:
        return
    form = "[N, classes]" if dims == 2 else "[N, tokens, classes]"
    given = list(answers.shape) if isinstance(answers, torch.Tensor) else type(answers).__name__
    raise ValueError(
        f"{name}: the network must answer {form} with the {classes} classes or more that {what} has, "
        f"got {given}"
    )


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: str = "test",
    *,
    batch_size: int = 256,
    channels_last: bool = False,
) -> Accuracy:
    """Top-1 accuracy: how often argmax_k model(x)_k equals the label.

    Arguments:
        model: maps normalised images [N, C, H, W] to logits [N, classes]; evaluated on its device and in its
            dtype, in evaluation mode and inference mode, its training modes restored afterwards.
        dataset: normalised with its mean and std.
        split: "test" or "train".
        batch_size: images at a time.
        channels_last: memory format of the images; the faster one on CPUs where the model has it too.

    Raises ValueError for another split, an empty one, a batch_size below 1, or a network that cannot read the
    images or knows fewer classes than they have.
    """
    images, labels = dataset.split(split)
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    if not len(labels):
        raise ValueError(f"evaluate: {dataset.name} has no {split} images")
    device, dtype = device_of(model), dtype_of(model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(labels), batch_size):
            batch = sent(images[start : start + batch_size], device, layout)
            read = dataset.normalize(batch).to(dtype)
            if start == 0:
                answers = answers_of("evaluate", model, (read,), f"the images of {dataset.name}")
                check_classes("evaluate", answers, labels, dataset.name)
            else:
                answers = model(read)
            correct += (answers.argmax(1) == sent(labels[start : start + batch_size], device)).sum()
    return Accuracy(int(correct), len(labels))
