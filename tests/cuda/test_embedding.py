"""The CUDA kernels of embeddings against the float64 oracle: tables, layouts, skewed indices, bags."""

from __future__ import annotations

import pytest
import torch
from cuda_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE
from embedding_problems import CORE_LAYOUTS, EMBEDDING_CASES, EmbeddingCase
from torch import Tensor
from torch.nn import functional as F
from tucker2_problems import relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import ttm_embedding, ttm_embedding_bag
from tensorcomp_ext.ops._cuda import embedding_support

MODES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
modes = pytest.mark.parametrize("mode", MODES)
LARGE = EmbeddingCase((100, 100, 100), (4, 4, 4), (1, 16, 16), 0, (4096,))
RING = EmbeddingCase((32, 32, 32), (8, 8, 8), (32, 32, 32), 0, (64,))


def padding_of(case: EmbeddingCase) -> int | None:
    return None if case.padding < 0 else case.padding


def check(case: EmbeddingCase, mode: str, device: str, indices: Tensor | None = None) -> None:
    cores = [c.requires_grad_() for c in case.cores(MODES[mode], device)]
    support = embedding_support(torch.zeros(1, device=device), cores)
    if not support.ok:
        pytest.skip(support.reason)
    indices = case.indices(device) if indices is None else indices.to(device)
    options = {"num_embeddings": case.rows, "padding_idx": padding_of(case)}
    y = ttm_embedding(indices, cores, **options, backend="native")
    grad = torch.randn(y.shape).to(y)
    found = torch.autograd.grad(y, cores, grad)
    exact = [c.detach().double().requires_grad_() for c in cores]
    expected = reference.ttm_embedding(indices, exact, case.rows, padding_of(case))
    assert y.dtype == MODES[mode] and relative(y.detach(), expected.detach()) <= FORWARD_TOLERANCE[mode]
    wanted = torch.autograd.grad(expected, exact, grad.double())
    again = torch.autograd.grad(ttm_embedding(indices, cores, **options), cores, grad)
    for gradient, twice, right in zip(found, again, wanted, strict=True):
        assert relative(gradient, right) <= GRADIENT_TOLERANCE[mode]
        assert torch.equal(gradient, twice)


@modes
@pytest.mark.parametrize("case", [*EMBEDDING_CASES, LARGE, RING], ids=str)
def test_cases(cuda: str, case: EmbeddingCase, mode: str) -> None:
    check(case, mode, cuda)


@modes
@pytest.mark.parametrize("layout", CORE_LAYOUTS)
def test_layouts(cuda: str, layout: str, mode: str) -> None:
    check(EmbeddingCase(layout=layout, ranks=(3, 2, 4), integers=torch.int32), mode, cuda)


@modes
def test_skewed_indices(cuda: str, mode: str) -> None:
    """Most rows share their slices."""
    case = EmbeddingCase(shape=(5000,))
    check(case, mode, cuda, torch.where(torch.rand(5000) < 0.9, 17, case.indices()))
    check(case, mode, cuda, torch.full((5000,), 3))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(cuda: str, mode: str) -> None:
    case = EmbeddingCase(shape=(6, 5), padding=3)
    cores, indices = case.cores(device=cuda), case.indices(cuda)
    y = ttm_embedding_bag(indices, cores, num_embeddings=case.rows, mode=mode, padding_idx=3)
    table = case.table([c.double().cpu() for c in cores])
    expected = F.embedding_bag(indices.cpu(), table, mode=mode, padding_idx=3)
    assert relative(y.cpu(), expected) <= FORWARD_TOLERANCE["float32"]


@modes
def test_captured_in_a_graph(cuda: str, mode: str) -> None:
    """Forward and backward op; other indices in the same memory give other rows."""
    cores, indices = LARGE.cores(MODES[mode], cuda), LARGE.indices(cuda)
    grad = torch.randn(*LARGE.shape, LARGE.dim).to(cores[0])
    ops = torch.ops.tensorcomp

    def call() -> tuple[Tensor, ...]:
        y = ops.ttm_embedding(indices, cores, LARGE.rows)
        return y, *ops.ttm_embedding_backward(grad, indices, cores, LARGE.rows, -1, 7)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    indices.copy_(LARGE.indices(cuda))
    graph.replay()
    for once, again in zip(found, call(), strict=True):
        assert torch.equal(once, again)
