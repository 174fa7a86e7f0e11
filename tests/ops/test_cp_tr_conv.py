"""CP and tensor-ring convolutions: lowered to the bottleneck form they equal the dense convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cp_tr_problems import CP, TR, WEIGHTS, WeightCase
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext import _native, reference
from tensorcomp_ext.ops import cp_conv2d, tr_conv2d

OPS = torch.ops.tensorcomp
both = pytest.mark.parametrize("case", [CP, TR], ids=str)
every_way = pytest.mark.parametrize("way", ["op", "function"])


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def test_the_oracles_weights_entry_by_entry() -> None:
    """A one-pixel input under a kernel reads one tap of the weight."""
    for case in (CP.but(kernel=(2, 3), bias=False), TR.but(kernel=(2, 3), bias=False)):
        _, *parts = case.make(torch.float64)
        for t, s, y, x in ((0, 0, 0, 0), (5, 4, 1, 2), (3, 1, 1, 0), (2, 2, 0, 1)):
            if case.name == "cp_conv2d":
                out, into, rows, columns = parts
                entry = sum(out[t, r] * into[s, r] * rows[y, r] * columns[x, r] for r in range(4))
            else:
                into, spatial, out = parts
                entry = torch.trace(into[:, s] @ spatial[:, 3 * y + x] @ out[:, t])
            image = torch.zeros(1, 5, 2, 3, dtype=torch.float64)
            image[0, s, y, x] = 1
            found = case.but(padding=0).call("oracle", [image, *parts])[0, t, 0, 0]
            assert torch.allclose(found, torch.as_tensor(entry), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "plane_slice"])
@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_matches_reference(case: WeightCase, layout: str, dtype: torch.dtype, device: str) -> None:
    case = case.but(layout=layout)
    tensors = case.make(dtype, device)
    expected = case.oracle(tensors)
    for way in ("op", "function"):
        y = case.call(way, tensors)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(tensors[0]))
        assert relative(y, expected) <= 2 * FORWARD_TOLERANCE[dtype], way


@every_way
@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_gradients(case: WeightCase, way: str, device: str) -> None:
    tensors = leaves(case.make(device=device))
    y = case.call(way, tensors)
    dy = torch.randn_like(y)
    exact = leaves([t.double() for t in tensors])
    wanted = torch.autograd.grad(case.call("oracle", exact), exact, dy.double())
    for found, right in zip(torch.autograd.grad(y, tensors, dy), wanted, strict=True):
        assert relative(found, right) <= GRADIENT_TOLERANCE[torch.float32]


@both
@every_way
def test_float64_derivatives(case: WeightCase, way: str) -> None:
    small = case.but(c_in=3, c_out=2, size=(4, 3), kernel=(2, 3), stride=(2, 1), ranks=(2,) * len(case.ranks))
    tensors = leaves(small.make(torch.float64))
    assert torch.autograd.gradcheck(lambda *t: small.call(way, list(t)), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: small.call(way, list(t)), tensors)


@both
def test_opcheck(case: WeightCase, device: str) -> None:
    x, *parts, bias = leaves(case.but(layout="channels_last").make(device=device))
    weight = [parts] if case.name == "cp_conv2d" else parts
    op = getattr(OPS, case.name).default
    torch.library.opcheck(op, (x, *weight, bias, [2, 1], [1, 0, 2, 1], [1, 1]))
    with FakeTensorMode() as mode:
        fake = case.call("op", [mode.from_tensor(t) for t in (x, *parts, bias)])
    real = case.call("op", [x, *parts, bias])
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@both
@every_way
def test_compiles_whole(case: WeightCase, way: str, device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *t: case.call(way, list(t)) + 1, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (11, 2):
        tensors = leaves(case.but(n=n).make(device=device))
        found, expected = compiled(*tensors), case.call(way, tensors) + 1
        assert relative(found.detach(), expected.detach()) <= 1e-6
        ours, theirs = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one, other) <= 1e-5
    torch.compiler.reset()


@both
def test_exports_with_any_batch(case: WeightCase, device: str) -> None:
    x, *weights = case.make(device=device)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ParameterList(weights)

        def forward(self, x: Tensor) -> Tensor:
            return case.call("function", [x, *self.parts])

    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Layer(), (x,), dynamic_shapes=dynamic).module()
    images = torch.randn(7, *x.shape[1:], device=device)
    assert relative(exported(images).detach(), case.call("function", [images, *weights])) <= 1e-6


@both
@every_way
def test_autocast(case: WeightCase, way: str, device: str) -> None:
    tensors = leaves(case.make(device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = case.call(way, tensors)
        double = case.call(way, [t.double() for t in tensors])
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert relative(y.detach(), case.oracle(tensors).detach()) <= 2e-2
    for tensor, found in zip(tensors, torch.autograd.grad(y.float().sum(), tensors), strict=True):
        assert found.dtype == tensor.dtype


@both
@every_way
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_transforms(case: WeightCase, way: str, mode: Callable[[], Any], device: str) -> None:
    x, *weights = case.make(device=device)
    direction = torch.randn_like(x)

    def call(x: Tensor) -> Tensor:
        return case.call(way, [x, *weights])

    def exact(x: Tensor) -> Tensor:
        return case.oracle([x, *weights])

    wanted, images = exact(x + direction) - exact(x), torch.stack([x, 2 * x])
    with mode():
        assert relative(jvp(call, (x,), (direction,))[1], wanted) <= 1e-5
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
            assert tangent is not None and relative(tangent, wanted) <= 1e-5
        assert relative(vmap(call)(images)[1], exact(images[1])) <= 1e-5
        found = vmap(grad(lambda x: call(x).square().sum()))(images)[1]
        assert relative(found, grad(lambda x: exact(x).square().sum())(images[1].double())) <= 1e-5


@both
def test_backends(case: WeightCase) -> None:
    tensors = case.make()
    assert relative(case.call("function", tensors, backend="reference"), case.oracle(tensors)) <= 1e-5
    if _native.status().ok:
        assert relative(case.call("function", tensors, backend="native"), case.oracle(tensors)) <= 1e-5
    with pytest.raises(ValueError, match=rf"^{case.name}: backend='native' cannot serve: "):
        case.call("function", case.make(torch.float64), backend="native")
    with pytest.raises(ValueError, match=rf"^{case.name}: backend must be None, .*, got 'fast'"):
        case.call("function", tensors, backend="fast")


def test_a_ring_of_one_is_a_tensor_train() -> None:
    """Without a ring the core is full and native code serves where it is built."""
    case = TR.but(ranks=(1, 3, 4), kernel=(2, 3))
    x, into, spatial, out, bias = case.make()
    core = spatial.permute(2, 0, 1).reshape(4, 3, 2, 3)
    expected = reference.tucker2_conv2d(x, core, out[..., 0].t(), into[0], bias, 1, 1)
    assert relative(case.call("function", [x, into, spatial, out, bias]), expected) <= 1e-5


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def cp(x: Any = None, index: int = 0, factor: Any = None, **changes: Any) -> Tensor:
    factors = [zeros(8, 4), zeros(6, 4), zeros(3, 4), zeros(2, 4)]
    if factor is not None:
        factors[index] = factor
    return cp_conv2d(zeros(2, 6, 7, 5) if x is None else x, **({"factors": factors} | changes))


def tr(x: Any = None, **changes: Any) -> Tensor:
    cores = {"core_in": zeros(2, 6, 3), "core_spatial": zeros(3, 9, 4), "core_out": zeros(4, 8, 2)}
    return tr_conv2d(zeros(2, 6, 7, 5) if x is None else x, **(cores | changes))


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "cp x": (lambda: cp(zeros(6, 7, 5)), ValueError, "x must be [N, C_in, H, W], got [6, 7, 5]"),
    "cp factors": (
        lambda: cp(factors=zeros(4, 3)),
        TypeError,
        "factors must be a list of four tensors, got Tensor",
    ),
    "cp three": (
        lambda: cp(factors=[zeros(8, 4)] * 3),
        ValueError,
        "factors must be a list of four tensors, got 3",
    ),
    "cp no tensor": (lambda: cp(index=2, factor=1.0), TypeError, "factors[2] must be a tensor, got float"),
    "cp dims": (lambda: cp(factor=zeros(8)), ValueError, "factors[0] must be [C_out, R], got [8]"),
    "cp rank": (
        lambda: cp(index=3, factor=zeros(2, 5)),
        ValueError,
        "factors[3] must be [kW, R] with R = 4, got [2, 5]",
    ),
    "cp rank 0": (
        lambda: cp(factor=zeros(8, 0)),
        ValueError,
        "factors[0] must be [C_out, R] with R >= 1, got [8, 0]",
    ),
    "cp kernel": (
        lambda: cp(index=2, factor=zeros(0, 4)),
        ValueError,
        "factors[2] must be [kH, R] with no empty mode, got [0, 4]",
    ),
    "cp channels": (
        lambda: cp(index=1, factor=zeros(5, 4)),
        ValueError,
        "factors[1] must be [C_in, R] with C_in = 6, got [5, 4]",
    ),
    "cp dtype": (
        lambda: cp(index=1, factor=zeros(6, 4, dtype=torch.float64)),
        TypeError,
        "factors[1] must have x's dtype torch.float32, got torch.float64",
    ),
    "cp device": (
        lambda: cp(index=1, factor=zeros(6, 4, device="meta")),
        ValueError,
        "factors[1] must be on x's device cpu, got meta",
    ),
    "cp bias": (lambda: cp(bias=zeros(7)), ValueError, "bias must be [C_out] with C_out = 8, got [7]"),
    "cp stride": (
        lambda: cp(stride=0),
        ValueError,
        "stride must be an int or a pair of ints >= 1, got 0",
    ),
    "cp window": (
        lambda: cp(dilation=4),
        ValueError,
        "the padded input [7, 5] is smaller than the dilated kernel [3, 2] "
        "(padding (0, 0, 0, 0), dilation (4, 4))",
    ),
    "tr x": (lambda: tr(zeros(6, 7, 5)), ValueError, "x must be [N, C_in, H, W], got [6, 7, 5]"),
    "tr no tensor": (lambda: tr(core_out=3), TypeError, "core_out must be a tensor, got int"),
    "tr dims": (lambda: tr(core_in=zeros(6, 3)), ValueError, "core_in must be [R0, C_in, Ra], got [6, 3]"),
    "tr channels": (
        lambda: tr(core_in=zeros(2, 5, 3)),
        ValueError,
        "core_in must be [R0, C_in, Ra] with C_in = 6, got [2, 5, 3]",
    ),
    "tr Ra": (
        lambda: tr(core_spatial=zeros(2, 9, 4)),
        ValueError,
        "core_spatial must be [Ra, kH kW, Rb] with Ra = 3, got [2, 9, 4]",
    ),
    "tr Rb": (
        lambda: tr(core_out=zeros(3, 8, 2)),
        ValueError,
        "core_out must be [Rb, C_out, R0] with Rb = 4, got [3, 8, 2]",
    ),
    "tr R0": (
        lambda: tr(core_out=zeros(4, 8, 3)),
        ValueError,
        "core_out must be [Rb, C_out, R0] with R0 = 2, got [4, 8, 3]",
    ),
    "tr rank 0": (
        lambda: tr(core_in=zeros(0, 6, 3)),
        ValueError,
        "core_in must be [R0, C_in, Ra] with no rank of 0, got [0, 6, 3]",
    ),
    "tr not square": (
        lambda: tr(core_spatial=zeros(3, 6, 4)),
        ValueError,
        "core_spatial must be [Ra, kH kW, Rb] with a square kH kW unless kernel_size is given, got [3, 6, 4]",
    ),
    "tr kernel": (
        lambda: tr(kernel_size=(2, 4)),
        ValueError,
        "kernel_size must be (kH, kW) with kH kW = 9, got (2, 4)",
    ),
    "tr kernel int": (
        lambda: tr(kernel_size=3),
        TypeError,
        "kernel_size must be a pair of ints >= 1, got 3",
    ),
    "tr dtype": (
        lambda: tr(core_out=zeros(4, 8, 2, dtype=torch.bfloat16)),
        TypeError,
        "core_out must have x's dtype torch.float32, got torch.bfloat16",
    ),
    "tr bias": (lambda: tr(bias=zeros(8, 1)), ValueError, "bias must be [C_out], got [8, 1]"),
    "tr padding": (
        lambda: tr(padding="full"),
        ValueError,
        "padding must be ints, 'same' or 'valid', got 'full'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, text = BAD[name]
    assert raised(call) == (kind.__name__, f"{name[:2]}_conv2d: {text}")
