"""Functional ops, also reachable as ``torch.ops.tensorcomp.<name>``."""

from .._native import Support
from .tucker2_conv import tucker2_conv2d
from .tucker2_core_pack import tucker2_core_pack

__all__ = ["Support", "tucker2_conv2d", "tucker2_core_pack"]
