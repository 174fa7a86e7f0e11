"""Linear layers of tensor trains, rings and TT-matrices against their oracles, and as citizens of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from network_problems import dense_weight, every_order, matrix_cores, train_cores
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import chain, tr_linear, tt_linear, ttm_linear
from tensorcomp_ext.ops._contraction_layout import chain_of
from tensorcomp_ext.ops._network_linear import matrix_structure, train_structure

OPS = torch.ops.tensorcomp


@dataclass(frozen=True)
class LinearCase:
    """One problem; ``ranks`` holds the first and the last one too."""

    name: str
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    ranks: tuple[int, ...]
    rows: tuple[int, ...] = (7,)
    bias: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.name == "ttm_linear" else {"in_modes": self.ins, "out_modes": self.outs}

    def make(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """x, the cores and, with bias, the bias."""
        if self.name == "ttm_linear":
            shapes = matrix_cores(self.outs, self.ins, self.ranks)
        else:
            shapes = train_cores((*self.outs, *self.ins), self.ranks)
        cores = [torch.randn(s) / math.sqrt(s[0]) for s in shapes]
        bias = [torch.randn(math.prod(self.outs)).to(dtype)] if self.bias else []
        x = torch.randn(*self.rows, math.prod(self.ins))
        return [x.to(dtype), *(core.to(dtype) for core in cores), *bias]

    def call(self, way: str, tensors: list[Tensor], **options: Any) -> Tensor:
        """By "op", "function" or "oracle"; ``tensors`` as :meth:`make` gives them."""
        x, *cores = tensors
        bias = cores.pop() if self.bias else None
        functions: dict[str, Callable[..., Tensor]] = {
            "op": getattr(OPS, self.name),
            "function": {"tt_linear": tt_linear, "tr_linear": tr_linear, "ttm_linear": ttm_linear}[self.name],
            "oracle": getattr(reference, self.name),
        }
        return functions[way](x, cores, bias, **self.options, **options)

    def oracle(self, tensors: list[Tensor]) -> Tensor:
        return self.call("oracle", [t.double() for t in tensors])

    def but(self, **changes: Any) -> LinearCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        sizes = ("x".join(map(str, part)) for part in (self.outs, self.ins, self.ranks))
        return "-".join([self.name.removesuffix("_linear"), *sizes, *([] if self.bias else ["no_bias"])])


TT = LinearCase("tt_linear", (2, 5), (3, 7), (1, 2, 4, 3, 1))
TR = LinearCase("tr_linear", (2, 5), (3, 7), (3, 2, 4, 2, 3))
TTM = LinearCase("ttm_linear", (2, 5), (3, 7), (1, 4, 1))
CASES = [
    TT,
    TT.but(ranks=(1, 1, 1, 1, 1), bias=False),
    TT.but(outs=(7,), ins=(5,), ranks=(1, 3, 1)),
    TT.but(outs=(3, 1, 4), ins=(11,), ranks=(1, 3, 2, 5, 1)),
    TT.but(outs=(16, 16), ins=(16, 16, 4), ranks=(1, 16, 17, 13, 4, 1)),
    TR,
    TR.but(ranks=(1, 2, 4, 2, 1), bias=False),
    TR.but(ranks=(1, 1, 1, 1, 1)),
    TR.but(outs=(6,), ins=(9,), ranks=(4, 3, 4)),
    TR.but(outs=(5, 8, 8), ins=(5, 5, 5, 10), ranks=(10,) * 8),
    TTM,
    TTM.but(ranks=(1, 1, 1), bias=False),
    TTM.but(ranks=(3, 4, 3)),
    TTM.but(outs=(7,), ins=(5,), ranks=(2, 2)),
    TTM.but(outs=(4, 1, 6), ins=(3, 5, 2), ranks=(2, 3, 5, 2)),
    TTM.but(outs=(8, 8, 12), ins=(12, 8, 8), ranks=(1, 7, 9, 1)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
each = pytest.mark.parametrize("case", [TT, TR, TTM, TTM.but(ranks=(3, 4, 3))], ids=str)
every_way = pytest.mark.parametrize("way", ["op", "function"])


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@every_case
def test_the_oracles_weight(case: LinearCase) -> None:
    """Core by core equals one sum over everything."""
    tensors = case.but(bias=False).make(torch.float64)
    x, *cores = tensors
    if case.name == "ttm_linear":
        structure = matrix_structure(cores)
    else:
        structure = train_structure(cores, len(case.outs), ring=True)
    expected = x @ dense_weight(structure, cores).t()
    assert relative(case.but(bias=False).call("oracle", tensors), expected) <= 1e-12


def test_the_oracles_entries() -> None:
    _, *cores = TR.but(bias=False).make(torch.float64)
    a, b, c, d = cores
    weight = TR.but(bias=False).call("oracle", [torch.eye(21, dtype=torch.float64), *cores]).t()
    for o, p, i, j in ((0, 0, 0, 0), (1, 4, 2, 6), (0, 3, 1, 5)):
        entry = torch.trace(a[:, o] @ b[:, p] @ c[:, i] @ d[:, j])
        assert torch.allclose(weight[5 * o + p, 7 * i + j], entry, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (0,), (3, 5), (200,)], ids=str)
@every_case
def test_matches_reference(case: LinearCase, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    case = case.but(rows=rows)
    tensors = case.make(dtype)
    expected = case.oracle(tensors)
    for way in ("op", "function"):
        y = case.call(way, tensors)
        assert y.dtype == dtype and y.is_contiguous() and y.shape == expected.shape
        assert relative(y, expected) <= 3 * FORWARD_TOLERANCE[dtype], way


@every_way
@every_case
def test_gradients(case: LinearCase, way: str) -> None:
    for rows in ((5,), (300,)):
        case = case.but(rows=rows)
        tensors = leaves(case.make())
        y = case.call(way, tensors)
        dy = torch.randn_like(y)
        exact = leaves([t.double() for t in tensors])
        wanted = torch.autograd.grad(case.call("oracle", exact), exact, dy.double())
        for found, right in zip(torch.autograd.grad(y, tensors, dy), wanted, strict=True):
            assert relative(found, right) <= GRADIENT_TOLERANCE[torch.float32]


@every_way
@each
def test_float64_derivatives(case: LinearCase, way: str) -> None:
    tensors = leaves(case.but(rows=(2,)).make(torch.float64))
    assert torch.autograd.gradcheck(lambda *t: case.call(way, list(t)), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: case.call(way, list(t)), tensors)


@each
def test_every_order_agrees(case: LinearCase) -> None:
    """Input first, in any order, or the rebuilt weight: equal results and equal gradients."""
    x, *cores, bias = leaves(case.make())
    if case.name == "ttm_linear":
        structure = matrix_structure(cores)
    else:
        structure = train_structure(cores, len(case.outs), case.name == "tr_linear")
    tensors = [x, *cores, bias]
    y = case.call("oracle", tensors)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, tensors, dy)
    for order in every_order(structure):
        found = chain_of(structure, order)
        made = chain(x, found.matrices(cores), bias, program=found.program)
        assert relative(made.detach(), y.detach()) <= 1e-5
        for one, other in zip(torch.autograd.grad(made, tensors, dy), wanted, strict=True):
            assert relative(one, other) <= 1e-5


@each
def test_strided_inputs(case: LinearCase) -> None:
    tensors = case.make()
    wide = torch.randn(tensors[0].shape[1], 9, 3)
    x = wide.permute(2, 1, 0)
    cores = [core.transpose(0, -1).contiguous().transpose(0, -1) for core in tensors[1:-1]]
    for rows in (x, x[:, ::2], x[1]):
        given = [rows, *cores, tensors[-1]]
        assert relative(case.call("function", given), case.oracle(given)) <= 1e-5


@each
def test_opcheck(case: LinearCase) -> None:
    x, *cores, bias = leaves(case.make())
    op = getattr(OPS, case.name).default
    torch.library.opcheck(op, (x, cores, bias), case.options)
    with FakeTensorMode() as mode:
        fake = case.call("op", [mode.from_tensor(t) for t in (x, *cores, bias)])
    real = case.call("op", [x, *cores, bias])
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@each
@every_way
def test_compiles_whole(case: LinearCase, way: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *t: case.call(way, list(t)) + 1, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (11, 2):
        tensors = leaves(case.but(rows=(n, 3)).make())
        found, expected = compiled(*tensors), case.call(way, tensors) + 1
        assert relative(found.detach(), expected.detach()) <= 1e-5
        ours, theirs = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one, other) <= 1e-4
    torch.compiler.reset()


@each
def test_exports_with_any_batch(case: LinearCase) -> None:
    x, *weights = case.make()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(weights)

        def forward(self, x: Tensor) -> Tensor:
            return case.call("function", [x, *self.weights])

    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=dynamic).module()
    rows = torch.randn(5, x.shape[1])
    assert relative(exported(rows).detach(), case.oracle([rows, *weights])) <= 1e-5


@each
@every_way
def test_autocast(case: LinearCase, way: str) -> None:
    tensors = leaves(case.make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.call(way, tensors)
    assert y.dtype == torch.bfloat16
    assert relative(y.detach(), case.oracle(tensors).detach()) <= 3e-2
    for gradient in torch.autograd.grad(y.float().square().sum(), tensors):
        assert gradient.dtype == torch.float32


@each
@every_way
def test_transforms(case: LinearCase, way: str) -> None:
    case = case.but(bias=False)
    x, *cores = case.make(torch.float64)
    direction = torch.randn_like(x)

    def call(x: Tensor) -> Tensor:
        return case.call(way, [x, *cores])

    wanted, images = case.oracle([direction, *cores]), torch.stack([x, 2 * x])
    assert relative(jvp(call, (x,), (direction,))[1], wanted) <= 1e-10
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
        assert tangent is not None and relative(tangent, wanted) <= 1e-10
    assert relative(vmap(call)(images)[1], case.oracle([images[1], *cores])) <= 1e-10
    found = vmap(grad(lambda x: call(x).square().sum()))(images)[1]
    exact = images[1].clone().requires_grad_()
    (right,) = torch.autograd.grad(case.oracle([exact, *cores]).square().sum(), exact)
    assert relative(found, right) <= 1e-10


@each
def test_backends(case: LinearCase) -> None:
    tensors = case.make()
    found = case.call("function", tensors, backend="reference")
    assert torch.equal(found, case.call("oracle", tensors))
    double = [t.double() for t in tensors]
    with pytest.raises(ValueError, match=rf"{case.name}: backend='native' cannot serve: "):
        case.call("function", double, backend="native")
    message = rf"{case.name}: backend must be None, 'native' or 'reference', got 'quick'"
    with pytest.raises(ValueError, match=message):
        case.call("function", tensors, backend="quick")
