"""How a weight is stored: one class a format, registered by name."""

from .base import Format, Rank, format_names, get_format, register_format
from .forms import BottleneckConv, Form, Network, TapNetwork, TwoFactor
from .svd import SVD
from .tucker2 import Tucker2

__all__ = [
    "SVD",
    "BottleneckConv",
    "Form",
    "Format",
    "Network",
    "Rank",
    "TapNetwork",
    "Tucker2",
    "TwoFactor",
    "format_names",
    "get_format",
    "register_format",
]
