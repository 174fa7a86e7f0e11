"""The CUDA ops in the emulator, on CPU tensors: bindings and kernels where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# Test folders are not packages; the problems of the op and CUDA tests serve here too.
sys.path[:0] = [str(HERE), str(HERE.parent / "ops"), str(HERE.parent / "cuda")]

from emulated_build import ROOT, NoCompiler, emulated_library  # noqa: E402
from emulated_problems import NAMESPACE, OPS, mallopt  # noqa: E402


@pytest.fixture(scope="session")
def emulated() -> Iterator[Any]:
    """``torch.ops.tensorcomp_emulated``: the CUDA ops on CPU tensors. A compiler error fails every test."""
    try:
        path = emulated_library(ROOT / "build" / "cuda-emulated")
    except NoCompiler as reason:
        pytest.skip(str(reason))
    namespace = torch.library.Library(NAMESPACE, "FRAGMENT")
    for op in OPS:
        schema = str(getattr(torch.ops.tensorcomp, op).default._schema)
        namespace.define(op + schema[schema.index("(") :])
    torch.ops.load_library(str(path))
    yield getattr(torch.ops, NAMESPACE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle in one thread, as the emulator is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """What a kernel leaves out of its results or reads of its scratch before it wrote shows as NaN."""
    with mallopt(0xFF):
        yield
