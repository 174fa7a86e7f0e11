"""What low-rank + sparse weights and layers hand to their CUDA ops, seen through fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lowrank_sparse_problems import WeightCase, dense_weight
from test_cuda_calls import MATMUL, Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tucker2_problems import relative

from tensorcomp_ext import _native
from tensorcomp_ext.formats import SVD, LowRankSparse
from tensorcomp_ext.ops import lowrank_sparse_weight
from tensorcomp_ext.ops._lowrank_sparse_weight_autograd import native_weight
from tensorcomp_ext.ops.lowrank_sparse_linear import native_support as linear_support
from tensorcomp_ext.ops.lowrank_sparse_weight import native_support


def fake_weight(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """a, b, values and the mask, under a fake mode."""
    made = [torch.empty(shape, dtype=dtype, device="cuda") for shape in ((9, 3), (3, 13), (9, 13))]
    return [*made, torch.empty(9, 13, dtype=torch.bool, device="cuda")]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the CUDA library is loaded; TF32 is afterwards as it was before."""
    monkeypatch.setattr(_native, "cuda_status", lambda: _native.Support(True))
    before = MATMUL.allow_tf32
    yield
    MATMUL.allow_tf32 = before


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tf32_is_as_torch_allows_it(dtype: torch.dtype) -> None:
    for allowed in (True, False):
        MATMUL.allow_tf32 = allowed
        with FakeTensorMode():
            tensors = fake_weight(dtype)
            with Recorder() as recorder:
                w = lowrank_sparse_weight(*tensors, mode="additive", backend="native")
        assert w.dtype == dtype and w.is_cuda
        assert recorder.calls["lowrank_sparse_weight"]["allow_tf32"] is (allowed and dtype == torch.float32)


@pytest.mark.parametrize("allowed", [True, False])
def test_backward_has_what_forward_had(allowed: bool) -> None:
    """On the CPU, whose kernels take the argument and let it be."""
    a, b, values, mask = WeightCase().make()
    with Recorder() as recorder:
        w = native_weight(a.requires_grad_(), b, values, mask, True, allowed)
        torch.autograd.grad(w.sum(), a)
    forward, backward = (recorder.calls[f"lowrank_sparse_weight{end}"] for end in ("", "_backward"))
    assert forward["allow_tf32"] is backward["allow_tf32"] is allowed
    assert backward["output_mask"] == 0b1 and backward["masking"] is True


def test_native_support_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _native.Support(False, "the CUDA library is on holiday")
    with FakeTensorMode():
        a, b, *_ = fake_weight()
        monkeypatch.setattr(_native, "cuda_status", lambda: missing)
        assert native_support(a, b) == missing
        monkeypatch.setattr(_native, "cuda_status", lambda: _native.Support(True))
        assert native_support(a, b).ok
        assert "not torch.float64" in native_support(a.double(), b.double()).reason
        empty = torch.empty(0, 3, device="cuda")
        assert native_support(empty, b).reason == "the weight is empty"
    meta = torch.empty(3, 2, device="meta")
    assert native_support(meta, meta).reason == "there is no native lowrank_sparse_weight for device 'meta'"


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_a_weight_is_rebuilt_by_kernels_that_have_run(
    mode: Any, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, in the place of a device on which they have not."""
    monkeypatch.setattr(_native, "TRIED_DEVICES", ("cpu",) if tried else ())
    a, b, values, mask = WeightCase().make()
    for low, expected in ((SVD(a, b), dense_weight(a, b, values, mask, mode)), (None, values * mask)):
        weight = LowRankSparse(low, values, mask, mode=mode if low else "additive")
        with Recorder() as recorder:
            w = weight.to_dense()
        assert ("lowrank_sparse_weight" in recorder.calls) is tried
        assert relative(w.detach(), expected) <= 1e-6


@pytest.mark.usefixtures("library")
def test_which_layers_the_kernels_take() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 8, 100, device="cuda")
        a, b = torch.empty(50, 6, device="cuda"), torch.empty(6, 100, device="cuda")
        assert linear_support(x, a, b).ok
        assert linear_support(x, a, b, 32).ok
        refused = linear_support(x, a, b, 33)
        assert (
            not refused.ok and "is for up to 32 rows, not 33: with more of them the dense" in refused.reason
        )
        assert linear_support(torch.empty(3, 11, 100, device="cuda"), a, b) == refused
        wide = torch.empty(6, 100_000, device="cuda")
        refused = linear_support(torch.empty(1, 100_000, device="cuda"), a, wide)
        assert not refused.ok and "100000 columns and rank 6 do not fit" in refused.reason
        assert "not torch.float64" in linear_support(x.double(), a.double(), b.double()).reason
        none = torch.empty(0, 6, device="cuda")
        assert linear_support(x, none, b).reason == "there are no features to multiply"


@pytest.mark.native
def test_how_many_rows_fit() -> None:
    """A row's columns and ranks in float32 are the least that a block holds."""
    fits = torch.ops.tensorcomp.cuda_fits_sparse
    assert fits(1000, 24, 4096) == fits(0, 0, 0) == 32
    assert fits(1000, 25, 4096) == fits(2**62, 2**62, 4096) == 0
    with pytest.raises(RuntimeError, match="columns and rank must be >= 0, got -1 and 2"):
        fits(-1, 2, 4096)
