"""Warnings that point at the caller's line, however deep in the package their cause was found."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

# torch's frames lie between where a decorator, a hook or a module's call leads through it.
_INSIDE = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


def warn(message: str | Warning) -> None:
    """A ``UserWarning``, or the warning itself, of the innermost line that is neither ours nor torch's."""
    # warnings.warn has skip_file_prefixes from Python 3.12 on.
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth + 1)
