"""Decide what one layer becomes, and decompose it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tensorcomp_ext.compress.calls import Call
from tensorcomp_ext.compress.report import LayerReport
from tensorcomp_ext.compress.selection import by_name, format_and_options, weight_numel
from tensorcomp_ext.formats import Format, LowRankSparse, PackedLowRankSparse, get_format
from tensorcomp_ext.nn import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedEmbedding,
    FactorizedEmbeddingBag,
    FactorizedLayer,
    FactorizedLinear,
)
from tensorcomp_ext.nn.base import STRUCTURE
from tensorcomp_ext.nn.embedding import embedding_modes
from tensorcomp_ext.plan.memory_format import applies_channels_last
from tensorcomp_ext.ranks import NetworkRule, resolve_rank

_CONVOLUTIONS: dict[type, Any] = {
    nn.Conv1d: FactorizedConv1d,
    nn.Conv2d: FactorizedConv2d,
    nn.Conv3d: FactorizedConv3d,
}

_DEFAULT = {"conv": "tucker2", "linear": "svd", "embedding": "ttm"}


@dataclass
class Choice:
    """A layer that will be replaced, by what."""

    name: str
    layer: Any  # a torch.nn layer; mypy takes the attributes of a Module for tensors
    format: str
    rank: int | tuple[int, ...]
    options: dict[str, Any]
    explicit: bool
    factors: tuple[torch.Tensor, ...] | None = None
    """Those of this rank, where a rule for networks has made them."""
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What such a rule has measured, as `PlannedLayer.tuned`."""

    @property
    def structure(self) -> dict[str, Any]:
        """The options that say how the weight is folded."""
        return {key: self.options[key] for key in STRUCTURE if self.options.get(key) is not None}


def not_called(name: str, calls: Mapping[str, list[Call]] | None) -> str | None:
    if calls is None or calls[name]:
        return None
    return "not called on the example inputs (in evaluation mode); an enclosing module may read its weight"


def skipped_entry(name: str, layer: nn.Module, reason: str, **fields: Any) -> LayerReport:
    count = weight_numel(layer)
    return LayerReport(name, type(layer).__name__, count, count, skipped=reason, **fields)


def format_of(name: str, layer: nn.Module, format: Any) -> tuple[str, str, dict[str, Any]]:
    """The kind of a layer, its format and the options of that."""
    chosen, options = format_and_options(
        by_name(format, name, layer) if isinstance(format, Mapping) else format
    )
    table = isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
    kind = "conv" if isinstance(layer, _ConvNd) else "embedding" if table else "linear"
    return kind, chosen or _DEFAULT[kind], options


def takes_groups(name: str, layer: nn.Module, format: Any) -> bool:
    """Whether the format that a layer is to have takes grouped convolutions."""
    return get_format(format_of(name, layer, format)[1]).grouped


def choose(name: str, layer: Any, format: Any, rank: Any, calls: Sequence[Call]) -> Choice | str:
    """What a layer becomes, or why it stays."""
    kind, chosen, options = format_of(name, layer, format)
    if kind not in get_format(chosen).layers:
        return f"format {chosen!r} is not for {type(layer).__name__}"
    spec = by_name(rank, name, layer) if isinstance(rank, Mapping) else rank
    if spec is None:
        return "no rank pattern fits"
    weight = layer.weight.detach()
    if not torch.isfinite(weight).all():
        raise ValueError(f"compress: the weight of layer {name!r} has NaN or Inf; nothing was replaced")
    if isinstance(spec, NetworkRule) and isinstance(rank, Mapping):
        raise ValueError(
            f"compress: layer {name!r}: {spec} chooses for the whole network: pass it as rank itself, with "
            "layers= or exclude= for a part"
        )
    explicit = isinstance(spec, (int, tuple, list))
    if kind == "embedding":
        options |= embedding_modes(weight.shape, options.get("in_modes"), options.get("out_modes"))
    choice = Choice(name, layer, chosen, 0, options, explicit)
    if isinstance(spec, NetworkRule):
        return choice  # `allocate` ranks all of them together
    try:
        choice.rank = _rank(choice, spec, weight, _pixels(layer, calls))
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
        raise _named(error, name) from error
    return choice


