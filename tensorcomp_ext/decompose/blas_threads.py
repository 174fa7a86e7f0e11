"""Threads of SciPy's BLAS in small problems."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

from threadpoolctl import ThreadpoolController

# Up to this size a second thread saves nothing of an eigenproblem on a quiet machine.
ONE_THREAD_SIZE = 1024


@functools.cache
def _controller() -> ThreadpoolController:
    # Looking through the loaded libraries takes a millisecond; SciPy's is there since this package's import.
    return ThreadpoolController()


def blas_threads(size: int) -> AbstractContextManager[object]:
    """One BLAS thread in an eigenproblem or SVD of a small `size`, as many as before in a large one.

    OpenBLAS waits for its threads by spinning: where another process holds one of the cores, eigenvectors of
    256 x 256 take a second in place of ten milliseconds.
    """
    return _controller().limit(limits=1, user_api="blas") if size <= ONE_THREAD_SIZE else nullcontext()
