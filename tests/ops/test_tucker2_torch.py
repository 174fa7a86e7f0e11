"""The Tucker-2 convolution as a citizen of torch: autograd twice, autocast, compile, export, fake tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from tucker2_problems import DTYPES, GRADIENT_TOLERANCE, LAYOUTS, NAMES, Arguments, Case, oracle, relative

from tensorcomp_ext import _native
from tensorcomp_ext.ops import tucker2_conv, tucker2_conv2d
from tensorcomp_ext.ops.tucker2_conv import pack_tucker2, packed_geometry

OPS = torch.ops.tensorcomp
SMALL = Case(n=2, c_in=3, c_out=2, size=(4, 3), rank_in=2, rank_out=2, kernel=(2, 3), padding=(1, 0, 2, 1))


@pytest.mark.parametrize(
    "case", [SMALL, SMALL.but(stride=(2, 1), layout="channels_last"), SMALL.but(bias=False)]
)
@pytest.mark.parametrize("way", ["op", "function"])
def test_float64_derivatives(case: Case, way: str) -> None:
    """First and second derivatives by finite differences, through the dispatcher and the function."""
    arguments = case.make(torch.float64).leaves()
    given = [t for t in arguments.tensors if t is not None]

    def call(*tensors: Tensor) -> Tensor:
        padded = (*tensors, None)[:5]
        if way == "op":
            return OPS.tucker2_conv2d(*padded, *arguments.explicit()[5:])
        return tucker2_conv2d(*padded, *arguments[5:])

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_second_derivatives_of_native_dtypes(layout: str, dtype: torch.dtype) -> None:
    arguments = Case(layout=layout, stride=2, padding="valid").make(dtype)

    def penalty(a: Arguments) -> tuple[Tensor, ...]:
        given = list(a.tensors)
        first = torch.autograd.grad(tucker2_conv2d(*a).square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    found, expected = penalty(arguments.leaves()), penalty(arguments.double().leaves())
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        assert relative(ours, theirs) <= 2 * GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("way", ["op", "function"])
def test_autocast(layout: str, way: str) -> None:
    arguments = Case(layout=layout).make().leaves()
    call = OPS.tucker2_conv2d if way == "op" else tucker2_conv2d
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(*arguments.explicit())
        double = call(*arguments.double().explicit())
    low = arguments.with_tensors(t.detach().bfloat16() for t in arguments.tensors if t is not None)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, OPS.tucker2_conv2d(*low.explicit()))
    assert double.dtype == torch.float64
    y.float().square().sum().backward()
    reference = arguments.double().leaves()
    oracle_y = tucker2_conv2d(*reference)
    oracle_y.square().sum().backward()
    for name, ours, theirs in zip(NAMES, arguments.tensors, reference.tensors, strict=True):
        assert ours is not None and theirs is not None and ours.grad is not None and theirs.grad is not None
        assert ours.grad.dtype == torch.float32
        assert relative(ours.grad, theirs.grad) <= 2 * GRADIENT_TOLERANCE[torch.bfloat16], name


def trained(function: object, arguments: Arguments) -> list[Tensor]:
    leaves = arguments.leaves()
    y = function(*leaves.tensors)  # type: ignore[operator]
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in leaves.tensors if t is not None and t.grad is not None)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
def test_compiles_whole_with_any_batch(layout: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    def call(*tensors: Tensor) -> Tensor:
        return tucker2_conv2d(*tensors, stride=(1, 2), padding=(1, 0)) + 1

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    # The first batch equals no other number of the problem: equal ones are taken for the same symbol.
    for n in (11, 2, 13):
        arguments = Case(n=n, layout=layout).make()
        for ours, theirs in zip(trained(compiled, arguments), trained(call, arguments), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
    assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_with_inductor(layout: str) -> None:
    def call(*tensors: Tensor) -> Tensor:
        return torch.relu(tucker2_conv2d(*tensors, padding="same")) * 2

    arguments = Case(layout=layout).make()
    torch.compiler.reset()
    try:
        found = trained(torch.compile(call, fullgraph=True), arguments)
    except torch._inductor.exc.InductorError as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        pytest.skip("torch.compile has no C++ compiler here")
    finally:
        torch.compiler.reset()
    for ours, theirs in zip(found, trained(call, arguments), strict=True):
        assert relative(ours, theirs) <= 1e-6


class Layer(torch.nn.Module):
    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        for name, tensor in zip(NAMES[1:], arguments.tensors[1:], strict=True):
            assert tensor is not None
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return tucker2_conv2d(x, self.core, self.factor_out, self.factor_in, self.bias, 2, "valid")


def test_exports_with_any_batch() -> None:
    layer = Layer(Case().make())
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(layer, (Case().make().x,), dynamic_shapes=dynamic)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    for n in (3, 7):
        x = Case(n=n).make().x
        assert torch.equal(exported.module()(x), layer(x))
    if _native.status().ok:
        assert called == [OPS.tucker2_conv2d.default]


SHAPES = [
    Case(),
    Case(n=1),
    Case(c_in=1),
    Case(c_out=1),
    Case(n=1, c_in=1, c_out=1),
    Case(size=(1, 1)),
    Case(size=(1, 6)),
    Case(size=(7, 1), stride=2),
    Case(kernel=(7, 6), padding=0),
    Case(n=0),
    Case(n=1, size=(1, 1), kernel=(1, 1), padding=0),
]


def same_form(real: Tensor, fake: Tensor, exact: bool) -> None:
    """``exact``: also the strides of modes with one entry, which torch itself lets vary."""
    assert (real.shape, real.dtype, real.storage_offset()) == (fake.shape, fake.dtype, fake.storage_offset())
    matters = [exact or (size > 1 and real.numel() > 0) for size in real.shape]
    for found, expected, counts in zip(fake.stride(), real.stride(), matters, strict=True):
        assert not counts or found == expected, (fake.stride(), real.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_fake_results_have_the_form_of_real_ones(case: Case, layout: str, dtype: torch.dtype) -> None:
    arguments = case.but(layout=layout).make(dtype)
    x, core, factor_out, factor_in, _, *geometry = arguments.explicit()
    calls = [(OPS.tucker2_conv2d, arguments.explicit())]
    y = OPS.tucker2_conv2d(*arguments.explicit())
    for mask in (31, 6):
        calls.append((OPS.tucker2_conv2d_backward, (y, x, core, factor_out, factor_in, *geometry, mask)))
    if dtype != torch.float64 and _native.status().ok:
        packed = pack_tucker2(core, factor_out, factor_in)
        numbers = packed_geometry(core.shape, case.c_in, case.c_out, arguments.geometry)
        calls.append((OPS.tucker2_conv2d_packed, (x, packed, arguments.bias, numbers)))
    for op, given in calls:
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given))
        reals = op(*given)
        pairs = [(reals, fakes)] if isinstance(reals, Tensor) else list(zip(reals, fakes, strict=True))
        for real, fake in pairs:
            same_form(real, fake, exact=dtype != torch.float64 and _native.status().ok)
    assert y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


@pytest.mark.parametrize(
    "layout",
    [
        "contiguous",
        "channels_last",
    ],
)
@pytest.mark.parametrize("call", ["reference", "float64"])
def test_the_function_keeps_the_memory_format_of_x(call: str, layout: str) -> None:
    """Whoever computes: a model must not see other strides for another dtype or without native code."""
    arguments = Case(layout=layout).make(torch.float64 if call == "float64" else torch.float32)
    y = tucker2_conv2d(*arguments, backend="reference" if call == "reference" else None)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("wrapped", ["x", "core", "grad"])
def test_lazy_views(wrapped: str) -> None:
    """Tensors whose negation is still pending are read as negated."""
    arguments = Case().make()
    if wrapped == "grad":
        leaves = arguments.leaves()
        y = tucker2_conv2d(*leaves)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, list(leaves.tensors), torch._neg_view(-grad), retain_graph=True)
        for ours, theirs in zip(found, torch.autograd.grad(y, list(leaves.tensors), grad), strict=True):
            assert torch.equal(ours, theirs)
        return
    lazy = torch._neg_view(-getattr(arguments, wrapped))
    assert lazy.is_neg()
    y = tucker2_conv2d(*arguments._replace(**{wrapped: lazy}))
    assert relative(y, oracle(arguments)) <= 1e-5


def test_schemas_in_python_are_the_librarys(repository: Path) -> None:
    for name, text in tucker2_conv._SCHEMAS.items():
        found = getattr(OPS, name).default._schema
        assert str(found) == str(torch._C.parse_schema(f"tensorcomp::{name}{text}"))
    sources = "".join(
        (repository / "csrc/ops" / f).read_text() for f in ("tucker2_conv.cpp", "tucker2_conv_backward.cpp")
    )
    defined = [re.sub(r'"\s*"', "", text) for text in re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', sources)]
    assert sorted(d.strip().strip('"') for d in defined) == sorted(
        n + s for n, s in tucker2_conv._SCHEMAS.items()
    )
