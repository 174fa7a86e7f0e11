"""What MobileNetV3 and EfficientNet are built of: inverted residuals with squeeze and excitation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Activation = Callable[[], nn.Module]


@dataclass(frozen=True)
class Style:
    """In what the networks differ, the same in every block of one.

    Attributes:
        eps, momentum: of batch normalisation.
        squeezed: activation between the two layers of squeeze and excitation; ``gate`` is the one behind.
    """

    eps: float
    momentum: float
    squeezed: Activation
    gate: Activation


class ConvNorm(nn.Sequential):
    """Convolution without a bias, batch normalisation, activation (None: none); stride 1 keeps the size."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        style: Style,
        activation: Activation | None,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(c_out, eps=style.eps, momentum=style.momentum),
        ]
        super().__init__(*layers, *([] if activation is None else [activation()]))


class SqueezeExcitation(nn.Module):
    """``x * gate(fc2(squeezed(fc1(mean of x over the pixels))))`` (Hu et al. 2018)."""

    def __init__(self, channels: int, width: int, style: Style) -> None:
        super().__init__()
        self.fc1, self.squeezed = nn.Conv2d(channels, width, 1), style.squeezed()
        self.fc2, self.gate = nn.Conv2d(width, channels, 1), style.gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)  # [N, C, 1, 1]
        return x * self.gate(self.fc2(self.squeezed(self.fc1(mean))))


class InvertedResidual(nn.Module):
    """Pointwise convolution to more channels, depthwise one, squeeze and excitation, pointwise to fewer.

    The first is absent where ``expanded == c_in``. The input is added where the shape stays.

    Arguments:
        c_in, expanded, c_out: channels of the input, within and of the output.
        squeeze: width of squeeze and excitation; 0 for none.
        drop: how likely training leaves the block out for an image (stochastic depth, Huang et al. 2016).
    """

    def __init__(
        self,
        c_in: int,
        expanded: int,
        c_out: int,
        kernel: int,
        stride: int,
        style: Style,
        activation: Activation,
        *,
        squeeze: int = 0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.residual, self.drop = stride == 1 and c_in == c_out, drop
        layers: list[nn.Module] = []
        if expanded != c_in:
            layers.append(ConvNorm(c_in, expanded, 1, style, activation))
        layers.append(ConvNorm(expanded, expanded, kernel, style, activation, stride=stride, groups=expanded))
        if squeeze:
            layers.append(SqueezeExcitation(expanded, squeeze, style))
        layers.append(ConvNorm(expanded, c_out, 1, style, None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        if not self.residual:
            return y
        if self.training and self.drop > 0:
            kept = torch.rand(y.shape[0], 1, 1, 1, device=y.device) >= self.drop
            # Divided, so that the mean is what evaluation adds.
            y = y * (kept / (1.0 - self.drop)).to(y.dtype)
        return x + y


def rounded_width(width: float) -> int:
    """The multiple of 8 nearest to ``width``, at least 8 and not under nine tenths of it."""
    found = max(8, int(width + 4) // 8 * 8)
    return found + 8 if found < 0.9 * width else found


def initialize(model: nn.Module) -> None:
    """Fresh convolutions that keep the variance of what goes back, without offsets."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