def _rank(choice: Choice, spec: Any, weight: torch.Tensor, pixels: tuple[int, int]) -> int | tuple[int, ...]:
    """The rank of a layer: explicit ones as the format checks them, where it folds the weight."""
    structure = choice.structure
    if choice.explicit and choice.format not in ("tucker2", "svd"):
        given = tuple(spec) if isinstance(spec, list) else spec
        return get_format(choice.format).check_rank(tuple(weight.shape), given, **structure)
    return resolve_rank(spec, weight, choice.format, name=choice.name, pixels=pixels, **structure)


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
    """Decompose one layer, unless it would not get smaller, which one that is pruned in training may."""
    layer = choice.layer
    dense = layer.weight.numel()
    ranks = (choice.rank,) if isinstance(choice.rank, int) else tuple(choice.rank)
    shapes = get_format(choice.format).factor_shapes(
        tuple(layer.weight.shape), choice.rank, **choice.structure
    )
    stored = sum(math.prod(shape) for shape in shapes)
    remark = (
        f"{stored:,} parameters in {choice.format} at rank {'×'.join(map(str, ranks))}, dense has {dense:,}"
    )
    shrinks = get_format(choice.format).shrinks
    if stored >= dense and not choice.explicit and shrinks:
        pointwise = isinstance(layer, _ConvNd) and all(size == 1 for size in layer.kernel_size)
        return skipped_entry(
            choice.name, layer, f"{'pointwise: ' if pointwise else ''}would not get smaller: {remark}"
        ), None
    try:
        new = _decomposed(choice) if choice.factors is None else assembled(choice, ranks, choice.factors)
        new.tuned = copy.deepcopy(choice.tuned)
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:
        raise _named(error, choice.name) from error
    entry = LayerReport(
        choice.name,
        type(layer).__name__,
        dense,
        new.weight.counted,
        format=choice.format,
        rank=ranks,
        relative_error=_error(layer.weight, new.weight),
        note=f"not smaller, as asked: {remark}" if stored >= dense and shrinks else None,
    )
    count_bytes(entry, layer.weight, new.weight)
    return entry, new


def _decomposed(choice: Choice) -> FactorizedLayer:
    layer = choice.layer
    if isinstance(layer, nn.Linear):
        make: Any = FactorizedLinear.from_linear
    elif isinstance(layer, nn.Embedding):
        make = FactorizedEmbedding.from_embedding
    elif isinstance(layer, nn.EmbeddingBag):
        make = FactorizedEmbeddingBag.from_embedding_bag
    else:
        make = _CONVOLUTIONS[type(layer)].from_conv
    made: FactorizedLayer = make(layer, format=choice.format, rank=choice.rank, **choice.options)
    return made


def assembled(
    choice: Choice, ranks: tuple[int, ...], factors: Sequence[torch.Tensor] | None = None
) -> FactorizedLayer:
    """A convolution or linear layer of these ranks with given factors, random ones without."""
    layer: Any = choice.layer
    made: FactorizedLayer
    rank = ranks[0] if len(ranks) == 1 else ranks
    options: dict[str, Any] = {"format": choice.format, "rank": rank, "bias": layer.bias is not None}
    options |= {**choice.structure, "device": layer.weight.device, "dtype": layer.weight.dtype}
    with torch.random.fork_rng(devices=[]):
        if isinstance(layer, nn.Linear):
            made = FactorizedLinear(layer.in_features, layer.out_features, **options)
        else:
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
            made = _CONVOLUTIONS[type(layer)](layer.in_channels, layer.out_channels, *geometry, **options)
            made.channels_last = applies_channels_last(layer.weight)
    with torch.no_grad():
        for parameter, factor in zip(made.weight.factors, factors or (), strict=bool(factors)):
            parameter.copy_(factor)
        if made.bias is not None:
            made.bias.copy_(layer.bias)
            made.bias.requires_grad_(layer.bias.requires_grad)
    made.weight.requires_grad_(layer.weight.requires_grad)
    made.train(layer.training)
    return made


def count_bytes(entry: LayerReport, dense: torch.Tensor, weight: Format) -> None:
    """Write bytes before and after, where more than the weights themselves has to be stored."""
    if isinstance(weight, (LowRankSparse, PackedLowRankSparse)):
        entry.bytes_before = dense.numel() * dense.element_size()
        entry.bytes_after = weight.stored_bytes


def _error(dense: torch.Tensor, weight: Format) -> float | None:
    """What a format loses of a weight; its low-rank part alone, where a sparse one makes up for it."""
    with torch.no_grad():
        if isinstance(weight, LowRankSparse):
            low = weight.low_rank_dense()
            return None if low is None else relative_error(dense, low)
        return relative_error(dense, weight.to_dense())


def relative_error(dense: torch.Tensor, approximation: torch.Tensor) -> float:
    """``‖W − Ŵ‖ / ‖W‖`` in float64; 0.0 where both are zero."""
    exact = dense.detach().double()
    difference = float((approximation.detach().double() - exact).norm())
    norm = float(exact.norm())
    return difference / norm if norm > 0 else (0.0 if difference == 0 else float("inf"))
