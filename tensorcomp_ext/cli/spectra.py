"""Singular values of the weights that were compressed, beside the ranks that were chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorcomp_ext.compress.report import LayerReport, Report

MOST = 256  # values kept of a spectrum: a plot shows no more


def add_spectra(report: Report, dense: nn.Module) -> None:
    """Write the spectra of the replaced layers of ``dense`` into ``report.details``."""
    layers = dict(dense.named_modules())
    found = {}
    for entry in report.replaced:
        weight = getattr(layers.get(entry.name), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() >= 2:
            found[entry.name] = layer_spectra(weight.detach(), entry)
    if found:
        report.details["spectra"] = found


def layer_spectra(weight: Tensor, entry: LayerReport) -> list[dict[str, Any]]:
    """Spectra of a weight: of the matrix, or of a kernel's unfoldings by output and by input channels.

    Each is a dict of "unfolding", "values" (relative to the largest, at most ``MOST``), "count" (of all
    singular values) and "rank" (the format's rank at this unfolding, None where it has none there).
    """
    matrix = weight.dim() == 2
    unfoldings = {"matrix": 0} if matrix else {"output channels": 0, "input channels": 1}
    ranks: tuple[int | None, ...] = (None, None)
    if entry.rank is not None and entry.format == ("svd" if matrix else "tucker2"):
        ranks = entry.rank
    found = []
    for (name, mode), rank in zip(unfoldings.items(), ranks, strict=False):
        values = _singular_values(weight.movedim(mode, 0).flatten(1))
        places = torch.linspace(0, len(values) - 1, min(MOST, len(values))).round().long()
        found.append(
            {
                "unfolding": name,
                "values": [float(v) for v in values[places]],
                "count": len(values),
                "rank": rank,
            }
        )
    return found


def _singular_values(matrix: Tensor) -> Tensor:
    """Falling, relative to the largest; from the smaller Gram matrix, values below 1e-8 being rounding."""
    matrix = matrix.to("cpu", torch.float64)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.t()
    values = torch.linalg.eigvalsh(matrix @ matrix.t()).flip(0).clamp(min=0).sqrt()
    return values / values[0].clamp(min=torch.finfo(values.dtype).tiny)
