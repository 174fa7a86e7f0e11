"""A perceptron of two linear layers for 28 x 28 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """``fc2(relu(fc1(x)))`` on the pixels of an image: 784 -> 625 -> 10 (Kodryan et al. 2023).

    496,885 parameters for one channel, ten classes, 28 x 28. The widths are products, 784 = 7·4·7·4 and
    625 = 5·5·5·5, for layers in tensor-train matrices.

    Arguments:
        num_classes: number of logits.
        in_channels: channels of the images.
        input_size: height and width of the images.
        hidden: width of the layer between.

    Input [N, in_channels, input_size, input_size], output [N, num_classes]. 0.50 M MACs an image at 28 x 28.
    Raises ValueError for an input_size or hidden below 1.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, *, input_size: int = 28, hidden: int = 625
    ) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"MLP: {name} must be at least 1, got {value}")
        self.fc1 = nn.Linear(in_channels * input_size * input_size, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x.flatten(1))))
