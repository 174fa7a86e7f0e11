"""The TTM and TR-matrix embedding against the dense table, and as a citizen of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from embedding_problems import CORE_LAYOUTS, EMBEDDING_CASES, EmbeddingCase
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import ttm_embedding
from tensorcomp_ext.ops.ttm_embedding import native_support

OPS = torch.ops.tensorcomp
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def by_function(case: EmbeddingCase, indices: Tensor, cores: list[Tensor], **options: Any) -> Tensor:
    padding = None if case.padding < 0 else case.padding
    return ttm_embedding(indices, cores, num_embeddings=case.rows, padding_idx=padding, **options)


def by_op(case: EmbeddingCase, indices: Tensor, cores: list[Tensor]) -> Tensor:
    return OPS.ttm_embedding(indices, cores, case.rows, case.padding)


WAYS = {"function": by_function, "op": by_op}
every_way = pytest.mark.parametrize("way", WAYS)
every_case = pytest.mark.parametrize("case", EMBEDDING_CASES, ids=str)
LAID_OUT = [case.but(layout=layout) for layout in CORE_LAYOUTS[1:] for case in EMBEDDING_CASES[::4]]
every_layout = pytest.mark.parametrize("case", [*EMBEDDING_CASES, *LAID_OUT], ids=str)


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def leaves(cores: list[Tensor]) -> list[Tensor]:
    return [core.detach().requires_grad_() for core in cores]


def table_gradients(case: EmbeddingCase, indices: Tensor, cores: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The gradients of the cores in float64, by way of the dense table."""
    wide = [core.detach().cpu().double().requires_grad_() for core in cores]
    y = case.table(wide)[indices.cpu().long()]
    return list(
        torch.autograd.grad(y, wide, dy.detach().cpu().double(), allow_unused=True, materialize_grads=True)
    )


@every_case
def test_the_oracle_is_the_dense_table(case: EmbeddingCase) -> None:
    cores, indices = case.cores(torch.float64), case.indices()
    padding = None if case.padding < 0 else case.padding
    y = reference.ttm_embedding(indices, cores, case.rows, padding)
    assert y.shape == (*case.shape, case.dim)
    assert relative(y, case.table(cores)[indices.long()]) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_layout
def test_matches_reference(case: EmbeddingCase, dtype: torch.dtype, isa: str, device: str) -> None:
    cores, indices = case.cores(dtype, device), case.indices(device)
    expected = case.table([core.cpu().double() for core in cores])[indices.cpu().long()]
    for name, way in WAYS.items():
        y = way(case, indices, cores)
        assert y.dtype == dtype and y.is_contiguous() and y.shape == (*case.shape, case.dim)
        assert relative(y.cpu(), expected) <= 2 * FORWARD_TOLERANCE[dtype], name


@every_way
@every_layout
def test_gradients(case: EmbeddingCase, way: str, isa: str, device: str) -> None:
    cores, indices = leaves(case.cores(device=device)), case.indices(device)
    y = WAYS[way](case, indices, cores)
    dy = torch.randn(y.shape[::-1], device=device).permute(*range(y.dim())[::-1])
    expected = table_gradients(case, indices, cores, dy)
    for k, found in enumerate(torch.autograd.grad(y, cores, dy)):
        assert found.shape == cores[k].shape
        assert relative(found.cpu(), expected[k]) <= GRADIENT_TOLERANCE[torch.float32], k


@every_case
def test_gradients_of_bfloat16(case: EmbeddingCase, isa: str, device: str) -> None:
    cores, indices = leaves(case.cores(torch.bfloat16, device)), case.indices(device)
    y = by_function(case, indices, cores)
    dy = torch.randn(y.shape, device=device).bfloat16()
    expected = table_gradients(case, indices, cores, dy)
    for k, found in enumerate(torch.autograd.grad(y, cores, dy)):
        assert found.dtype == torch.bfloat16
        assert relative(found.cpu(), expected[k]) <= GRADIENT_TOLERANCE[torch.bfloat16], k


