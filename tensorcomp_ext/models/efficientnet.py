"""EfficientNet-B0 for 224 x 224 images."""

from __future__ import annotations

import torch
from torch import nn

from .inverted_residual import ConvNorm, InvertedResidual, Style, initialize

# Expansion, kernel, stride of the first block, channels of the output, blocks.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STYLE = Style(1e-5, 0.1, nn.SiLU, nn.Sigmoid)
STEM, HEAD = 32, 1280


class EfficientNetB0(nn.Module):
    """Inverted residuals with squeeze and excitation throughout (Tan and Le 2019, table 1).

    A 3x3 convolution to 32 channels with stride 2, seven stages of sixteen blocks, a pointwise convolution to
    1,280 channels, mean over the pixels, one linear layer. 5,288,548 parameters for 1,000 classes. Parameters
    are named as in torchvision's efficientnet_b0, whose state dicts load.

    Arguments:
        num_classes: number of logits.
        in_channels: channels of the images.
        drop: how likely training leaves out the last block for an image; it grows from 0 with the depth.

    Input [N, in_channels, H, W] of any size, output [N, num_classes]. 386 M MACs an image at 3 x 224 x 224.
    Raises ValueError for a drop outside [0, 1).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, drop: float = 0.2) -> None:
        super().__init__()
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"EfficientNetB0: drop must be in [0, 1), got {drop}")
        layers: list[nn.Module] = [ConvNorm(in_channels, STEM, 3, STYLE, nn.SiLU, stride=2)]
        c_in, begun, total = STEM, 0, sum(stage[-1] for stage in STAGES)
        for expansion, kernel, stride, c_out, blocks in STAGES:
            stage: list[nn.Module] = []
            for block in range(blocks):
                stage.append(
                    InvertedResidual(
                        c_in,
                        expansion * c_in,
                        c_out,
                        kernel,
                        1 if block else stride,
                        STYLE,
                        nn.SiLU,
                        squeeze=c_in // 4,
                        drop=drop * begun / total,
                    )
                )
                c_in, begun = c_out, begun + 1
            layers.append(nn.Sequential(*stage))
        layers.append(ConvNorm(c_in, HEAD, 1, STYLE, nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(HEAD, num_classes))
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
