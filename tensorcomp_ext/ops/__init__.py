"""Functional ops, also reachable as ``torch.ops.tensorcomp.<name>``."""

from .._native import Support
from .tucker2_conv import tucker2_conv2d

__all__ = ["Support", "tucker2_conv2d"]
