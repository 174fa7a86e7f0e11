"""Packing of a Tucker-2 core, on every device there is."""

from __future__ import annotations

import pytest
import torch

from tensorcomp_ext import _native
from tensorcomp_ext.ops.tucker2_core_pack import tucker2_core_pack
from tensorcomp_ext.reference.tucker2_core_pack import tucker2_core_pack as oracle

DEVICES = ["cpu", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 1), (7, 5, 3, 3), (17, 31, 1, 3), (64, 33, 5, 2), (0, 4, 3, 3)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not _native.cuda_status().ok:
        pytest.skip(_native.cuda_status().reason)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    core = torch.randn(shape).to(device, dtype)
    packed = tucker2_core_pack(core)
    assert packed.is_contiguous() and packed.device == core.device
    assert torch.equal(packed, oracle(core))
    for index in [(0, 0, 0, 0), tuple(size - 1 for size in shape)] if core.numel() else []:
        b, a, y, x = index
        assert packed[y, x, a, b] == core[b, a, y, x]


def test_reads_any_strides(device: str) -> None:
    larger = torch.randn(9, 12, 5, 6, device=device)
    for core in (larger[1::2, 2:9, :3, 1:4], larger.permute(3, 2, 0, 1), larger[:1].expand(4, 12, 5, 6)):
        assert torch.equal(tucker2_core_pack(core), oracle(core))


def test_never_returns_its_input(device: str) -> None:
    packed = torch.randn(3, 3, 4, 7, device=device)
    again = tucker2_core_pack(packed.permute(3, 2, 0, 1))
    assert torch.equal(again, packed)
    assert again.data_ptr() != packed.data_ptr()


def test_opcheck(device: str) -> None:
    core = torch.randn(7, 5, 3, 2, device=device)
    torch.library.opcheck(torch.ops.tensorcomp.tucker2_core_pack.default, (core,))


def test_rejects_what_is_no_core() -> None:
    with pytest.raises(ValueError, match=r"core must be \[R_out, R_in, kH, kW\], got \[3, 4\]"):
        tucker2_core_pack(torch.randn(3, 4))
    with pytest.raises(TypeError, match="core must be a tensor, got list"):
        tucker2_core_pack([[1.0]])  # type: ignore[arg-type]
