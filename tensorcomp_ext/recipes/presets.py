"""How published networks were folded: formats and modes layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from tensorcomp_ext.nn import FactorizedLayer

Layout = tuple[dict[str, tuple[str, dict[str, Any]]], list[str]]
"""Formats and options by layer, and the names of these layers; the others stay dense."""
Modes = tuple[int, ...]


def layout(name: str, model: nn.Module) -> Layout:
    """A published layout for a network.

    Args:
        name: "lenet5-tr", tensor rings in all layers of LeNet-5, the first linear layer reading images row by
            row; "resnet-tr", tensor rings in the 3x3 convolutions of ResNets for small images; "mlp-ttm",
            TT-matrices in a network 784-625-10; "sst-ttm" and "iwslt-tr", a TT-matrix and a TR-matrix in
            embeddings of up to 18,000 x 256 and of up to 32,768 x 512.

    Raises:
        ValueError: another name, or a network that the layout is not for, naming the layer.

    Source: the supplement to "Learning Low-Rank Tensor Cores with Probabilistic l0-Regularized Rank
    Selection"; Kodryan et al. 2023 (784-625-10).
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    formats = dict(PRESETS[name](name, model))
    return formats, list(formats)


def _tr(in_modes: Modes, out_modes: Modes, order: Modes | None = None) -> tuple[str, dict[str, Any]]:
    ordered = {} if order is None else {"input_order": order}
    return "tr", {"in_modes": in_modes, "out_modes": out_modes, **ordered}


_LENET: Mapping[str, tuple[type, tuple[int, ...], tuple[str, dict[str, Any]]]] = {
    "conv1": (nn.Conv2d, (20, 1, 5, 5), _tr((1,), (4, 5))),
    "conv2": (nn.Conv2d, (50, 20, 5, 5), _tr((4, 5), (5, 10))),
    # Modes of height, width and channels, of which torch flattens the channels first.
    "fc1": (nn.Linear, (320, 1250), _tr((5, 5, 5, 10), (5, 8, 8), (2, 3, 0, 1))),
    "fc2": (nn.Linear, (10, 320), _tr((5, 8, 8), (10,))),
}
_CHANNELS: Mapping[int, Modes] = {3: (3,), 16: (4, 2, 2), 32: (4, 4, 2), 64: (4, 4, 4)}
_MLP: Mapping[tuple[int, ...], tuple[Modes, Modes]] = {
    (625, 784): ((7, 4, 7, 4), (5, 5, 5, 5)),
    (10, 625): ((25, 25), (5, 2)),
}
Found = Iterator[tuple[str, tuple[str, dict[str, Any]]]]


def _lenet(preset: str, model: nn.Module) -> Found:
    layers = dict(model.named_modules())
    for name, (kind, shape, format) in _LENET.items():
        layer = layers.get(name)
        weight: Any = getattr(layer, "weight", None)
        if type(layer) is not kind or tuple(weight.shape) != shape:
            given = "none of that name" if layer is None else _described(layer)
            raise ValueError(
                f"preset {preset!r}: layer {name!r} must have a weight {list(shape)}, got {given}"
            )
        yield name, format


def _resnet(preset: str, model: nn.Module) -> Found:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    if not found:
        raise ValueError(f"preset {preset!r}: the network must have 3x3 convolutions, got none")
    for name, conv in found:
        if conv.groups != 1 or not {conv.in_channels, conv.out_channels} <= set(_CHANNELS):
            raise ValueError(
                f"preset {preset!r}: layer {name!r} must have channels among {sorted(_CHANNELS)} and one "
                f"group, got {_described(conv)}"
            )
        yield name, _tr(_CHANNELS[conv.in_channels], _CHANNELS[conv.out_channels])


def _mlp(preset: str, model: nn.Module) -> Found:
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    shapes = [tuple(layer.weight.shape) for _, layer in found]
    if shapes != list(_MLP):
        raise ValueError(
            f"preset {preset!r}: linear layers must be {[*map(list, _MLP)]}, got {[*map(list, shapes)]}"
        )
    for (name, _), (in_modes, out_modes) in zip(found, _MLP.values(), strict=True):
        yield name, ("ttm", {"in_modes": in_modes, "out_modes": out_modes})


def _embedding(format: str, out_modes: Modes, in_modes: Modes) -> Callable[[str, nn.Module], Found]:
    rows, columns = 1, 1
    for out_mode, in_mode in zip(out_modes, in_modes, strict=True):
        rows, columns = rows * out_mode, columns * in_mode

    def find(preset: str, model: nn.Module) -> Found:
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
        if not found:
            raise ValueError(f"preset {preset!r}: the network must have embeddings, got none")
        for name, table in found:
            if table.num_embeddings > rows or table.embedding_dim != columns:
                raise ValueError(
                    f"preset {preset!r}: layer {name!r} must be at most {rows} x {columns}, "
                    f"got {_described(table)}"
                )
            yield name, (format, {"in_modes": in_modes, "out_modes": out_modes})

    return find


def _described(layer: Any) -> str:
    if isinstance(layer, FactorizedLayer):
        return f"{type(layer).__name__}, which is compressed already"
    weight = getattr(layer, "weight", None)
    shape = "" if weight is None else f" {list(weight.shape)}"
    return f"{type(layer).__name__}{shape}"


PRESETS: dict[str, Callable[[str, nn.Module], Found]] = {
    "lenet5-tr": _lenet,
    "resnet-tr": _resnet,
    "mlp-ttm": _mlp,
    "sst-ttm": _embedding("ttm", (10, 10, 12, 15), (4, 4, 4, 4)),
    "iwslt-tr": _embedding("tr_matrix", (32, 32, 32), (8, 8, 8)),
}
