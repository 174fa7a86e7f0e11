"""Linear layer with a weight of cores that carry an output and an input mode each: TT-matrix, TR-matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._network_linear import as_op, check_arguments, check_cores, check_ends, matrix_structure, run
from ._register import define, register_autocast, register_composite

_NAME = "ttm_linear"
_LETTERS = "[r, out_k, in_k, r']"
_OPS = torch.ops.tensorcomp


def ttm_linear(
    x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Linear layer whose weight is a TT-matrix, without forming it where that is cheaper.

    ``W[o_1..o_d, i_1..i_d] = trace(cores[0][:,o_1,i_1,:] … cores[d-1][:,o_d,i_d,:])``; the result equals
    ``torch.nn.functional.linear(x, W, bias)`` with both sides of ``W`` flattened row-major. With a first rank
    of 1 it is a TT-matrix, otherwise a TR-matrix. The order of the products, and which cores are multiplied
    with each other first, is the one of least multiply-adds for this number of rows.

    Args:
        x: input ``[..., in]``, any strides, with in the product of all ``in_k``.
        cores: ``[r, out_k, in_k, r']``; the last rank is the first.
        bias: ``[out]`` or None.
        backend: None chooses; "native" or "reference" force.

    Returns:
        ``[..., out]``, contiguous.

    Cost: at most ``out in`` MACs a row and the merge of all cores; core by core
    ``r_0 sum_k prod_{l<=k} out_l r_{k-1} r_k prod_{l>=k} in_l`` a row.

    Raises:
        ValueError: sizes, devices or options that do not fit; ``backend="native"`` where it cannot serve
            (with the reason).
        TypeError: an argument that is no tensor, or dtypes that differ.

    Source: Oseledets 2010; Novikov et al. 2015.
    """
    if backend is None and as_op(x):
        return _OPS.ttm_linear.default(x, cores, bias)
    return _run(x, cores, bias, backend)


def _run(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, backend: str | None) -> Tensor:
    check_cores(cores, _LETTERS, _NAME)
    check_ends(cores, cores[0].shape[0], _LETTERS, _NAME)
    out_features, in_features = (math.prod(core.shape[mode] for core in cores) for mode in (1, 2))
    check_arguments(x, cores, bias, in_features, out_features, _NAME)
    structure = matrix_structure(cores)
    return run(_NAME, x, cores, bias, structure, backend, lambda: reference.ttm_linear(x, cores, bias))


# --- registration ---

SCHEMAS = {_NAME: "(Tensor x, Tensor[] cores, Tensor? bias=None) -> Tensor"}


def _composite(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    return _run(x, cores, bias, None)


define(_NAME, SCHEMAS[_NAME])
register_composite(_NAME, _composite)
register_autocast(_NAME, tensors=3)
