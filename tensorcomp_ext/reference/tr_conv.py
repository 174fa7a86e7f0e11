"""Oracle of the tensor-ring convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def tr_conv2d(
    x: Tensor,
    core_in: Tensor,
    core_spatial: Tensor,
    core_out: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    kernel_size: Sequence[int] | None = None,
) -> Tensor:
    """Convolution with the dense weight of a tensor ring over (input channels, window, output channels).

    ``W[t,s,d] = sum_qab core_in[q,s,a] core_spatial[a,d,b] core_out[b,t,q]`` with ``d = y kW + x``.

    Args:
        x: input ``[N, S, H, W]``.
        core_in: ``[R0, S, Ra]``.
        core_spatial: ``[Ra, kH kW, Rb]``.
        core_out: ``[Rb, T, R0]``.
        bias: ``[T]`` or None.
        stride, dilation: int or pair.
        padding: int, pair (rows, columns), four ints (top, bottom, left, right), "same" or "valid".
        kernel_size: ``(kH, kW)``; None for a square kernel.

    Returns:
        ``[N, T, H', W']``.

    Cost: ``T S kH kW R0 Rb`` MACs and less for the weight, ``N H' W' kH kW S T`` for the convolution.

    Source: Zhao et al. 2016; Wang et al. 2018 (convolutions).
    """
    if not isinstance(padding, (str, int)) and len(padding) == 4:
        top, bottom, left, right = padding
        x = F.pad(x, (left, right, top, bottom))
        padding = 0
    side = round(core_spatial.shape[1] ** 0.5)
    window = (side, side) if kernel_size is None else tuple(kernel_size)
    weight = torch.einsum("qsa,adb,btq->tsd", core_in, core_spatial, core_out)
    y = F.conv2d(x, weight.unflatten(2, window), None, stride, padding, dilation)
    # Under autocast y is in the lower dtype and the bias is not.
    return y if bias is None else y + bias[:, None, None].to(y.dtype)
