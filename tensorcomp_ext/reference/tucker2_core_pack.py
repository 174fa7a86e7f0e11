"""Oracle of the packing of a Tucker-2 core."""

from __future__ import annotations

from torch import Tensor


def tucker2_core_pack(core: Tensor) -> Tensor:
    """A Tucker-2 core as one matrix a tap, output ranks innermost.

    ``packed[y,x,a,b] = core[b,a,y,x]``

    Args:
        core: ``[R_out, R_in, kH, kW]``, any dtype and strides.

    Returns:
        ``[kH, kW, R_in, R_out]``, dense. Cost: no MACs, one pass over the core.
    """
    return core.permute(2, 3, 1, 0).contiguous()
