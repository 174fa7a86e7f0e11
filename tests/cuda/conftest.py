"""Fixtures of the CUDA tests: the device, and where to find the problems that other folders share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tensorcomp_ext import _native

HERE = Path(__file__).parent
# Test folders are not packages; the problems of the op tests serve here too.
sys.path[:0] = [str(HERE), str(HERE.parent / "ops")]


@pytest.fixture
def cuda() -> Iterator[str]:
    """The device, with room of its own: memory of earlier tests goes back to the allocator first."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _native.cuda_status().ok:
        pytest.skip(_native.cuda_status().reason)
    yield "cuda"
    torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured rates of a test run stay out of the user's cache directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORCOMP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    """Float32 is float32 unless a test switches TF32 on: torch's own default allows it in convolutions."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = before
