"""Second moments of what the layers of a network read, from calibration inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tensorcomp_ext.compress.calls import quiet
from tensorcomp_ext.plan.examples import call_model

LEAST_POSITIONS, POSITIONS_PER_INPUT = 8192, 2
_EXACT = 1200
"""Entries of a patch up to which products are in float64; beyond, float32 takes half as long or less."""
_IMAGES = 8
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output of a layer reads, as rows: [positions, S·K] of a convolution, [rows, in] of others.

    Rows are in the order of ``weight.flatten(1)``, so the outputs without the bias are
    ``patches @ weight.flatten(1).T``.
    """
    if not isinstance(layer, _ConvNd):
        return x.flatten(0, -2)
    weight: Any = layer.weight
    sizes = tuple(weight.shape[2:])
    if x.dim() == len(sizes) + 1:
        x = x.unsqueeze(0)
    taps = weight[0, 0].numel()
    # A depthwise convolution with one-hot windows gathers patches in any number of dimensions.
    windows = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *sizes)
    windows = windows.repeat(x.shape[1], *(1,) * (len(sizes) + 1))
    found = _CONVOLVE[len(sizes)](
        x.contiguous(), windows, None, layer.stride, layer.padding, layer.dilation, x.shape[1]
    )
    return found.flatten(2).transpose(1, 2).flatten(0, 1)


def moments(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], seed: int = 0
) -> dict[str, Tensor]:
    """P = Σ x xᵀ over the patches that each layer reads on the batches, [S·K, S·K] in float64.

    Of many positions a random part is taken, two for every entry of a patch and 8192 at least over all
    batches together. Evaluation mode, no autograd; layers that were not called are left out.

    Raises:
        ValueError: no batches, or a layer that reads NaN or Inf, named.
        TypeError: a batch that is no example input.
    """
    given = list(batches)
    if not given:
        raise ValueError("compress: calibration must hold at least one batch, got none")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}

    def collector(name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            size = layers[name].weight[0].numel()  # type: ignore[index]
            wanted = max(LEAST_POSITIONS, POSITIONS_PER_INPUT * size) // len(given) + 1
            total = _moment(layers[name], x.detach(), wanted, generator)
            if not torch.isfinite(total).all():
                raise ValueError(f"compress: calibration: layer {name!r} reads NaN or Inf")
            found[name] = found[name] + total if name in found else total

        return collect

    handles = [
        layer.register_forward_pre_hook(collector(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with quiet(model):
            for batch in given:
                call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _moment(layer: nn.Module, x: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    parts = x.split(_IMAGES) if isinstance(layer, _ConvNd) and x.dim() > 3 else (x,)
    each = -(-wanted // len(parts))
    total: Tensor | None = None
    for part in parts:
        rows = patches(layer, part)
        if len(rows) > each:
            rows = rows[torch.randperm(len(rows), generator=generator)[:each].to(rows.device)]
        rows = rows.double() if rows.shape[1] <= _EXACT else rows.float()
        square = (rows.T @ rows).double().cpu()
        total = square if total is None else total.add_(square)
    assert total is not None
    return total
