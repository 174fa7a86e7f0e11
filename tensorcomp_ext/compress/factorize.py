"""Decide what one layer becomes, and decompose it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tensorcomp_ext.compress.calls import Call
from tensorcomp_ext.compress.report import LayerReport
from tensorcomp_ext.compress.selection import by_name, weight_numel
from tensorcomp_ext.formats import get_format
from tensorcomp_ext.nn import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedLayer,
    FactorizedLinear,
)
from tensorcomp_ext.ranks import resolve_rank

_CONVOLUTIONS: dict[type, Any] = {
    nn.Conv1d: FactorizedConv1d,
    nn.Conv2d: FactorizedConv2d,
    nn.Conv3d: FactorizedConv3d,
}


@dataclass
class Choice:
    """A layer that will be replaced, by what."""

    name: str
    layer: Any  # a torch.nn layer; mypy takes the attributes of a Module for tensors
    format: str
    rank: int | tuple[int, ...]
    explicit: bool


def not_called(name: str, calls: Mapping[str, list[Call]] | None) -> str | None:
    if calls is None or calls[name]:
        return None
    return "not called on the example inputs (in evaluation mode); an enclosing module may read its weight"


def skipped_entry(name: str, layer: nn.Module, reason: str, **fields: Any) -> LayerReport:
    count = weight_numel(layer)
    return LayerReport(name, type(layer).__name__, count, count, skipped=reason, **fields)


def choose(name: str, layer: Any, format: Any, rank: Any, calls: Sequence[Call]) -> Choice | str:
    """What a layer becomes, or why it stays."""
    convolution = isinstance(layer, _ConvNd)
    chosen = by_name(format, name, layer) if isinstance(format, Mapping) else format
    chosen = chosen or ("tucker2" if convolution else "svd")
    if ("conv" if convolution else "linear") not in get_format(chosen).layers:
        return f"format {chosen!r} is not for {type(layer).__name__}"
    spec = by_name(rank, name, layer) if isinstance(rank, Mapping) else rank
    if spec is None:
        return "no rank pattern fits"
    weight = layer.weight.detach()
    if not torch.isfinite(weight).all():
        raise ValueError(f"compress: the weight of layer {name!r} has NaN or Inf; nothing was replaced")
    try:
        resolved = resolve_rank(spec, weight, chosen, name=name, pixels=_pixels(layer, calls))
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
        raise _named(error, name) from error
    return Choice(name, layer, chosen, resolved, isinstance(spec, (int, tuple, list)))


def _pixels(layer: nn.Module, calls: Sequence[Call]) -> tuple[int, int]:
    """Positions a layer reads and writes for one sample, for rules that count operations."""
    if not calls:
        return 1, 1
    inner = slice(2, None) if isinstance(layer, _ConvNd) else slice(1, -1)
    return math.prod(calls[0].shape[inner]), math.prod(calls[0].output_shape[inner])


def _named(error: Exception, name: str) -> Exception:
    """The same error, saying which layer it is about."""
    kind = TypeError if isinstance(error, TypeError) else ValueError
    text = str(error).removeprefix(f"{name}: ")
    return error if repr(name) in text else kind(f"compress: layer {name!r}: {text}")


def factorize(choice: Choice) -> tuple[LayerReport, nn.Module | None]:
    """Decompose one layer, unless it would not get smaller."""
    layer = choice.layer
    dense = layer.weight.numel()
    ranks = (choice.rank,) if isinstance(choice.rank, int) else tuple(choice.rank)
    shapes = get_format(choice.format).factor_shapes(tuple(layer.weight.shape), choice.rank)
    stored = sum(math.prod(shape) for shape in shapes)
    remark = (
        f"{stored:,} parameters in {choice.format} at rank {'×'.join(map(str, ranks))}, dense has {dense:,}"
    )
    if stored >= dense and not choice.explicit:
        pointwise = isinstance(layer, _ConvNd) and all(size == 1 for size in layer.kernel_size)
        return skipped_entry(
            choice.name, layer, f"{'pointwise: ' if pointwise else ''}would not get smaller: {remark}"
        ), None
    try:
        if isinstance(layer, nn.Linear):
            new: FactorizedLayer = FactorizedLinear.from_linear(layer, format=choice.format, rank=choice.rank)
        else:
            new = _CONVOLUTIONS[type(layer)].from_conv(layer, format=choice.format, rank=choice.rank)
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
        raise _named(error, choice.name) from error
    with torch.no_grad():
        dense_again = new.weight.to_dense()
    entry = LayerReport(
        choice.name,
        type(layer).__name__,
        dense,
        weight_numel(new),
        format=choice.format,
        rank=ranks,
        relative_error=relative_error(layer.weight, dense_again),
        note=f"not smaller, as asked: {remark}" if stored >= dense else None,
    )
    return entry, new


def relative_error(dense: torch.Tensor, approximation: torch.Tensor) -> float:
    """``‖W − Ŵ‖ / ‖W‖`` in float64; 0.0 where both are zero."""
    exact = dense.detach().double()
    difference = float((approximation.detach().double() - exact).norm())
    norm = float(exact.norm())
    return difference / norm if norm > 0 else (0.0 if difference == 0 else float("inf"))
