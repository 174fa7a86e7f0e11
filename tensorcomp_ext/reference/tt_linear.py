"""Oracle of the linear layer with a tensor-train weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tt_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
) -> Tensor:
    """Linear layer with a tensor-train weight, core by core from the last to the first.

    ``W[o_1..o_m, i_1..i_d] = cores[0][:,o_1,:] … cores[m-1][:,o_m,:] cores[m][:,i_1,:] … cores[-1][:,i_d,:]``

    Args:
        x: input ``[..., prod(in_modes)]``.
        cores: ``[r, n, r']`` over the output modes, then over the input modes; first and last rank are 1.
        bias: ``[prod(out_modes)]`` or None.

    Returns:
        ``[..., prod(out_modes)]``.

    Cost: core k of the input modes takes ``r_{k-1} r_k prod_{l<=k} i_l`` MACs a row, core k of the output
    modes ``r_{k-1} r_k prod_{l>=k} o_l``.

    Source: Oseledets 2011; Garipov et al. 2016.
    """
    z = x.reshape(*x.shape[:-1], *in_modes, 1)  # [..., i_1 .. i_d, 1]
    for core in reversed(cores[len(out_modes) :]):
        z = torch.einsum("...nr,qnr->...q", z, core)  # [..., i_1 .. i_k-1, r_k-1]
    z = z.unsqueeze(-1)  # [..., r_m, 1]
    for core in reversed(cores[: len(out_modes)]):
        z = torch.einsum("...rt,qnr->...qnt", z, core).flatten(-2)  # [..., r_k-1, o_k .. o_m]
    y = z.squeeze(-2)  # [..., out]
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias.to(y.dtype)
