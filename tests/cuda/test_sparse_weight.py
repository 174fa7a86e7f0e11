"""The CUDA kernels of the low-rank + sparse weight against the float64 formula, and as torch ops."""

from __future__ import annotations

import pytest
import torch
from cuda_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, MODES
from lowrank_sparse_problems import EVERY_WEIGHT, LAYOUTS, WeightCase, dense_weight
from torch import Tensor
from tucker2_problems import relative

from tensorcomp_ext import _native
from tensorcomp_ext.nn import FactorizedLinear
from tensorcomp_ext.ops import lowrank_sparse_weight
from tensorcomp_ext.ops.lowrank_sparse_weight import native_support

dtypes = pytest.mark.parametrize("dtype", MODES)
modes = pytest.mark.parametrize("mode", ["additive", "masking"])
LARGE = [WeightCase(m=1000, n=1500, rank=204, kept=0.1, bits=bits) for bits in (False, True)]
LAID_OUT = [c.but(layout=layout) for layout in LAYOUTS[1:] for c in EVERY_WEIGHT[::5]]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def check(case: WeightCase, mode: str, dtype: str, device: str) -> None:
    """W and every gradient, twice the same bits."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    tensors = leaves(case.make(MODES[dtype], device))
    support = native_support(*tensors[:2])
    if not support.ok:
        pytest.skip(support.reason)
    dw = torch.randn(case.m, case.n, device=device).to(MODES[dtype])
    runs = []
    for _ in range(2):
        w = lowrank_sparse_weight(*tensors, mode=mode, backend="native")
        runs.append((w, *torch.autograd.grad(w, tensors[:3], dw)))
    assert all(map(torch.equal, *runs))
    exact = leaves([t.double() if t.is_floating_point() else t for t in tensors])
    expected = dense_weight(*exact, mode)
    assert relative(runs[0][0].detach(), expected.detach()) <= FORWARD_TOLERANCE[dtype]
    for ours, right in zip(runs[0][1:], torch.autograd.grad(expected, exact[:3], dw.double()), strict=True):
        assert relative(ours, right) <= GRADIENT_TOLERANCE[dtype]


@dtypes
@modes
@pytest.mark.parametrize("case", [*EVERY_WEIGHT, *LAID_OUT, *LARGE], ids=str)
def test_cases(cuda: str, case: WeightCase, mode: str, dtype: str) -> None:
    check(case, mode, dtype, cuda)


@modes
def test_captured_in_a_graph(cuda: str, mode: str) -> None:
    """Forward and backward op; other numbers in the same memory give another weight."""
    a, b, values, mask = LARGE[1].make(torch.bfloat16, cuda)
    ops, masking = torch.ops.tensorcomp, mode == "masking"

    def call() -> tuple[Tensor, ...]:
        w = ops.lowrank_sparse_weight(a, b, values, mask, masking)
        return w, *ops.lowrank_sparse_weight_backward(values, a, b, mask, masking, 7)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    values.copy_(torch.randn_like(values))
    graph.replay()
    for once, again in zip(found, call(), strict=True):
        assert torch.equal(once, again)


def test_memory(cuda: str) -> None:
    """Beside W, its gradient and what was asked for there is no other tensor of that size."""
    m = n = 2048
    a, b, values, mask = leaves(WeightCase(m=m, n=n, rank=16, bits=True).make(torch.float32, cuda))
    w = lowrank_sparse_weight(a, b, values, mask, mode="masking")
    dw = torch.randn_like(w)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(w, (a, b), dw)
    assert torch.cuda.max_memory_allocated() - before < m * n * 4 / 2


@pytest.mark.parametrize("mode", ["additive", "masking"])
def test_compiles_and_checks(cuda: str, mode: str) -> None:
    tensors = leaves(WeightCase(m=40, n=64, bits=True).make(torch.float32, cuda))
    torch.library.opcheck(torch.ops.tensorcomp.lowrank_sparse_weight.default, (*tensors, mode == "masking"))
    compiled = torch.compile(lambda *t: lowrank_sparse_weight(*t, mode=mode) + 1, fullgraph=True)
    assert relative(compiled(*tensors).detach(), dense_weight(*tensors, mode).detach() + 1) <= 1e-5


def test_a_layer_in_training(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers take to the kernel."""
    monkeypatch.setattr(_native, "TRIED_DEVICES", ("cpu", "cuda"))
    torch.manual_seed(0)
    layer = FactorizedLinear(96, 64, format="lowrank_sparse", rank=8).to(cuda)
    layer.plan = "dense"
    x = torch.randn(5, 96, device=cuda)
    layer(x).square().sum().backward()
    twin = FactorizedLinear(96, 64, format="lowrank_sparse", rank=8)
    twin.load_state_dict(layer.state_dict())
    twin.double()(x.double().cpu()).square().sum().backward()
    for (name, ours), (_, theirs) in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative(ours.grad.cpu(), theirs.grad) <= 1e-4, name
