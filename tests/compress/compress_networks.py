"""Small networks the tests of surgery and storage share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Two convolutions, a normalisation with buffers, and a linear head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), nn.ReLU())
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.norm(self.stem(x)))
        return self.head(x.mean((2, 3)))


def low_rank_conv(conv: nn.Conv2d, rank: int, seed: int = 0) -> None:
    """Give a convolution a kernel of exact Tucker-2 rank (rank, rank)."""
    generator = torch.Generator().manual_seed(seed)
    t, s, *kernel = conv.weight.shape
    out = torch.randn(t, rank, generator=generator)
    core = torch.randn(rank, rank, *kernel, generator=generator)
    into = torch.randn(s, rank, generator=generator)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("ta,abyx,sb->tsyx", out, core, into) / rank)


def small_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet().to(dtype)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are equal, bit by bit."""
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype and a.shape == second[name].shape and torch.equal(a, second[name])
        for name, a in first.items()
    )
