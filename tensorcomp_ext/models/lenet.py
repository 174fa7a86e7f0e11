"""LeNet-5 for 28 x 28 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LeNet5(nn.Module):
    """Two convolutions and two linear layers (LeCun et al. 1998, in the Caffe widths 20-50-320).

    5x5 convolution C -> 20 (padding 2), ReLU, 2x2 max pooling, 5x5 convolution 20 -> 50 (no padding), ReLU,
    pooling, linear 1250 -> 320, ReLU, linear 320 -> num_classes. 429,100 parameters for one channel, ten
    classes, 28 x 28.

    Arguments:
        num_classes: number of logits.
        in_channels: channels of the images.
        input_size: height and width of the images, at least 12; fixes the width of the first linear layer.

    Input [N, in_channels, input_size, input_size], output [N, num_classes]. 2.29 M MACs an image at 28 x 28.
    Raises ValueError when input_size is too small.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, *, input_size: int = 28) -> None:
        super().__init__()
        side = (input_size // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"LeNet5: input_size must be at least 12, got {input_size}")
        self.conv1 = nn.Conv2d(in_channels, 20, 5, padding=2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * side * side, 320)
        self.fc2 = nn.Linear(320, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))
