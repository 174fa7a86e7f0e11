"""Reports of networks that learned after they were compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tensorcomp_ext.compress.calls import output_distance, trace
from tensorcomp_ext.compress.factorize import count_bytes, relative_error
from tensorcomp_ext.compress.measure import refresh
from tensorcomp_ext.compress.report import Report
from tensorcomp_ext.compress.surgery import count_parameters
from tensorcomp_ext.formats._sparse import SparseFormat
from tensorcomp_ext.nn import FactorizedLayer


def recount(report: Report, model: nn.Module, example_inputs: Any, dense: nn.Module | None = None) -> None:
    """Bring formats, ranks, sizes, costs and errors up to date with a trained network.

    Args:
        dense: what the factors came from: errors of weights and outputs are those to it, but for weights with
            a sparse part, whose error remains that of the low-rank part they began with. None for factors
            that were drawn: errors are dropped.
    """
    for entry in report.replaced:
        layer = model.get_submodule(entry.name)
        assert isinstance(layer, FactorizedLayer)
        weight = layer.weight
        entry.format, entry.parameters_after = weight.name, weight.counted
        original = None if dense is None else dense.get_submodule(entry.name).weight
        if isinstance(original, torch.Tensor):
            count_bytes(entry, original, weight)
        if isinstance(weight, SparseFormat):
            continue
        entry.rank = (layer.rank,) if isinstance(layer.rank, int) else tuple(layer.rank)
        larger = entry.parameters_after >= entry.parameters_before
        entry.note = "not smaller than the dense weight" if larger else None
        entry.relative_error = None
        if isinstance(original, torch.Tensor):
            with torch.no_grad():
                entry.relative_error = relative_error(original, weight.to_dense())
    report.parameters_after, report.output_error = count_parameters(model), None
    if example_inputs is not None:
        refresh(report, model, example_inputs)
        if dense is not None:
            expected, found = (trace(network, {}, example_inputs)[0] for network in (dense, model))
            report.output_error = output_distance(expected, found)
