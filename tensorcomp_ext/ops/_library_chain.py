"""A chain program by the library's matrix products, differentiable by torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ._chain_program import Program, Step

_LONG = 32
"""Trailing entries from which on a product over an inner dim beats a copy that brings the dim to the end."""


def library_chain(
    x: Tensor, matrices: Sequence[Tensor], bias: Tensor | None = None, *, program: Program
) -> Tensor:
    """Every row of ``x`` through the steps of a program, one matrix product a step.

    Dims stay where a step leaves them and are moved only where the next product needs them elsewhere.

    Args:
        x: ``[..., in_features]``.
        matrices: ``[prod(new), prod(contracted)]`` for each step.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``.

    Cost: ``program.macs()`` MACs a row.
    """
    lead = x.shape[:-1]
    if len(program.steps) == 1 and program.steps[0].contracted == tuple(range(len(program.dims))):
        only = program.steps[0]
        if only.order == tuple(range(len(only.new))):
            return F.linear(x, matrices[0], bias)
    rows = math.prod(lead)
    z = x.reshape(rows, *program.dims)
    for step, matrix in zip(program.steps, matrices, strict=True):
        z = _product(z, matrix, step)
    y = z.reshape(*lead, program.out_features)
    return y if bias is None else y + bias


def _product(z: Tensor, matrix: Tensor, step: Step) -> Tensor:
    """One step for rows ``[rows, *dims]``."""
    rows, *dims = z.shape
    kept = [place for place in range(len(dims)) if place not in step.contracted]
    last = step.contracted[-1]
    side_by_side = step.contracted == tuple(range(last + 1 - len(step.contracted), last + 1))
    inner = math.prod(dims[last + 1 :])
    if side_by_side and inner >= _LONG and z.is_contiguous():
        y = torch.matmul(matrix, z.reshape(-1, matrix.shape[1], inner))
        outer, behind = dims[: step.contracted[0]], dims[last + 1 :]
        y = y.reshape(rows, *outer, *step.new, *behind)
        # As they come: the outer dims, the new ones, those behind; the step's order counts the new ones last.
        count, new = len(outer), len(step.new)
        come = [*range(count), *(len(kept) + i for i in range(new)), *range(count, len(kept))]
        return y.permute(0, *(1 + come.index(place) for place in step.order))
    places = [1 + place for place in (*kept, *step.contracted)]
    y = F.linear(z.permute(0, *places).reshape(-1, matrix.shape[1]), matrix)
    y = y.reshape(rows, *(dims[place] for place in kept), *step.new)
    return y.permute(0, *(1 + place for place in step.order))
