"""The network that low-rank + sparse training begins with: every layer but the last in parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tensorcomp_ext.compress import CompressionResult, compress
from tensorcomp_ext.compress.calls import trace
from tensorcomp_ext.compress.selection import as_patterns, considered, matches
from tensorcomp_ext.formats import balanced_modes, get_format
from tensorcomp_ext.formats._network import NetworkFormat
from tensorcomp_ext.formats._sparse import NO_LOW_RANK, LowRankOptions
from tensorcomp_ext.ranks import Ratio, rank_layout
from tensorcomp_ext.ranks.layouts import Pixels

Method = Literal["lowrank-sparse", "sparse", "lowrank"]
METHODS: tuple[Method, ...] = ("lowrank-sparse", "sparse", "lowrank")
LowRank = str | Mapping[str, str]


def parts_of(
    model: nn.Module,
    *,
    method: Method = "lowrank-sparse",
    low_rank: LowRank = "tt",
    mode: str = "additive",
    init: str = "residual",
    fraction: float = 0.1,
    outliers: float = 0.1,
    iterations: int = 300,
    storage: float | None = None,
    exclude: str | Iterable[str] | None = None,
    example_inputs: Any = None,
) -> CompressionResult:
    """A copy of ``model`` with convolutions and linear layers in the form that training prunes.

    Pointwise convolutions and linear layers are folded to ``(T1, T2, S1, S2)`` with balanced pairs; the
    windows of other convolutions stay whole. A layer of which rank 1 would take more than ``fraction``, as
    depthwise ones of 3 x 3, keeps its sparse part alone, and the report says so. Whatever the method, the
    outputs are those of ``model`` to rounding, but for "lowrank", which decomposes.

    Args:
        method: "lowrank-sparse"; "sparse", no low-rank part anywhere; "lowrank", no sparse part.
        low_rank: format of the low-rank part, or a mapping from "conv" and "linear" to formats.
        mode, init, outliers, iterations: as :class:`..formats.LowRankSparse` takes them.
        fraction: share of a layer's dense weights that its low-rank part may take.
        storage: share of the layers' dense weights that low-rank and sparse parts may take in the end; None
            for any.
        exclude: patterns of layers to leave dense; None for the convolution or linear layer that
            ``example_inputs`` call last, without them for the last one in the network's order.
        example_inputs: as ``compress`` takes them.

    Raises:
        ValueError, TypeError: options that do not fit, and as ``compress``; a ``storage`` that the low-rank
            parts alone exceed. All before anything is decomposed.
    """
    if method not in METHODS:
        raise ValueError(f"parts_of: method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"parts_of: fraction must be in (0, 1], got {fraction}")
    if isinstance(low_rank, Mapping):
        named = set(low_rank) == {"conv", "linear"} and all(isinstance(n, str) for n in low_rank.values())
    else:
        named = isinstance(low_rank, str)
    if not named:
        raise TypeError(
            "parts_of: low_rank must be the name of a format, or a mapping from both 'conv' and 'linear' to "
            f"names, got {low_rank!r}"
        )
    found = {n: m for n, m in considered(model) if isinstance(m, (_ConvNd, nn.Linear))}
    excluded = as_patterns(exclude, "exclude") if exclude is not None else _last(model, found, example_inputs)
    formats: dict[Any, Any] = {}
    ranks: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    numel = taken = 0
    for name, layer in found.items():
        if matches(name, excluded) or not _plain(layer):
            continue
        inner, options, reason, factors = _low_rank_part(layer, low_rank, method, fraction)
        numel, taken = numel + layer.weight.numel(), taken + factors
        if method == "lowrank":
            if reason:
                reasons[name] = f"left dense: {reason}"
                excluded = [*excluded, name]
                continue
            formats[name] = (inner, options)
        else:
            begin = (
                {} if inner == NO_LOW_RANK else {"init": init, "outliers": outliers, "iterations": iterations}
            )
            formats[name] = ("lowrank_sparse", {"low_rank": inner, "mode": mode, **options, **begin})
            reasons[name] = reason and f"sparse part only: {reason}"
        ranks[name] = Ratio(fraction)
    if not formats:
        raise ValueError(
            f"parts_of: there is no layer to compress; excluded are {', '.join(excluded) or 'none'}"
        )
    if storage is not None and method == "lowrank-sparse" and taken > storage * numel:
        raise ValueError(
            f"parts_of: storage must be at least {taken / numel:.4f}, which the low-rank parts take, got "
            f"{storage}"
        )
    result = compress(model, format=formats, rank=ranks, exclude=excluded, example_inputs=example_inputs)
    for entry in result.report.layers:
        remark = reasons.get(entry.name)
        if remark and entry.skipped is None:
            entry.note = remark
        elif remark and entry.skipped == "excluded":
            entry.skipped = remark
    return result


def _last(model: nn.Module, found: Mapping[str, nn.Module], example_inputs: Any) -> list[str]:
    """The layer whose outputs are the network's, as far as can be known."""
    if example_inputs is None:
        return list(found)[-1:]
    called = [name for name, calls in trace(model, found, example_inputs)[1].items() if calls]
    return (called or list(found))[-1:]


def _plain(layer: nn.Module) -> bool:
    """Whether this is a layer of torch.nn with a weight of its own; of others ``compress`` says more."""
    weight = layer._parameters.get("weight")
    return type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and weight is not None


def _low_rank_part(
    layer: Any, low_rank: LowRank, method: Method, fraction: float
) -> tuple[str, dict[str, Any], str, int]:
    """Format and options of a layer's low-rank part, or "none" and a reason; its weights."""
    if method == "sparse":
        return NO_LOW_RANK, {}, "", 0
    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    name = low_rank if isinstance(low_rank, str) else low_rank[kind]
    if name == NO_LOW_RANK:
        return name, {}, "", 0
    weight = layer.weight.detach()
    folded = _folding(name, tuple(weight.shape))
    try:
        part = LowRankOptions("parts_of", weight.shape, name, **folded)
    except ValueError as error:
        if not isinstance(low_rank, str):
            raise
        hint = "low_rank={'conv': ..., 'linear': ...} names one for each kind of layer"
        raise ValueError(f"{error}; {hint}") from error
    layout = rank_layout(weight.reshape(part.shape), name, **folded)
    least, allowed = layout.params(layout.scaled(0.0)), fraction * weight.numel()
    if least > allowed:
        reason = f"rank 1 of {name} takes {least:,} weights, {fraction:g} of the layer is {allowed:,.0f}"
        return NO_LOW_RANK, {}, reason, 0
    return name, folded, "", layout.params(Ratio(fraction).choose(layout, Pixels()))


def _folding(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Modes of a matrix, or of a kernel of one tap, in formats that fold: two balanced ones a side."""
    taps = 1
    for size in shape[2:]:
        taps *= size
    if taps != 1 or not issubclass(get_format(name), NetworkFormat):
        return {}
    return {"out_modes": balanced_modes(shape[0], 2), "in_modes": balanced_modes(shape[1], 2)}
