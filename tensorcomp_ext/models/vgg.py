"""VGG-16 for 32 x 32 images."""

from __future__ import annotations

import torch
from torch import nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions with batch normalisation, one linear layer (Simonyan & Zisserman 2015).

    Five stages of 64, 128, 256, 512, 512 channels, each ended by 2x2 max pooling; the single remaining pixel
    of a 32 x 32 image feeds a 512 -> num_classes linear layer. Convolutions have biases, as in torchvision's
    vgg16_bn; 14,728,266 parameters for ten classes.

    Arguments:
        num_classes: number of logits.
        in_channels: channels of the images.

    Input [N, in_channels, 32, 32] (pad smaller images to 32), output [N, num_classes]. 313 M MACs an image.
    Raises ValueError from forward for another image size.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = in_channels
        for width, convolutions in STAGES:
            for _ in range(convolutions):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                c_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.shape[-2] != 32 or x.shape[-1] != 32:
            raise ValueError(f"VGG16: input must be [N, C, 32, 32], got {list(x.shape)}")
        return self.classifier(self.features(x).flatten(1))
