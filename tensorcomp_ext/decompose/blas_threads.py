"""Threads of SciPy's BLAS in small problems."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from threadpoolctl import ThreadpoolController

# Up to this size a second thread saves nothing of an eigenproblem on a quiet machine.
ONE_THREAD_SIZE = 1024


@functools.cache
def _controller() -> ThreadpoolController:
    # Looking through the loaded libraries takes a millisecond; SciPy's is there since this package's import.
    return ThreadpoolController()


_lock = threading.Lock()
_limits = ExitStack()
_inside = 0


@contextmanager
def blas_threads(size: int) -> Iterator[None]:
    """One BLAS thread in an eigenproblem or SVD of a small `size`, as many as before in a large one.

    OpenBLAS waits for its threads by spinning: where another process holds one of the cores, eigenvectors of
    256 x 256 take a second in place of ten milliseconds.
    """
    if size > ONE_THREAD_SIZE:
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


# The number is the process's: of several threads of Python the last to leave restores it.
def _enter() -> None:
    global _inside
    with _lock:
        if _inside == 0:
            _limits.enter_context(_controller().limit(limits=1, user_api="blas"))
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            _limits.close()
