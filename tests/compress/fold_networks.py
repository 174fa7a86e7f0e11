"""Networks that folding is tried on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tensorcomp_ext.nn import FactorizedConv2d, FoldedLayer


def randomize(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters of batch normalizations as training would leave them."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(generator=generator)
    return model.eval()


def conv(c_in: int, c_out: int, *, stride: int = 1, bias: bool = True) -> FactorizedConv2d:
    return FactorizedConv2d(c_in, c_out, 3, stride, 1, bias=bias, rank=(3, 2))


class Block(nn.Module):
    """A residual block whose addition is spelled in one of several ways."""

    def __init__(self, add: str = "plain", shortcut: bool = False) -> None:
        super().__init__()
        self.add = add
        self.conv1, self.bn1 = conv(4, 4, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4)) if shortcut else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        other = self.shortcut(x)
        if self.add == "plain":
            return F.relu(y + other)
        if self.add == "in place":
            y += other
            return self.relu(y)
        if self.add == "method":
            return other.add(y).relu()
        if self.add == "function":
            return torch.relu(torch.add(other, y))
        if self.add == "scaled":
            return F.relu(torch.add(other, y, alpha=0.5))
        if self.add == "into the other":
            return F.relu(other.clone().add_(y))
        if self.add == "broadcast":
            return F.relu(y + other.mean((2, 3), keepdim=True))
        return y + 1.0


def folded_layers(model: nn.Module) -> list[FoldedLayer]:
    return [m for m in model.modules() if isinstance(m, FoldedLayer)]
