"""Linear layer with a tensor-train weight over output modes, then input modes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._network_linear import (
    as_op,
    check_arguments,
    check_core_modes,
    check_cores,
    check_ends,
    check_modes,
    run,
    train_structure,
)
from ._register import define, register_autocast, register_composite

_NAME = "tt_linear"
_LETTERS = "[r, n, r']"
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
    return _run(x, cores, bias, in_modes, out_modes, backend)


def _run(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
    backend: str | None,
) -> Tensor:
    inner, outer = check_modes(in_modes, "in_modes", _NAME), check_modes(out_modes, "out_modes", _NAME)
    check_cores(cores, _LETTERS, _NAME)
    check_ends(cores, 1, _LETTERS, _NAME)
    check_core_modes(cores, outer, inner, _NAME)
    check_arguments(x, cores, bias, math.prod(inner), math.prod(outer), _NAME)
    structure = train_structure(cores, len(outer), ring=False)
    return run(
        _NAME,
        x,
        cores,
        bias,
        structure,
        backend,
        lambda: reference.tt_linear(x, cores, bias, in_modes=inner, out_modes=outer),
    )


# --- registration ---

SCHEMAS = {
    _NAME: "(Tensor x, Tensor[] cores, Tensor? bias=None, *, int[] in_modes, int[] out_modes) -> Tensor",
}


def _composite(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    in_modes: Sequence[int],
    out_modes: Sequence[int],
) -> Tensor:
    return _run(x, cores, bias, in_modes, out_modes, None)


define(_NAME, SCHEMAS[_NAME])
register_composite(_NAME, _composite)
register_autocast(_NAME, tensors=3)
