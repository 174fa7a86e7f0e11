"""Low-rank tensor compression of PyTorch networks that runs as fast as its operation count says.

    >>> import torch, tensorcomp_ext as tc
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU())
    >>> x = torch.randn(1, 16, 8, 8)
    >>> result = tc.compress(model, rank=(8, 6), example_inputs=x)
    >>> result.model(x).shape
    torch.Size([1, 32, 8, 8])

The package ``compress`` and the function ``tc.compress`` share a name: import from the former as
``from tensorcomp_ext.compress.report import Report``.
"""

from importlib import metadata

from . import data, decompose, formats, models, nn, ops, plan, ranks, recipes, reference
from ._native import Support
from .compress import compress, fold, load, save
from .plan import tune

try:
    __version__ = metadata.version("tensorcomp_ext")
except metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "source"

__all__ = [
    "Support",
    "__version__",
    "compress",
    "data",
    "decompose",
    "fold",
    "formats",
    "load",
    "models",
    "nn",
    "ops",
    "plan",
    "ranks",
    "recipes",
    "reference",
    "save",
    "tune",
]
