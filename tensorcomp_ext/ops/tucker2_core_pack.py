"""Packing of a Tucker-2 core for kernels that read one matrix a tap.

CUDA float32, float16 and bfloat16 are served by ``csrc/ops/cuda``, everything else by the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.tucker2_core_pack import tucker2_core_pack as _oracle
from ._register import define, fallthrough_autograd, register_default

_NAME = "tucker2_core_pack"


def tucker2_core_pack(core: Tensor) -> Tensor:
    """Copy a Tucker-2 core into one matrix a tap, output ranks innermost.

    ``packed[y,x,a,b] = core[b,a,y,x]``

    For inference: the result does not carry gradients.

    Args:
        core: ``[R_out, R_in, kH, kW]``, any strides.

    Returns:
        ``[kH, kW, R_in, R_out]``, dense, in the dtype and on the device of ``core``.

    Cost: no MACs, one pass over the core.

    Raises:
        TypeError: ``core`` is no tensor.
        ValueError: ``core`` has not four dimensions.
    """
    if not isinstance(core, Tensor):
        raise TypeError(f"{_NAME}: core must be a tensor, got {type(core).__name__}")
    if core.dim() != 4:
        raise ValueError(f"{_NAME}: core must be [R_out, R_in, kH, kW], got {list(core.shape)}")
    return torch.ops.tensorcomp.tucker2_core_pack(core.detach())


def _default(core: Tensor) -> Tensor:
    # An op must not return its input, which contiguous() does where the core lies packed already.
    packed = _oracle(core)
    return packed.clone() if packed.data_ptr() == core.data_ptr() else packed


def _fake(core: Tensor) -> Tensor:
    rank_out, rank_in, height, width = core.shape
    return core.new_empty((height, width, rank_in, rank_out))


define(_NAME, "(Tensor core) -> Tensor")
register_default(_NAME, _default, _fake)
fallthrough_autograd(_NAME)
