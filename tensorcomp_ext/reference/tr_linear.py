"""Oracle of the linear layer with a tensor-ring weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tr_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
) -> Tensor:
    """Linear layer with a tensor-ring weight, core by core from the last to the first.

    ``W[o_1..o_m, i_1..i_d] = trace(cores[0][:,o_1,:] … cores[m-1][:,o_m,:] cores[m][:,i_1,:] …)``

    Args:
        x: input ``[..., prod(in_modes)]``.
        cores: ``[r, n, r']`` over the output modes, then over the input modes; the last rank is the first.
        bias: ``[prod(out_modes)]`` or None.

    Returns:
        ``[..., prod(out_modes)]``.

    Cost: that of a tensor train, times the first rank from the second core on.

    Source: Zhao et al. 2016; Wang et al. 2018 (layers).
    """
    *others, last = cores[len(out_modes) :]
    z = x.reshape(*x.shape[:-1], *in_modes)  # [..., i_1 .. i_d]
    z = torch.einsum("...n,qnz->...qz", z, last)  # [..., i_1 .. i_d-1, r_d-1, r_0]
    for core in reversed(others):
        z = torch.einsum("...nrz,qnr->...qz", z, core)  # [..., i_1 .. i_k-1, r_k-1, r_0]
    z = z.unsqueeze(-1)  # [..., r_m, r_0, 1]
    for core in reversed(cores[: len(out_modes)]):
        z = torch.einsum("...rzt,qnr->...qznt", z, core).flatten(-2)  # [..., r_k-1, r_0, o_k .. o_m]
    y = z.diagonal(dim1=-3, dim2=-2).sum(-1)  # [..., out]
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias.to(y.dtype)
