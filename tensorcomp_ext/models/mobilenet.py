"""MobileNetV3 for 224 x 224 images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from .inverted_residual import ConvNorm, InvertedResidual, Style, initialize, rounded_width

# Kernel, channels within, channels of the output, squeeze and excitation, hard swish (else ReLU), stride.
BLOCKS: dict[str, tuple[tuple[int, int, int, bool, bool, int], ...]] = {
    "small": (
        (3, 16, 16, True, False, 2),
        (3, 72, 24, False, False, 2),
        (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2),
        (5, 240, 40, True, True, 1),
        (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1),
        (5, 144, 48, True, True, 1),
        (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1),
        (5, 576, 96, True, True, 1),
    ),
    "large": (
        (3, 16, 16, False, False, 1),
        (3, 64, 24, False, False, 2),
        (3, 72, 24, False, False, 1),
        (5, 72, 40, True, False, 2),
        (5, 120, 40, True, False, 1),
        (5, 120, 40, True, False, 1),
        (3, 240, 80, False, True, 2),
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2),
        (5, 960, 160, True, True, 1),
        (5, 960, 160, True, True, 1),
    ),
}
HIDDEN = {"small": 1024, "large": 1280}
STYLE = Style(1e-3, 0.01, nn.ReLU, nn.Hardsigmoid)
STEM = 16


class MobileNetV3(nn.Module):
    """Inverted residuals found by search (Howard et al. 2019, tables 1 and 2).

    A 3x3 convolution to 16 channels with stride 2, eleven ("small") or fifteen ("large") blocks, a pointwise
    convolution to six times the channels, mean over the pixels, two linear layers. 2,542,856 and 5,483,032
    parameters for 1,000 classes. Parameters are named as in torchvision's mobilenet_v3_small and
    mobilenet_v3_large, whose state dicts load.

    Arguments:
        size: "small" or "large".
        num_classes: number of logits.
        in_channels: channels of the images.

    Input [N, in_channels, H, W] of any size, output [N, num_classes]. 56 M and 217 M MACs an image at
    3 x 224 x 224. Raises ValueError for another size.
    """

    def __init__(
        self, size: Literal["small", "large"] = "small", num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        if size not in BLOCKS:
            raise ValueError(f'MobileNetV3: size must be "small" or "large", got {size!r}')
        layers: list[nn.Module] = [ConvNorm(in_channels, STEM, 3, STYLE, nn.Hardswish, stride=2)]
        c_in = STEM
        for kernel, expanded, c_out, squeezes, hard, stride in BLOCKS[size]:
            squeeze = rounded_width(expanded // 4) if squeezes else 0
            activation = nn.Hardswish if hard else nn.ReLU
            layers.append(
                InvertedResidual(c_in, expanded, c_out, kernel, stride, STYLE, activation, squeeze=squeeze)
            )
            c_in = c_out
        layers.append(ConvNorm(c_in, 6 * c_in, 1, STYLE, nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(6 * c_in, HIDDEN[size]),
            nn.Hardswish(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN[size], num_classes),
        )
        initialize(self)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
