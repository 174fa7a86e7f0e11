"""Pure-PyTorch oracles: every native op in a form written for reading.

They serve where there is no native build and they are what the tests compare with. They import torch only,
work in any floating dtype (float64 included) on any device, and are differentiable twice.
"""

from .tucker2_conv import tucker2_conv2d

__all__ = ["tucker2_conv2d"]
