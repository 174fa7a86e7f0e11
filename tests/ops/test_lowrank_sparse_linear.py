"""The low-rank + sparse linear layer against the dense one, and as a citizen of torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowrank_sparse_problems import EVERY_LINEAR, LAYOUTS, LinearCase, dense_linear
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import PackedSparse, lowrank_sparse_linear
from tensorcomp_ext.ops.lowrank_sparse_linear import native_support

OPS = torch.ops.tensorcomp


def by_op(x: Tensor, a: Tensor, b: Tensor, packed: PackedSparse, bias: Tensor | None) -> Tensor:
    return OPS.lowrank_sparse_linear(x, a, b, packed.values, bias, packed.offsets, packed.positions)


CALLS: dict[str, Callable[..., Tensor]] = {"op": by_op, "function": lowrank_sparse_linear}
every_way = pytest.mark.parametrize("way", CALLS)
every_case = pytest.mark.parametrize("case", EVERY_LINEAR, ids=str)
LAID_OUT = [c.but(layout=layout) for layout in LAYOUTS[1:] for c in EVERY_LINEAR[::7]]
every_layout = pytest.mark.parametrize("case", [*EVERY_LINEAR, *LAID_OUT], ids=str)
NAMES = ("x", "a", "b", "values", "bias")


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def leaves(arguments: list[Any], needed: tuple[bool, ...] = (True,) * 5) -> list[Any]:
    """The same with floating tensors that ask for gradients where ``needed``, their strides kept."""
    x, a, b, packed, bias = arguments
    parts = [
        t if t is None else t.detach().requires_grad_(n)
        for t, n in zip((x, a, b, packed.values, bias), needed, strict=True)
    ]
    return [*parts[:3], packed._replace(values=parts[3]), parts[4]]


def floating(arguments: list[Any]) -> list[Tensor]:
    x, a, b, packed, bias = arguments
    return [t for t in (x, a, b, packed.values, bias) if t is not None]


def dense_gradients(arguments: list[Any], dy: Tensor) -> dict[str, Tensor]:
    """Gradients of every floating tensor given, in float64."""
    x, a, b, packed, bias = arguments
    exact = leaves(
        [
            *(t.double() for t in (x, a, b)),
            packed._replace(values=packed.values.double()),
            bias if bias is None else bias.double(),
        ]
    )
    y = dense_linear(*exact)
    names = [name for name in NAMES if name != "bias" or bias is not None]
    return dict(zip(names, torch.autograd.grad(y, floating(exact), dy.double()), strict=True))


@every_case
def test_the_oracle_is_the_dense_layer(case: LinearCase) -> None:
    x, a, b, packed, bias = case.make(torch.float64)
    y = reference.lowrank_sparse_linear(x, a, b, *packed[:3], bias)
    assert relative(y, dense_linear(x, a, b, packed, bias)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_layout
def test_matches_reference(case: LinearCase, dtype: torch.dtype, device: str, isa: str) -> None:
    arguments = case.make(dtype, device)
    expected = dense_linear(*arguments)
    for name, call in CALLS.items():
        y = call(*arguments)
        assert y.dtype == dtype and y.is_contiguous()
        # The oracle, which serves here, rounds every stage to the dtype.
        assert relative(y, expected) <= 2 * FORWARD_TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@every_case
def test_other_dtypes(case: LinearCase, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    for call in CALLS.values():
        y = call(*arguments)
        assert y.dtype == dtype and relative(y, dense_linear(*arguments)) <= 2 * FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_layout
def test_gradients(case: LinearCase, dtype: torch.dtype, device: str, isa: str) -> None:
    arguments = leaves(case.make(dtype, device))
    y = lowrank_sparse_linear(*arguments)
    dy = torch.randn(y.shape[::-1]).permute(*range(y.dim())[::-1]).to(device, dtype)
    expected = dense_gradients(arguments, dy)
    for name, found in zip(expected, torch.autograd.grad(y, floating(arguments), dy), strict=True):
        assert found.dtype == dtype
        assert relative(found, expected[name]) <= GRADIENT_TOLERANCE[dtype], name


@every_way
def test_only_the_gradients_asked_for(way: str, device: str, isa: str) -> None:
    arguments = LinearCase(rows=(2, 3)).make(device=device)
    x, a, b, packed, _ = arguments
    dy = torch.randn(2, 3, 9, device=device)
    expected = dense_gradients(arguments, dy)
    for needed in itertools.product((False, True), repeat=5):
        mask = sum(n << bit for bit, n in enumerate(needed))
        found = OPS.lowrank_sparse_linear_backward(dy, x, a, b, *packed[:3], mask)
        for name, gradient, wanted in zip(NAMES, found, needed, strict=True):
            assert gradient.shape == (expected[name].shape if wanted else (0,))
            assert not wanted or relative(gradient, expected[name]) <= 1e-5, (needed, name)
        ours = leaves(arguments, needed)
        y = CALLS[way](*ours)
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(dy)
        assert tuple(t.grad is not None for t in floating(ours)) == needed


@every_way
@pytest.mark.parametrize("positions", ["bitmap", "columns"])
@pytest.mark.parametrize("bias", [True, False])
def test_float64_derivatives(way: str, positions: str, bias: bool) -> None:
    case = LinearCase(rows=(2, 2), n=3, rank=2, m=4, bias=bias, positions=positions)
    arguments = leaves(case.make(torch.float64))

    def call(x: Tensor, a: Tensor, b: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return CALLS[way](x, a, b, arguments[3]._replace(values=values), bias)

    assert torch.autograd.gradcheck(call, floating(arguments))
    assert torch.autograd.gradgradcheck(call, floating(arguments))


@pytest.mark.parametrize("case", [*EVERY_LINEAR[::6], LinearCase(layout="turned", bias=False)], ids=str)
def test_opcheck(case: LinearCase, device: str) -> None:
    arguments = case.make(device=device)
    x, a, b, packed, bias = leaves(arguments)
    torch.library.opcheck(
        OPS.lowrank_sparse_linear.default, (x, a, b, packed.values, bias, packed.offsets, packed.positions)
    )
    x, a, b, packed, _ = arguments
    dy = torch.randn(*case.rows, case.m, device=device)
    for mask in (31, 0b10001, 0b01110):
        torch.library.opcheck(
            OPS.lowrank_sparse_linear_backward.default,
            (dy, x, a, b, *packed[:3], mask),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@every_layout
def test_fake_results_have_the_form_of_real_ones(case: LinearCase, device: str) -> None:
    x, a, b, packed, bias = case.make(device=device)
    values, offsets, positions, _ = packed
    dy = torch.randn(*case.rows, case.m, device=device)
    calls = [(OPS.lowrank_sparse_linear, [x, a, b, values, bias, offsets, positions])]
    calls += [
        (OPS.lowrank_sparse_linear_backward, [dy, x, a, b, values, offsets, positions, mask])
        for mask in (31, 12)
    ]
    for op, arguments in calls:
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments))
        reals = op(*arguments)
        pairs = [(reals, fakes)] if isinstance(reals, Tensor) else zip(reals, fakes, strict=True)
        for real, fake in pairs:
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
            assert real.is_contiguous() and fake.is_contiguous()


@every_way
def test_compiles_whole_with_any_batch(way: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: CALLS[way](*t) + 1, fullgraph=True, backend=counter, dynamic=True)
    whole = LinearCase(rows=(13, 3)).make(device=device)
    for n in (11, 2, 13):
        arguments = leaves([whole[0][:n], *whole[1:]])
        found, expected = compiled(*arguments), CALLS[way](*arguments) + 1
        assert relative(found.detach(), expected.detach()) <= 1e-6
        sources = floating(arguments)
        ours, theirs = (torch.autograd.grad(y.square().sum(), sources) for y in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one, other) <= 1e-5
    assert counter.frame_count == 1
    torch.compiler.reset()


class Layer(torch.nn.Module):
    def __init__(self, a: Tensor, b: Tensor, packed: PackedSparse, bias: Tensor) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([a, b, packed.values, bias])
        self.register_buffer("offsets", packed.offsets)
        self.register_buffer("positions", packed.positions)
        self.columns = packed.columns

    def forward(self, x: Tensor) -> Tensor:
        a, b, values, bias = self.weights
        packed = PackedSparse(values, self.offsets, self.positions, self.columns)  # type: ignore[arg-type]
        return lowrank_sparse_linear(x, a, b, packed, bias)


def test_exports_with_any_batch() -> None:
    x, *weights = LinearCase().make()
    module = Layer(*weights)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module, (x,), dynamic_shapes=dynamic).module()
    rows = torch.randn(5, 13)
    assert relative(exported(rows).detach(), module(rows).detach()) <= 1e-6


@every_way
def test_autocast(way: str, device: str) -> None:
    arguments = leaves(LinearCase(rows=(3, 4)).make(device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = CALLS[way](*arguments)
    assert y.dtype == torch.bfloat16
    assert relative(y.detach(), dense_linear(*arguments).detach()) <= 2e-2
    dy = torch.randn_like(y)
    expected = dense_gradients(arguments, dy)
    for name, found in zip(expected, torch.autograd.grad(y, floating(arguments), dy), strict=True):
        assert found.dtype == torch.float32
        assert relative(found, expected[name]) <= 4e-2, name


@every_way
@pytest.mark.parametrize("positions", ["bitmap", "columns"])
def test_transforms(way: str, positions: str, device: str) -> None:
    x, *weights = LinearCase(positions=positions).make(device=device)
    direction = torch.randn_like(x)

    def call(x: Tensor) -> Tensor:
        return CALLS[way](x, *weights)

    def exact(x: Tensor) -> Tensor:
        return dense_linear(x, *weights)

    wanted, images = exact(x + direction) - exact(x), torch.stack([x, 2 * x])
    assert relative(jvp(call, (x,), (direction,))[1], wanted) <= 1e-5
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
        assert tangent is not None and relative(tangent, wanted) <= 1e-5
    assert relative(vmap(call)(images)[1], exact(images[1])) <= 1e-5
    found = vmap(grad(lambda x: call(x).square().sum()))(images)[1]
    dy = 2 * exact(images[1])
    assert relative(found, dense_gradients([images[1], *weights], dy)["x"]) <= 1e-5


def test_mapped_gradients(device: str) -> None:
    """The graph is made outside of the transform, its backward runs inside."""
    arguments = leaves(LinearCase().make(device=device))
    y = lowrank_sparse_linear(*arguments)
    several = torch.randn(3, *y.shape, device=device)
    found = torch.autograd.grad(y, arguments[3].values, several, is_grads_batched=True)[0]
    for ours, each in zip(found, several, strict=True):
        assert relative(ours, dense_gradients(arguments, each)["values"]) <= 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_large_and_reproducible(isa: str, rows: int, dtype: torch.dtype, threads: int) -> None:
    case = LinearCase(rows=(rows,), n=530, rank=21, m=301, kept=0.1)
    arguments = leaves(case.make(dtype))
    dy = torch.randn(rows, 301).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(2):
            y = lowrank_sparse_linear(*arguments)
            runs.append([y, *torch.autograd.grad(y, floating(arguments), dy)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *runs))
    assert relative(runs[0][0], dense_linear(*arguments).detach()) <= 2 * FORWARD_TOLERANCE[dtype]
    expected = dense_gradients(arguments, dy)
    for ours, name in zip(runs[0][1:], expected, strict=True):
        assert relative(ours, expected[name]) <= GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("positions", ["bitmap", "columns"])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_several_segments(isa: str, rows: int, positions: str) -> None:
    case = LinearCase(rows=(rows,), n=131_100, m=3, kept=0.001, positions=positions)
    arguments = leaves(case.make())
    y = lowrank_sparse_linear(*arguments)
    assert relative(y.detach(), dense_linear(*arguments).detach()) <= 1e-5
    dy = torch.randn_like(y)
    expected = dense_gradients(arguments, dy)
    for name, found in zip(expected, torch.autograd.grad(y, floating(arguments), dy), strict=True):
        assert relative(found, expected[name]) <= 1e-4, name


def test_forced_backends() -> None:
    arguments = LinearCase().make(torch.float64)
    assert not native_support(*arguments[:3]).ok
    kind, text = raised(lambda: lowrank_sparse_linear(*arguments, backend="native"))
    assert kind == "ValueError" and text.startswith("lowrank_sparse_linear: backend='native' cannot serve: ")
    assert relative(lowrank_sparse_linear(*arguments, backend="reference"), dense_linear(*arguments)) <= 1e-12
    single = LinearCase().make()
    if native_support(*single[:3]).ok:
        native, slow = (lowrank_sparse_linear(*single, backend=b) for b in ("native", "reference"))
        assert relative(native, slow) <= 1e-6


def test_arguments() -> None:
    x, a, b, packed, bias = LinearCase().make()

    def said(
        x: Any = x, a: Any = a, b: Any = b, packed: Any = packed, bias: Any = bias, **options: Any
    ) -> str:
        text = raised(lambda: lowrank_sparse_linear(x, a, b, packed, bias, **options))[1]
        assert text.startswith("lowrank_sparse_linear: ")
        return text.removeprefix("lowrank_sparse_linear: ")

    assert said([1]) == "x must be a tensor, got list"
    assert said(x[:, 1:]) == "x must be [..., n] with n = 13, got [7, 12]"
    assert said(torch.zeros(())) == "x must be [..., n] with n = 13, got []"
    assert said(a=a[0]) == "a must be [m, r], got [3]"
    assert said(a=a[:, :0], b=b[:0]) == "a must be [m, r] with r >= 1, got [9, 0]"
    assert said(b=b[:2]) == "b must be [r, n] with r = 3, got [2, 13]"
    assert said(bias=bias[1:]) == "bias must be [m] with m = 9, got [8]"
    assert said(packed=tuple(packed)) == "packed must be a PackedSparse, got tuple"
    assert said(packed=LinearCase(m=8).sparse()) == "packed must be [m, n] = [9, 13], got [8, 13]"
    assert said(packed=packed._replace(values=packed.values.double())) == (
        "packed.values must have a's dtype torch.float32, got torch.float64"
    )
    assert said(packed=packed._replace(values=packed.values[None])).startswith("packed.values must be [nnz]")
    assert said(packed=packed._replace(offsets=packed.offsets.long())).startswith(
        "packed.offsets must be int32"
    )
    assert said(x.double()) == "a must have x's dtype torch.float64, got torch.float32"
    assert said(x.to("meta")) == "a must be on x's device meta, got cpu"
    assert said(backend="gpu") == "backend must be None, 'native' or 'reference', got 'gpu'"