def test_only_the_gradients_asked_for(device: str) -> None:
    case = EmbeddingCase()
    cores, indices = case.cores(device=device), case.indices(device)
    dy = torch.randn(*case.shape, case.dim, device=device)
    expected = table_gradients(case, indices, cores, dy)
    for mask in range(8):
        found = OPS.ttm_embedding_backward(dy, indices, cores, case.rows, -1, mask)
        for k, gradient in enumerate(found):
            wanted = bool(mask >> k & 1)
            assert gradient.shape == (cores[k].shape if wanted else (0,))
            assert not wanted or relative(gradient.cpu(), expected[k]) <= 1e-5
        ours = [c.detach().requires_grad_(bool(mask >> k & 1)) for k, c in enumerate(cores)]
        y = by_function(case, indices, ours)
        assert y.requires_grad == bool(mask)
        if mask:
            y.backward(dy)
        assert [c.grad is not None for c in ours] == [bool(mask >> k & 1) for k in range(3)]


@every_way
@pytest.mark.parametrize("ring", [1, 2])
def test_float64_derivatives(way: str, ring: int) -> None:
    case = EmbeddingCase((2, 3), (2, 2), (ring, 2), 1, (5,), padding=2)
    indices = case.indices()

    def call(*cores: Tensor) -> Tensor:
        return WAYS[way](case, indices, list(cores))

    cores = leaves(case.cores(torch.float64))
    assert torch.autograd.gradcheck(call, cores)
    assert torch.autograd.gradgradcheck(call, cores)


def test_float32_gradients_can_be_differentiated(device: str) -> None:
    case = EmbeddingCase()
    indices = case.indices(device)

    def squared(cores: list[Tensor]) -> Tensor:
        y = by_function(case, indices, cores)
        (first,) = torch.autograd.grad((y**2).sum(), cores[0], create_graph=True)
        return torch.autograd.grad((first**2).sum(), cores[1])[0]

    cores = leaves(case.cores(device=device))
    assert relative(squared(cores).cpu(), squared(leaves([c.cpu().double() for c in cores]))) <= 1e-4


