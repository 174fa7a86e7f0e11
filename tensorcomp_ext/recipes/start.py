"""The network that rank selection begins with: layers in factors, decomposed or drawn."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tensorcomp_ext.compress import CompressionResult, Report, compress
from tensorcomp_ext.compress.factorize import format_of
from tensorcomp_ext.compress.selection import as_patterns, considered, matches, require_matches
from tensorcomp_ext.formats import format_names
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.nn.base import STARTS

from .evaluate import device_of
from .presets import layout

NOT_TRAINED = "not trained: its weight does not require gradients"

WITH_RANKS = tuple(name for name in format_names() if not name.startswith("lowrank_sparse"))
"""Formats of nothing but factors with ranks between them, in which networks train as they are."""


def check_start(name: str, start: str) -> None:
    """ValueError for another start than "random" or "decompose"."""
    if start not in STARTS:
        raise ValueError(f"{name}: start must be 'random' or 'decompose', got {start!r}")


def factorized(
    name: str,
    model: nn.Module,
    *,
    rank: Any,
    format: Any = None,
    preset: str | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    start: str = "random",
    seed: int = 0,
    example_inputs: Any = None,
) -> CompressionResult:
    """A copy of ``model`` with layers in factors, and the report of it.

    Args:
        name: of the caller, for messages.
        rank, format, layers, exclude, example_inputs: as ``compress`` takes them.
        preset: instead of ``format``, ``layers`` and ``exclude``: a published layout, see :mod:`.presets`.
        start: "decompose" the weights, or "random": factors of the variance that the dense layer would have
            been given, and biases of 0, in place of weights and biases; the other layers stay as they are.
            Layers whose weights do not require gradients stay dense, as drawn factors would never be trained,
            and so do biases that do not.
        seed: of what is drawn.

    Raises:
        ValueError, TypeError: options that do not fit, formats without ranks, nothing left to draw, and as
            ``compress``; all before any decomposition.
    """
    check_start(name, start)
    layers = None if layers is None else as_patterns(layers, "layers")
    exclude = as_patterns(exclude, "exclude")
    if preset is not None:
        if format is not None or layers is not None or exclude:
            raise ValueError(
                f"{name}: preset={preset!r} says formats and layers itself; give one or the other"
            )
        format, layers = layout(preset, model)
    chosen = _chosen(model, layers, exclude)
    _check_formats(name, chosen, format)
    left_out: list[str] = []
    if start == "random":
        left_out = [place for place, layer in chosen.items() if not is_trained(layer)]
        if chosen and len(left_out) == len(chosen):
            raise ValueError(
                f"{name}: start='random' is for weights that are trained, those of "
                f"{', '.join(left_out[:8])} do not require gradients; start='decompose' takes such"
            )
        format = _drawn(model, format)
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        result = compress(
            model,
            format=format,
            rank=rank,
            layers=layers,
            exclude=[*exclude, *map(glob.escape, left_out)],
            example_inputs=example_inputs,
        )
    if not result.report.replaced:
        skipped = "; ".join(f"{entry.name or 'model'}: {entry.skipped}" for entry in result.report.layers[:8])
        raise ValueError(f"{name}: no layer was put into factors ({skipped or 'the model has none'})")
    if start == "random":
        for place in left_out:
            result.report[place].skipped = NOT_TRAINED
        for entry in result.report.replaced:
            bias = result.model.get_submodule(entry.name)._parameters.get("bias")
            if bias is not None and bias.requires_grad:
                nn.init.zeros_(bias)
            entry.relative_error = None
        result.report.output_error = None
    return result


def is_trained(layer: nn.Module) -> bool:
    """Whether the weight of a dense layer requires gradients; also where it has none of its own."""
    weight = layer._parameters.get("weight")
    return weight is None or weight.requires_grad


def structures(model: nn.Module, report: Report) -> dict[str, dict[str, Any]]:
    """Of each replaced layer how its weight is stored, format and modes, in JSON types.

    Factors of equal shapes may stand for different weights.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in report.replaced:
        layer = model.get_submodule(entry.name)
        assert isinstance(layer, FactorizedLayer)
        found[entry.name] = {"format": layer.format, **layer.weight.structure}
    return found


def _chosen(model: nn.Module, layers: Iterable[str] | None, exclude: Iterable[str]) -> dict[str, nn.Module]:
    """The layers that patterns choose, whether or not they can be replaced."""
    return {
        name: layer
        for name, layer in considered(model)
        if (layers is None or matches(name, layers)) and not matches(name, exclude)
    }


def _check_formats(name: str, layers: Mapping[str, nn.Module], format: Any) -> None:
    for place, layer in layers.items():
        chosen = format_of(place, layer, format)[1]
        if chosen in format_names() and chosen not in WITH_RANKS:
            raise ValueError(
                f"{name}: format {chosen!r} of layer {place!r} is not of factors with ranks alone; formats "
                f"that are: {', '.join(WITH_RANKS)}"
            )


def _drawn(model: nn.Module, format: Any) -> dict[str, Any]:
    """The formats of all layers one by one, each with ``start="random"``."""
    found = dict(considered(model))
    if isinstance(format, Mapping):
        require_matches([key for key in format if isinstance(key, str)], list(found), "format")
    chosen = {name: format_of(name, layer, format) for name, layer in found.items()}
    return {name: (kind, {**options, "start": "random"}) for name, (_, kind, options) in chosen.items()}
