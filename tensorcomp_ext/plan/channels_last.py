"""Channels-last images without copies from one layout to the other."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .case import Case
from .memory_format import CHANNELS_LAST, as_channels_last
from .precision import tf32_state


def takes_products(case: Case) -> bool:
    """Whether pointwise stages run as matrix products: channels-last images on CUDA.

    What torch lets a convolution round to TF32, a product may have to keep, and the other way round. The
    layer is a convolution, so in float32 products serve only where both are allowed the same.
    """
    if case.device != "cuda" or case.layout != "channels_last":
        return False
    allowed = tf32_state(case.device)
    return case.dtype != "float32" or allowed.convolutions == allowed.products


def channels_product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the channels of a channels-last image by ``matrix`` ``[out, in]``; the result is one, too."""
    return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)


def weight_layout(case: Case) -> str:
    """The layout that spares the library a copy of the weight at each call: "channels_last" for such images.

    "contiguous" for all else.
    """
    return "channels_last" if case.layout == "channels_last" else "contiguous"


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """A contiguous convolution weight in the layout of :func:`weight_layout`; a matrix stays as it is."""
    if layout == "channels_last" and weight.dim() in CHANNELS_LAST:
        return as_channels_last(weight)
    return weight