@every_case
def test_opcheck(case: EmbeddingCase, device: str) -> None:
    cores, indices = case.cores(device=device), case.indices(device)
    arguments = (indices, leaves(cores), case.rows, case.padding)
    torch.library.opcheck(OPS.ttm_embedding.default, arguments)
    dy = torch.randn(*case.shape, case.dim, device=device)
    for mask in (2 ** len(cores) - 1, 1):
        torch.library.opcheck(
            OPS.ttm_embedding_backward.default,
            (dy, indices, cores, case.rows, case.padding, mask),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@every_case
def test_fake_results_have_the_form_of_real_ones(case: EmbeddingCase, device: str) -> None:
    cores, indices = case.cores(device=device), case.indices(device)
    real = OPS.ttm_embedding(indices, cores, case.rows, case.padding)
    with FakeTensorMode() as mode:
        fake = OPS.ttm_embedding(
            mode.from_tensor(indices), [mode.from_tensor(c) for c in cores], case.rows, case.padding
        )
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@every_way
def test_compiles_whole_with_any_batch(way: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    case = EmbeddingCase(padding=4)
    cores = leaves(case.cores(device=device))
    call = torch.compile(
        lambda indices: WAYS[way](case, indices, cores), backend=counter, fullgraph=True, dynamic=True
    )
    for size in (13, 8, 21):
        indices = case.but(shape=(size,)).indices(device)
        y = call(indices)
        assert relative(y.detach(), by_function(case, indices, cores).detach()) <= 1e-6
        found = torch.autograd.grad(y.sum(), cores)
        expected = torch.autograd.grad(by_function(case, indices, cores).sum(), cores)
        assert all(relative(f, e) <= 1e-5 for f, e in zip(found, expected, strict=True))
    assert counter.frame_count == 1


class Rows(torch.nn.Module):
    def __init__(self, case: EmbeddingCase) -> None:
        super().__init__()
        self.case = case
        self.cores = torch.nn.ParameterList(case.cores())

    def forward(self, indices: Tensor) -> Tensor:
        return by_function(self.case, indices, list(self.cores))


def test_exports() -> None:
    module = Rows(EmbeddingCase())
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (module.case.indices(),), dynamic_shapes=({0: batch},))
    indices = module.case.but(shape=(11, 3)).indices()
    assert torch.equal(program.module()(indices), module(indices))


def test_function_transforms(device: str) -> None:
    case = EmbeddingCase(shape=(4, 6))
    cores, indices = case.cores(device=device), case.indices(device)
    y = by_function(case, indices, cores)
    assert relative(vmap(lambda i: by_function(case, i, cores))(indices), y) <= 1e-6
    stacked = torch.stack([cores[0], 2 * cores[0]])
    both = vmap(lambda first: by_function(case, indices, [first, *cores[1:]]))(stacked)
    assert relative(both, torch.stack([y, 2 * y])) <= 1e-6
    found = grad(lambda first: by_function(case, indices, [first, *cores[1:]]).sum())(cores[0])
    expected = table_gradients(case, indices, cores, torch.ones_like(y))[0]
    assert relative(found.cpu(), expected) <= 1e-5
    value, tangent = jvp(
        lambda first: by_function(case, indices, [first, *cores[1:]]), (cores[0],), (cores[0],)
    )
    assert relative(value, y) <= 1e-6 and relative(tangent, y) <= 1e-6
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(cores[0], cores[0])
        seen = forward_ad.unpack_dual(by_function(case, indices, [dual, *cores[1:]])).tangent
        assert seen is not None and relative(seen, y) <= 1e-6
    module = Rows(case).to(device)
    named = dict(module.named_parameters())
    assert relative(functional_call(module, named, (indices,)), module(indices)) <= 1e-6


@every_way
def test_autocast_changes_nothing(way: str) -> None:
    """As for torch.nn.Embedding: rows come in the dtype of the weights."""
    case = EmbeddingCase()
    indices = case.indices()
    for dtype in (torch.float32, torch.float64):
        cores = case.cores(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = WAYS[way](case, indices, cores)
        assert y.dtype == dtype and torch.equal(y, WAYS[way](case, indices, cores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_reproducible(isa: str, dtype: torch.dtype) -> None:
    case = EmbeddingCase((20, 30, 25), (4, 4, 4), (1, 16, 16), 7, (3000,))
    cores, indices = leaves(case.cores(dtype)), case.indices()
    dy = torch.randn(3000, 64).to(dtype)
    first = by_function(case, indices, cores)
    gradients = torch.autograd.grad(first, cores, dy)
    for _ in range(3):
        again = by_function(case, indices, cores)
        assert torch.equal(first, again)
        assert all(map(torch.equal, gradients, torch.autograd.grad(again, cores, dy)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_batches(isa: str, threads: int) -> None:
    """Enough rows for every thread, most of them repeated, at several thread counts."""
    case = EmbeddingCase((9, 11, 10), (4, 2, 8), (1, 16, 13), 40, (5000,), padding=17)
    cores, indices = leaves(case.cores()), case.indices()
    indices[1000:3000] = indices[0]
    dy = torch.randn(5000, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = by_function(case, indices, cores)
        found = torch.autograd.grad(y, cores, dy)
    finally:
        torch.set_num_threads(before)
    assert relative(y, case.table([c.detach().double() for c in cores])[indices]) <= 1e-5
    expected = table_gradients(case, indices, cores, dy)
    assert all(relative(f, e) <= 1e-4 for f, e in zip(found, expected, strict=True))
    assert (y[indices == 17] == 0).all()


def test_a_padding_row_hides_what_is_not_finite(isa: str) -> None:
    case = EmbeddingCase(padding=0, shape=(50,))
    cores, indices = leaves(case.cores()), case.indices()
    with torch.no_grad():
        cores[2][0, 0, 0, 0] = torch.nan  # reached by every index with the last digit 0
    indices[indices % 4 == 0] = 0
    y = by_function(case, indices, cores)
    assert y.isfinite().all() and (y[indices == 0] == 0).all()
    y.sum().backward()
    assert all(core.grad is not None and core.grad.isfinite().all() for core in cores)


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("wrong", [-1, 57, 60, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range(way: str, dtype: torch.dtype, integers: torch.dtype, wrong: int) -> None:
    case = EmbeddingCase(integers=integers)
    cores, indices = case.cores(dtype), case.indices()
    indices[2, 1] = wrong
    with pytest.raises(IndexError, match=rf"ttm_embedding: indices must be in \[0, 57\), got {wrong}$"):
        WAYS[way](case, indices, cores)


def test_arguments() -> None:
    case = EmbeddingCase()
    a, b, c = case.cores()
    i = case.indices()

    def said(indices: Any = i, cores: Any = (a, b, c), rows: Any = 57, **options: Any) -> str:
        return raised(lambda: ttm_embedding(indices, cores, num_embeddings=rows, **options))[1]

    assert "indices must be int64 or int32, got torch.float32" in said(i.float())
    assert "indices must be a tensor, got list" in said([1])
    assert "cores must be a list or tuple" in said(cores=()) and "cores must be a list" in said(cores=a)
    assert "cores[1] must be a tensor, got int" in said(cores=(a, 3, c))
    assert "cores[1] must be [r, vocab_k, dim_k, r'] with r = 4, got [5, 5, 3, 5]" in said(
        cores=(a, torch.ones(5, 5, 3, 5), c)
    )
    assert "cores[0] must be [r, vocab_k, dim_k, r'] with no empty mode, got [3, 2, 4]" in said(
        cores=(a[0], b, c)
    )
    assert "cores[2] must be [r, vocab_k, dim_k, r'] with r' = 1" in said(cores=(a, b, c.repeat(1, 1, 1, 2)))
    assert "cores[1] must have the dtype torch.float32, got torch.float64" in said(cores=(a, b.double(), c))
    assert "cores must be of a floating dtype" in said(cores=(a.long(), b.long(), c.long()))
    assert "num_embeddings must be in [1, 60], the product of all vocab_k, got 61" in said(rows=61)
    assert "num_embeddings must be in [1, 60]" in said(rows=0)
    assert "num_embeddings must be an int, got 5.0" in said(rows=5.0)
    assert "padding_idx must be in [-57, 57) or None, got 57" in said(padding_idx=57)
    assert "backend must be None, 'native' or 'reference', got 'gpu'" in said(backend="gpu")
    assert "cores[0] must be on the indices' device meta, got cpu" in said(i.to("meta"))


def test_a_negative_padding_index_counts_from_the_end() -> None:
    case = EmbeddingCase()
    cores, indices = case.cores(), case.indices()
    y = ttm_embedding(indices, cores, num_embeddings=57, padding_idx=-1)
    expected = F.embedding(indices, case.but(padding=56).table(cores))
    assert relative(y, expected) <= 1e-5 and (y[indices == 56] == 0).all() and (indices == 56).any()


def test_forced_backends() -> None:
    case = EmbeddingCase()
    cores, indices = case.cores(torch.float64), case.indices()
    assert (
        "backend='native' cannot serve: "
        in raised(lambda: by_function(case, indices, cores, backend="native"))[1]
    )
    y = by_function(case, indices, cores, backend="reference")
    assert relative(y, case.table(cores)[indices]) <= 1e-12
    single = case.cores()
    if native_support(indices, single).ok:
        native = by_function(case, indices, single, backend="native")
        assert relative(native, by_function(case, indices, single, backend="reference")) <= 1e-5
