"""Linear layer with a tensor-train weight over output modes, then input modes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._network_linear import as_op
from ._train_linear import SCHEMA, register_train_linear, train_linear

_NAME = "tt_linear"
_OPS = torch.ops.tensorcomp


def tt_linear(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """Linear layer whose weight is a tensor train, without forming it where that is cheaper.

    ``W[o_1..o_m, i_1..i_d] = cores[0][:,o_1,:] … cores[m-1][:,o_m,:] cores[m][:,i_1,:] … cores[-1][:,i_d,:]``

    The result equals ``torch.nn.functional.linear(x, W, bias)`` with both sides of ``W`` flattened row-major.
    The order of the products, and which cores are multiplied with each other first, is the one of least
    multiply-adds for this number of rows.

    Args:
        x: input ``[..., in]``, any strides, with in the product of ``in_modes``.
        cores: ``[r, n, r']`` over the output modes, then over the input modes; first and last rank are 1.
        bias: ``[out]`` or None.
        in_modes, out_modes: the modes into which input and output fall.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[..., out]``, contiguous.

    Cost: at most ``out in`` MACs a row and the merge of all cores; ``r (in + out)`` a row, with r the rank
    between output and input modes, where the cores of either side are merged.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Oseledets 2011; Garipov et al. 2016.
    """
    if backend is None and as_op(x):
        return _OPS.tt_linear.default(x, cores, bias, in_modes=in_modes, out_modes=out_modes)
    oracle = reference.tt_linear
    return train_linear(_NAME, oracle, False, x, cores, bias, in_modes, out_modes, backend)


# --- registration ---

SCHEMAS = {_NAME: SCHEMA}

register_train_linear(_NAME, reference.tt_linear, ring=False)
