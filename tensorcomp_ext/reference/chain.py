"""Oracle of a chain of matrix products over the modes of each row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Steps = Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""For each step the dims contracted, the sizes brought and the order of the result's dims."""


def chain(
    x: Tensor, matrices: Sequence[Tensor], bias: Tensor | None, dims: Sequence[int], steps: Steps
) -> Tensor:
    """Linear map of each row of ``x``, contracted with one matrix after the other.

    A row is seen as a tensor of ``dims``. A step sums over the dims ``contracted``, which row-major index the
    columns of its matrix, and brings the dims ``new``, which row-major index the matrix's rows, behind those
    that are kept; then ``order`` permutes the dims. Row-major, the last dims index the output.

    Args:
        x: input ``[..., prod(dims)]``.
        matrices: one for each step, ``[prod(new), prod(contracted)]``.
        bias: ``[out_features]`` or None.
        dims: sizes of a row's dims.
        steps: ``(contracted, new, order)`` for each step.

    Returns:
        ``[..., out_features]``.

    Cost: a step takes ``prod(dims before it) prod(new)`` MACs a row.

    Source: Novikov et al. 2015 (TT layers as such a chain).
    """
    lead = x.dim() - 1
    z = x.reshape(*x.shape[:-1], *dims)  # [..., d_0, d_1, ...]
    for matrix, (contracted, new, order) in zip(matrices, steps, strict=True):
        kept = [place for place in range(z.dim() - lead) if place not in contracted]
        z = z.permute(*range(lead), *(lead + place for place in (*kept, *contracted)))
        sizes = z.shape[: lead + len(kept)]
        z = torch.matmul(z.reshape(*sizes, matrix.shape[1]), matrix.t())  # [..., kept, prod(new)]
        z = z.reshape(*sizes, *new).permute(*range(lead), *(lead + place for place in order))
    y = z.reshape(*x.shape[:-1], math.prod(z.shape[lead:]))
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias.to(y.dtype)
