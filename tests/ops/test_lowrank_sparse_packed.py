"""The weight packed for inference: the op's results, for its own sizes alone, and nothing out of bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowrank_sparse_problems import EVERY_LINEAR, LinearCase, dense_linear
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, relative

from tensorcomp_ext.ops import PackedSparse, lowrank_sparse_linear, pack_sparse
from tensorcomp_ext.ops.lowrank_sparse_linear import (
    bind_lowrank_sparse,
    bind_packed_lowrank_sparse,
    lowrank_sparse_sizes,
    pack_lowrank_sparse,
)

OPS = torch.ops.tensorcomp
pytestmark = pytest.mark.native
CASES = [c for c in EVERY_LINEAR if c.n and c.m]


def bound(arguments: list[Any]) -> Any:
    _, a, b, packed, _ = arguments
    return bind_packed_lowrank_sparse(pack_lowrank_sparse(a, b, packed), lowrank_sparse_sizes(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "turned"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: LinearCase, layout: str, dtype: torch.dtype, isa: str) -> None:
    arguments = case.but(layout=layout).make(dtype)
    x, bias = arguments[0], arguments[4]
    y = bound(arguments)(x, bias)
    assert y.dtype == dtype and y.is_contiguous()
    assert relative(y, dense_linear(*arguments)) <= 2 * FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_a_weight_bound_as_it_is(case: LinearCase) -> None:
    """As on CUDA, whose kernels read the parts where they are."""
    x, a, b, packed, bias = case.make()
    y = bind_lowrank_sparse(a, b, *packed[:3])(x, bias)
    assert torch.equal(y, lowrank_sparse_linear(x, a, b, packed, bias))


@pytest.mark.parametrize("kept", [0.005, 0.1, 0.4])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 70])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_and_reproducible(isa: str, rows: int, threads: int, kept: float) -> None:
    arguments = LinearCase(rows=(rows,), n=1030, rank=21, m=301, kept=kept).make()
    x, bias = arguments[0], arguments[4]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = bound(arguments)
        y = call(x, bias)
        assert torch.equal(y, call(x, bias))
    finally:
        torch.set_num_threads(before)
    assert relative(y, dense_linear(*arguments)) <= 1e-5


@pytest.mark.parametrize("rows", [1, 5])
def test_columns_all_in_one_place(rows: int, isa: str) -> None:
    """Much more in some windows than they have steps for, and long empty stretches."""
    arguments = LinearCase(rows=(rows,), n=700, m=130).make()
    mask = torch.zeros(130, 700, dtype=torch.bool)
    mask[:, 300:340] = True
    mask[::3, 650:] = True
    mask[5] = True
    arguments[3] = pack_sparse(torch.randn(130, 700), mask)
    assert relative(bound(arguments)(arguments[0], arguments[4]), dense_linear(*arguments)) <= 1e-5


def test_uneven_rows_take_no_more_memory(isa: str) -> None:
    """A bundle takes as many steps as its longest row: rows that pruning left of one length go together."""
    m, n = 640, 512
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(m, n, generator=generator)
    uneven = even * torch.linspace(0.2, 5, m)[torch.randperm(m, generator=generator)].unsqueeze(1)
    sizes, a, b = [], torch.randn(m, 2), torch.randn(2, n)
    for scores in (even, uneven):
        mask = scores > scores.flatten().kthvalue(m * n * 9 // 10).values
        values, x = torch.randn(m, n), torch.randn(5, n)
        sparse = pack_sparse(values, mask)
        sizes.append(pack_lowrank_sparse(a, b, sparse).numel())
        arguments = [x, a, b, sparse, None]
        assert relative(bound(arguments)(x, None), dense_linear(*arguments)) <= 1e-5
    assert sizes[1] <= 1.1 * sizes[0]


def test_rows_of_several_segments(isa: str) -> None:
    arguments = LinearCase(rows=(3,), n=131_100, m=3, kept=0.001).make()
    y = bound(arguments)(arguments[0], arguments[4])
    assert relative(y, dense_linear(*arguments)) <= 1e-5
    assert relative(y, lowrank_sparse_linear(*arguments)) <= 1e-5


def test_serves_its_sizes_alone(isa: str) -> None:
    x, a, b, sparse, bias = LinearCase().make()
    packed = pack_lowrank_sparse(a, b, sparse)
    assert lowrank_sparse_sizes(a, b) == [9, 3, 13]
    wrong: list[tuple[list[int], Tensor]] = [
        ([9, 4, 13], packed),
        ([9, 3], packed),
        ([0, 3, 13], packed),
        ([9, 3, 13], packed[:-64].clone()),
        ([9, 3, 13], packed[:40].clone()),
        ([9, 3, 13], x),
        ([9, 3, 13], torch.zeros_like(packed)),
    ]
    for sizes, other in wrong:
        with pytest.raises(RuntimeError, match="lowrank_sparse_linear_packed: "):
            OPS.lowrank_sparse_linear_packed(x, other, bias, sizes)
    with pytest.raises(RuntimeError, match=r"x must be \[..., in_features\]"):
        OPS.lowrank_sparse_linear_packed(x[:, 1:], packed, bias, [9, 3, 13])
    with pytest.raises(RuntimeError, match="packed for other sizes, another dtype"):
        OPS.lowrank_sparse_linear_packed(x.bfloat16(), packed, None, [9, 3, 13])
    with pytest.raises(RuntimeError, match=r"for inference only; .* use lowrank_sparse_linear"):
        jvp(lambda x: OPS.lowrank_sparse_linear_packed(x, packed, bias, [9, 3, 13]), (x,), (x,))


def test_spoiled_memory_is_harmless(isa: str) -> None:
    """Any byte behind the header may be wrong; the sanitizer's runs see what is read."""
    x, a, b, sparse, bias = LinearCase(rows=(3,), n=90, m=70, kept=0.3).make()
    packed, sizes = pack_lowrank_sparse(a, b, sparse), lowrank_sparse_sizes(a, b)
    for _ in range(300):
        spoiled = packed.clone()
        at = int(torch.randint(0, len(packed), ()))
        spoiled[at] = int(torch.randint(0, 256, ()))
        kind, _ = raised(lambda: OPS.lowrank_sparse_linear_packed(x, spoiled, bias, sizes))  # noqa: B023
        assert kind in ("", "RuntimeError")


