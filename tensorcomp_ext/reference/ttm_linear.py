"""Oracle of the linear layer with a TT-matrix or TR-matrix weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ttm_linear(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Linear layer with a TT-matrix or TR-matrix weight, core by core from the first to the last.

    ``W[o_1..o_d, i_1..i_d] = trace(cores[0][:,o_1,i_1,:] … cores[d-1][:,o_d,i_d,:])``

    Args:
        x: input ``[..., prod(in_k)]``.
        cores: ``[r, out_k, in_k, r']``; the last rank is the first.
        bias: ``[prod(out_k)]`` or None.

    Returns:
        ``[..., prod(out_k)]``.

    Cost: core k takes ``r_0 prod_{l<=k} out_l r_{k-1} r_k prod_{l>=k} in_l`` MACs a row.

    Source: Oseledets 2010; Novikov et al. 2015.
    """
    first, *others = cores
    rest = math.prod(core.shape[2] for core in others)
    z = x.reshape(*x.shape[:-1], first.shape[2], rest)  # [..., i_1, i_2 .. i_d]
    z = torch.einsum("...ix,zoir->...zorx", z, first)  # [..., r_0, o_1, r_1, i_2 .. i_d]
    for core in others:
        rest //= core.shape[2]
        z = z.reshape(*z.shape[:-1], core.shape[2], rest)
        z = torch.einsum("...ztrix,roiq->...ztoqx", z, core).flatten(-4, -3)  # [..., r_0, o_1 .. o_k, r_k, …]
    y = z.squeeze(-1).diagonal(dim1=-3, dim2=-1).sum(-1)  # [..., out]
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias.to(y.dtype)
