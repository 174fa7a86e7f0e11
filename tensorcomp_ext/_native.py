"""Finds and loads the native op library, once, and remembers why when it cannot."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

_LIBRARY = Path(__file__).with_name("_ops.so")
_CUDA_LIBRARY = Path(__file__).with_name("_ops_cuda.so")
_OLDEST_TORCH = (2, 10)
TRIED_DEVICES = ("cpu",)
"""Types of device that the package's own kernels have run on in its tests.

Elsewhere a layer runs such kernels where ``tune`` has compared their results with the library's, or where it
is told to; ops that are called directly run them.
"""
_REBUILD = "rebuild with `pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree"


class Support(NamedTuple):
    """Whether something can serve, and in words why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _load(library: Path) -> Support:
    if _torch_version() < _OLDEST_TORCH:
        return Support(False, f"torch >= 2.10 is needed for the native code, found {torch.__version__}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return Support(
            False, f"{library.name} does not load under torch {torch.__version__} ({error}); {_REBUILD}"
        )
    return Support(True)


def _shadowed() -> Path | None:
    """An installed package with native code that this one, a source tree without, hides from Python."""
    for entry in sys.path:
        other = Path(entry or ".").resolve() / _LIBRARY.parent.name / _LIBRARY.name
        if other.exists() and other != _LIBRARY.resolve():
            return other.parent
    return None


def _load_cpu() -> Support:
    if os.environ.get("TENSORCOMP_NATIVE", "1") == "0":
        return Support(False, "native code is switched off by TENSORCOMP_NATIVE=0")
    if sys.byteorder != "little":
        return Support(False, "the native kernels need a little-endian machine")
    if not _LIBRARY.exists() and (installed := _shadowed()) is not None:
        reason = (
            f"{_LIBRARY.parent} is a source tree without native code and hides the package installed at "
            f"{installed}: leave the folder, or install with `pip install --no-build-isolation -e .`"
        )
        warnings.warn(f"tensorcomp_ext: native code is off: {reason}", RuntimeWarning, stacklevel=2)
        return Support(False, reason)
    if not _LIBRARY.exists():
        return Support(False, f"the package was installed without native code; {_REBUILD}")
    loaded = _load(_LIBRARY)
    if not loaded.ok:
        warnings.warn(f"tensorcomp_ext: native code is off: {loaded.reason}", RuntimeWarning, stacklevel=2)
    return loaded


def _load_cuda() -> Support:
    if not _CPU.ok:
        return _CPU
    if torch.version.cuda is None:
        built = (
            f"; {_CUDA_LIBRARY.name} is built and waits for one that has" if _CUDA_LIBRARY.exists() else ""
        )
        return Support(False, f"this torch has no CUDA{built}")
    if not _CUDA_LIBRARY.exists():
        return Support(False, f"the package was built without CUDA; set TENSORCOMP_CUDA=1 and {_REBUILD}")
    loaded = _load(_CUDA_LIBRARY)
    if not loaded.ok:
        warnings.warn(f"tensorcomp_ext: CUDA code is off: {loaded.reason}", RuntimeWarning, stacklevel=2)
    return loaded


# Decided at import: a plain global also stays readable to torch.compile's tracing.
_CPU = _load_cpu()
_CUDA = _load_cuda()


def outdated(op: str) -> None:
    """Switch native code off, with one warning: the library is of other sources, its ``op`` differs."""
    global _CPU, _CUDA
    if _CPU.ok:
        reason = f"{_LIBRARY.name} was built of other sources, its op {op} takes other arguments; {_REBUILD}"
        warnings.warn(f"tensorcomp_ext: native code is off: {reason}", RuntimeWarning, stacklevel=2)
        _CPU = _CUDA = Support(False, reason)


def status() -> Support:
    """Whether the CPU op library is loaded, and why not."""
    return _CPU


def cuda_status() -> Support:
    """Whether the CUDA op library is loaded, and why not."""
    return _CUDA
