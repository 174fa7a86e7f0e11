"""How each network of the suite is compressed: which layers, in which format, at which ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

FRACTION = "fraction"
"""The scheme of every network with convolutions: Tucker-2, a share of each layer's parameters."""


class Target(NamedTuple):
    """What a layer becomes."""

    format: str
    rank: Any
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)


Scheme = Callable[[str, nn.Module], Target | None]
"""From a layer's name and the layer to what it becomes, None where it stays dense."""

BLOCK, MLP = "vit_block", "mlp"

# Method sheet, NRMF at 95 %: S-rank and T-rank of the last 3x3 convolutions of ResNet-18.
_NRMF = {
    "layer3.1.conv2": (144, 141),
    "layer4.0.conv1": (222, 299),
    "layer4.0.conv2": (292, 212),
    "layer4.1.conv1": (160, 69),
    "layer4.1.conv2": (31, 39),
}
_RING_MODES = {3: (3,), 16: (4, 2, 2), 32: (4, 4, 2), 64: (4, 4, 4)}
_LENET_MODES = {
    "conv1": ((1,), (4, 5)),
    "conv2": ((4, 5), (5, 10)),
    "fc1": ((5, 5, 5, 10), (5, 8, 8)),
    "fc2": ((5, 8, 8), (10,)),
}
_TRAIN_MODES = {384: (8, 8, 6), 1152: (12, 12, 8), 1536: (12, 16, 8)}
_TRAIN_RANK = 32
_BLOCK_SVD_RANK = 96


def spatial(layer: nn.Module) -> nn.Conv2d | None:
    """The layer, if it is a convolution beyond 1x1."""
    return layer if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 else None


def fraction(rank: float) -> Scheme:
    """Tucker-2 for the convolutions beyond the first: where it has something to save."""

    def choose(name: str, layer: nn.Module) -> Target | None:
        conv = spatial(layer)
        small = conv is None or min(conv.in_channels, conv.out_channels) < 6
        return None if small else Target("tucker2", rank)

    return choose


def half_width(name: str, layer: nn.Module) -> Target | None:
    """Tucker-2 with half of the channels as rank on either side; the stem stays dense."""
    conv = spatial(layer)
    if conv is None or conv.in_channels < 6:
        return None
    return Target("tucker2", (conv.out_channels // 2, conv.in_channels // 2))


def nrmf(name: str, layer: nn.Module) -> Target | None:
    """The NRMF ranks of the method sheet in the five layers it lists, half width in the other 3x3 ones."""
    if name in _NRMF:
        rank_in, rank_out = _NRMF[name]
        return Target("tucker2", (rank_out, rank_in))
    return half_width(name, layer)


def ring(rank: int) -> Scheme:
    """Tensor rings in all 3x3 convolutions of a CIFAR ResNet; 1x1 and linear layers stay dense."""

    def choose(name: str, layer: nn.Module) -> Target | None:
        conv = spatial(layer)
        if conv is None:
            return None
        modes = {"in_modes": _RING_MODES[conv.in_channels], "out_modes": _RING_MODES[conv.out_channels]}
        return Target("tr", rank, modes)

    return choose


def lenet_ring(rank: int) -> Scheme:
    """Tensor rings in all four layers of LeNet-5, folded as in the method sheet."""

    def choose(name: str, layer: nn.Module) -> Target | None:
        if name not in _LENET_MODES:
            return None
        ins, outs = _LENET_MODES[name]
        return Target("tr", rank, {"in_modes": ins, "out_modes": outs})

    return choose


def train(name: str, layer: nn.Module) -> Target | None:
    """Tensor trains in the linear layers of a DeiT-S block."""
    if not isinstance(layer, nn.Linear):
        return None
    modes = {"in_modes": _TRAIN_MODES[layer.in_features], "out_modes": _TRAIN_MODES[layer.out_features]}
    return Target("tt", _TRAIN_RANK, modes)


def svd(rank: int) -> Scheme:
    """Two factors in all linear layers."""

    def choose(name: str, layer: nn.Module) -> Target | None:
        return Target("svd", rank) if isinstance(layer, nn.Linear) else None

    return choose


_SCHEMES: dict[str, dict[str, Scheme]] = {
    "resnet18": {"nrmf": nrmf, "tucker2": half_width},
    **{
        f"resnet{depth}": {"tr10": ring(10), "tr15": ring(15), "tucker2": half_width}
        for depth in (20, 32, 44, 56, 110)
    },
    "vgg16": {"tucker2": half_width},
    "lenet5": {"tr10": lenet_ring(10), "tr15": lenet_ring(15)},
    BLOCK: {"tt": train, "svd": svd(_BLOCK_SVD_RANK)},
    MLP: {f"svd{rank}": svd(rank) for rank in (128, 256, 512)},
}
NETWORKS = tuple(_SCHEMES)


def schemes(network: str) -> tuple[str, ...]:
    """The names of a network's schemes, the default one first."""
    own = tuple(_SCHEMES[network])
    return own if network in (BLOCK, MLP) else (FRACTION, *own)


def get_scheme(network: str, name: str, rank: float) -> Scheme:
    """The scheme of that name; ``rank`` is for "fraction"."""
    return fraction(rank) if name == FRACTION else _SCHEMES[network][name]
