"""Residual networks for 32 x 32 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

OPTIONS = ("A", "B")


class PaddedShortcut(nn.Module):
    """Shortcut without parameters (option A): every stride-th pixel, zeros around the old channels."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x))."""

    def __init__(self, c_in: int, c_out: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or c_in != c_out:
            if option == "A":
                self.shortcut = PaddedShortcut(c_out - c_in, stride)
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network of 6n + 2 layers for small images (He et al. 2016, section 4.2).

    A 3x3 convolution to 16 channels, three stages of n blocks with 16, 32 and 64 channels, the later two
    starting with stride 2, mean over the pixels, one linear layer.

    Arguments:
        depth: 6n + 2: 20, 32, 44, 56, 110, ...
        num_classes: number of logits.
        in_channels: channels of the images.
        option: shortcuts where the shape changes: "A" pads with zeros and has no parameters, "B" is a 1x1
            convolution with batch normalisation (2,752 parameters more).

    Input [N, in_channels, H, W] of any size from 4 x 4, output [N, num_classes]. ResNet-20: 40.8 M MACs an
    image at 3 x 32 x 32. Parameter names are conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2,shortcut},
    linear.
    Raises ValueError for a depth that is not 6n + 2 or an unknown option.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, *, option: str = "A") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth must be 6n + 2 with n >= 1, got {depth}")
        if option not in OPTIONS:
            raise ValueError(f'CifarResNet: option must be "A" or "B", got {option!r}')
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks, option)
        self.layer2 = self._stage(16, 32, 2, blocks, option)
        self.layer3 = self._stage(32, 64, 2, blocks, option)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(c_in: int, c_out: int, stride: int, blocks: int, option: str) -> nn.Sequential:
        first = BasicBlock(c_in, c_out, stride, option)
        return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1, option) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