def test_sizes_that_overflow_are_refused(isa: str) -> None:
    """A small tensor whose header repeats sizes of which the counts alone would be 2**63 bytes and more."""
    _, a, b, sparse, _ = LinearCase(rows=(1,)).make()
    packed = pack_lowrank_sparse(a, b, sparse)
    for sizes in ([704_060_689_152, 1, 429_268_648_960], [2**39, 1, 2**39], [2**40, 1, 2**20]):
        spoiled = torch.cat([packed, packed.new_zeros(1 << 20)])
        spoiled[16:40] = torch.tensor(sizes, dtype=torch.int64).view(spoiled.dtype)
        wide = torch.randn(1, 1).expand(1, sizes[2])
        kind, _ = raised(lambda: OPS.lowrank_sparse_linear_packed(wide, spoiled, None, sizes))  # noqa: B023
        assert kind == "RuntimeError", sizes


def test_fake_results() -> None:
    x, a, b, sparse, bias = LinearCase(rows=(2, 3)).make()
    packed = pack_lowrank_sparse(a, b, sparse)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, packed, bias)]
        y = OPS.lowrank_sparse_linear_packed(*fakes, [9, 3, 13])
    assert y.shape == (2, 3, 9) and y.dtype == torch.float32


def test_unsound_matrices_are_not_packed(isa: str) -> None:
    _, a, b, sparse, _ = LinearCase().make()
    for broken in (sparse._replace(offsets=sparse.offsets + 1), sparse._replace(values=sparse.values[1:])):
        kind, text = raised(lambda broken=broken: pack_lowrank_sparse(a, b, broken))  # type: ignore[misc]
        assert kind == "ValueError" and text.startswith("lowrank_sparse_linear")
        kind, text = raised(
            lambda broken=broken: OPS.lowrank_sparse_linear_pack(  # type: ignore[misc]
                a, b, broken.values, broken.offsets, broken.positions
            )
        )
        assert kind == "ValueError" and "packed.offsets" in text
    kind, text = raised(lambda: pack_lowrank_sparse(a.double(), b.double(), sparse))
    assert kind == "TypeError" and "packed.values must have a's dtype torch.float64" in text
    double = PackedSparse(sparse.values.double(), *sparse[1:])
    assert raised(lambda: pack_lowrank_sparse(a.double(), b.double(), double))[0] == "RuntimeError"
