"""The CUDA kernels of packed low-rank + sparse layers against the dense layer, and as torch ops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cuda_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE
from lowrank_sparse_problems import EVERY_LINEAR, LAYOUTS, LinearCase, dense_linear
from torch import Tensor
from tucker2_problems import relative

from tensorcomp_ext.nn import FactorizedConv2d, FactorizedLinear
from tensorcomp_ext.ops import lowrank_sparse_linear
from tensorcomp_ext.ops.lowrank_sparse_linear import native_support

MODES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", MODES)
FORMS = ("bitmap", "columns")
LARGE = [
    LinearCase(rows=(rows,), n=4096, m=1000, rank=100, kept=0.1, positions=form)
    for rows in (1, 7, 32)
    for form in FORMS
]
LAID_OUT = [c.but(layout=layout) for layout in LAYOUTS[1:] for c in EVERY_LINEAR[::5]]


def leaves(arguments: list[Any]) -> list[Any]:
    x, a, b, packed, bias = arguments
    parts = [None if t is None else t.detach().requires_grad_() for t in (x, a, b, packed.values, bias)]
    return [*parts[:3], packed._replace(values=parts[3]), parts[4]]


def floating(arguments: list[Any]) -> list[Tensor]:
    x, a, b, packed, bias = arguments
    return [t for t in (x, a, b, packed.values, bias) if t is not None]


def check(case: LinearCase, dtype: str, device: str) -> None:
    """y and every gradient, twice the same bits."""
    arguments = leaves(case.make(MODES[dtype], device))
    support = native_support(*arguments[:3])
    if not support.ok:
        pytest.skip(support.reason)
    runs, dy = [], None
    for _ in range(2):
        y = lowrank_sparse_linear(*arguments, backend="native")
        dy = torch.randn_like(y) if dy is None else dy
        runs.append((y, *torch.autograd.grad(y, floating(arguments), dy)))
    assert all(map(torch.equal, *runs)) and dy is not None
    x, a, b, packed, bias = arguments
    exact = leaves(
        [
            *(t.detach().double() for t in (x, a, b)),
            packed._replace(values=packed.values.detach().double()),
            None if bias is None else bias.detach().double(),
        ]
    )
    expected = dense_linear(*exact)
    assert relative(runs[0][0].detach(), expected.detach()) <= 2 * FORWARD_TOLERANCE[dtype]
    wanted = torch.autograd.grad(expected, floating(exact), dy.double())
    for ours, right in zip(runs[0][1:], wanted, strict=True):
        assert relative(ours, right) <= 2 * GRADIENT_TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("case", [*EVERY_LINEAR, *LAID_OUT, *LARGE], ids=str)
def test_cases(cuda: str, case: LinearCase, dtype: str) -> None:
    check(case, dtype, cuda)


@pytest.mark.parametrize("form", FORMS)
def test_captured_in_a_graph(cuda: str, form: str) -> None:
    """Forward and backward op; another input in the same memory gives another output."""
    x, a, b, packed, bias = LARGE[2 + FORMS.index(form)].make(torch.bfloat16, cuda)
    ops = torch.ops.tensorcomp
    dy = torch.randn(7, 1000, device=cuda).bfloat16()

    def call() -> tuple[Tensor, ...]:
        y = ops.lowrank_sparse_linear(x, a, b, packed[0], bias, *packed[1:3])
        return y, *ops.lowrank_sparse_linear_backward(dy, x, a, b, *packed[:3], 31)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for once, again in zip(found, call(), strict=True):
        assert torch.equal(once, again)


def test_many_rows_are_refused_with_the_reason(cuda: str) -> None:
    arguments = LinearCase(rows=(33,)).make(device=cuda)
    with pytest.raises(ValueError, match="is for up to 32 rows, not 33"):
        lowrank_sparse_linear(*arguments, backend="native")
    y = lowrank_sparse_linear(*arguments)
    assert relative(y, dense_linear(*arguments)) <= 1e-5


def packed_layer(kind: str) -> tuple[Any, Tensor]:
    """A layer whose sparse part keeps few entries, packed, and an input."""
    torch.manual_seed(0)
    layer: Any
    if kind == "linear":
        layer, x = FactorizedLinear(96, 64, format="lowrank_sparse", rank=8), torch.randn(5, 96)
    else:
        layer = FactorizedConv2d(96, 64, 1, format="lowrank_sparse", rank=8)
        x = torch.randn(1, 96, 4, 5).contiguous(memory_format=torch.channels_last)
    torch.nn.init.normal_(layer.weight.sparse)
    layer.weight.keep(torch.rand(layer.weight.shape) < 0.1)
    return layer.eval().finalize(), x


@dtypes
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_packed_layers(cuda: str, kind: str, dtype: str) -> None:
    layer, x = packed_layer(kind)
    expected = copy.deepcopy(layer).double().to_dense()(x.double())
    layer.plan = "fused"
    layer.to(cuda, MODES[dtype])
    given = x.to(cuda, MODES[dtype])
    with torch.no_grad():
        for _ in range(2):  # bound at the first call, called as bound at the second
            assert relative(layer(given).cpu(), expected.detach()) <= 2 * FORWARD_TOLERANCE[dtype]
    y = layer(given.requires_grad_())
    (grad,) = torch.autograd.grad(y.sum(), given)
    assert grad.shape == x.shape and bool(grad.isfinite().all())
