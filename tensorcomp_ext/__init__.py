"""Low-rank tensor compression of PyTorch networks that runs as fast as its operation count says."""

from . import ops
from ._native import Support

__all__ = ["Support", "ops"]
