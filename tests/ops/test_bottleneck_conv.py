"""The bottleneck convolution against its oracle, and as a citizen of torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from bottleneck_problems import (
    BOTTLENECK_GEOMETRIES,
    BOTTLENECK_SIZES,
    DEPTHWISE,
    FORMS,
    PLAIN,
    RING,
    BottleneckArguments,
    BottleneckCase,
    bottleneck_gradients,
    bottleneck_oracle,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, LAYOUTS, NAMES, relative

from tensorcomp_ext import _native, reference
from tensorcomp_ext.ops import bottleneck_conv2d, tucker2_conv2d
from tensorcomp_ext.ops.bottleneck_conv import differentiable_bottleneck, native_support

OPS = torch.ops.tensorcomp
every_form = pytest.mark.parametrize("case", FORMS, ids=str)
every_way = pytest.mark.parametrize("way", ["op", "function"])


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def calling(way: str, arguments: BottleneckArguments) -> Tensor:
    return OPS.bottleneck_conv2d(*arguments.explicit()) if way == "op" else bottleneck_conv2d(*arguments)


def dense_weight(arguments: BottleneckArguments) -> Tensor:
    """The weight written out index by index of the ring."""
    core, into, out = arguments.core, arguments.factor_in, arguments.factor_out
    if arguments.depthwise:
        return torch.einsum("tr,ryx,sr->tsyx", out, core[:, 0], into)
    rank_out, rank_in = core.shape[:2]
    return sum(
        torch.einsum(
            "tb,bayx,sa->tsyx",
            out[:, q * rank_out : (q + 1) * rank_out],
            core,
            into[:, q * rank_in : (q + 1) * rank_in],
        )
        for q in range(arguments.ring)
    )


@pytest.mark.parametrize("case", [*FORMS, *BOTTLENECK_SIZES, *BOTTLENECK_GEOMETRIES], ids=str)
def test_the_oracle_is_the_dense_convolution(case: BottleneckCase) -> None:
    a = case.make(torch.float64)
    strides, (top, bottom, left, right), dilations = a.geometry
    padded = F.pad(a.x, (left, right, top, bottom))
    expected = F.conv2d(padded, dense_weight(a), a.bias, strides, 0, dilations)
    assert relative(bottleneck_oracle(a), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [*FORMS, *BOTTLENECK_SIZES, *BOTTLENECK_GEOMETRIES], ids=str)
def test_matches_reference(case: BottleneckCase, layout: str, dtype: torch.dtype, device: str) -> None:
    arguments = case.but(layout=layout).make(dtype, device)
    expected = bottleneck_oracle(arguments)
    form = torch._prims_common.suggest_memory_format(arguments.x)
    # Where the oracle serves, it rounds every stage to the dtype.
    tolerance = 2 * FORWARD_TOLERANCE[dtype]
    for way in ("op", "function"):
        y = calling(way, arguments)
        assert y.dtype == dtype and y.is_contiguous(memory_format=form)
        assert relative(y, expected) <= tolerance, way


@pytest.mark.parametrize("layout", LAYOUTS)
@every_form
def test_gradients(case: BottleneckCase, layout: str, device: str) -> None:
    for each in (case, case.but(stride=(2, 1), padding=[0, 2, 1, 1], bias=False)):
        arguments = each.but(layout=layout).make(device=device)
        dy = torch.randn_like(bottleneck_oracle(arguments).float())
        expected = bottleneck_gradients(arguments, dy)
        for way in ("op", "function"):
            leaves = arguments.leaves()
            found = torch.autograd.grad(calling(way, leaves), leaves.given, dy)
            for name, ours in zip(expected, found, strict=True):
                assert relative(ours, expected[name]) <= GRADIENT_TOLERANCE[torch.float32], (way, name)


@every_form
def test_only_the_gradients_asked_for(case: BottleneckCase, device: str) -> None:
    arguments = case.but(layout="channels_last").make(device=device)
    dy = torch.randn_like(calling("op", arguments))
    expected = bottleneck_gradients(arguments, dy)
    for needed in itertools.product((False, True), repeat=5):
        mask = sum(n << bit for bit, n in enumerate(needed))
        found = OPS.bottleneck_conv2d_backward(*arguments.backward(dy, mask))
        for name, gradient, wanted in zip(NAMES, found, needed, strict=True):
            assert gradient.shape == (expected[name].shape if wanted else (0,))
            assert not wanted or relative(gradient, expected[name]) <= 1e-5, (needed, name)
        leaves = arguments.leaves(needed)
        y = calling("op", leaves)
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(dy)
        for name, tensor, wanted in zip(NAMES, leaves.given, needed, strict=True):
            assert (tensor.grad is not None) == wanted, (needed, name)


def test_without_ring_it_is_the_tucker2_convolution(device: str) -> None:
    arguments = PLAIN.but(stride=2, padding="valid").make(device=device)
    expected = tucker2_conv2d(*arguments[:8])
    for way in ("op", "function"):
        leaves = arguments.leaves()
        y = calling(way, leaves)
        assert torch.equal(y, expected)
        theirs = torch.autograd.grad(tucker2_conv2d(*leaves[:8]), leaves.given, expected)
        for ours, right in zip(torch.autograd.grad(y, leaves.given, expected), theirs, strict=True):
            assert torch.equal(ours, right)


@every_form
@every_way
def test_float64_derivatives(case: BottleneckCase, way: str) -> None:
    small = case.but(c_in=3, c_out=2, size=(4, 3), rank_in=2, rank_out=2, ring=min(case.ring, 2))
    arguments = small.but(kernel=(2, 3), padding=(1, 0, 2, 1), stride=(2, 1)).make(torch.float64).leaves()

    def call(*tensors: Tensor) -> Tensor:
        return calling(way, arguments.with_tensors(tensors))

    assert torch.autograd.gradcheck(call, arguments.given)
    assert torch.autograd.gradgradcheck(call, arguments.given)


@every_form
def test_opcheck(case: BottleneckCase, device: str) -> None:
    for each in (case, case.but(layout="plane_slice", stride=2, bias=False), case.but(n=0)):
        arguments = each.make(device=device)
        torch.library.opcheck(OPS.bottleneck_conv2d.default, arguments.leaves().explicit())
        dy = torch.randn_like(calling("op", arguments))
        for mask in (31, 0b10101):
            torch.library.opcheck(
                OPS.bottleneck_conv2d_backward.default,
                arguments.backward(dy, mask),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@every_form
def test_fake_results_have_the_form_of_real_ones(case: BottleneckCase, layout: str, device: str) -> None:
    for each in (case, case.but(stride=2, padding="valid"), case.but(size=(1, 6)), case.but(n=0)):
        arguments = each.but(layout=layout).make(device=device)
        y = calling("op", arguments)
        calls = [
            (OPS.bottleneck_conv2d, arguments.explicit()),
            *((OPS.bottleneck_conv2d_backward, arguments.backward(y, mask)) for mask in (31, 6)),
        ]
        for op, given in calls:
            with FakeTensorMode() as mode:
                fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given))
            reals = op(*given)
            pairs = [(reals, fakes)] if isinstance(reals, Tensor) else zip(reals, fakes, strict=True)
            for real, fake in pairs:
                assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
                for size, found, expected in zip(real.shape, fake.stride(), real.stride(), strict=True):
                    assert size < 2 or real.numel() == 0 or found == expected


@every_form
@every_way
def test_compiles_whole_with_any_batch(case: BottleneckCase, way: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    def call(*tensors: Tensor) -> Tensor:
        window = {"stride": [1, 2], "padding": [1, 0, 2, 1]}
        function = OPS.bottleneck_conv2d if way == "op" else bottleneck_conv2d
        return function(*tensors, **window, ring=case.ring, depthwise=case.depthwise) + 1

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for n in (11, 2, 13):
        arguments = case.but(n=n).make(device=device)
        results = []
        for function in (compiled, call):
            leaves = arguments.leaves()
            y = function(*leaves.tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves.given)])
        for ours, theirs in zip(*results, strict=True):
            assert relative(ours.detach(), theirs.detach()) <= 1e-6
    assert counter.frame_count == 1
    torch.compiler.reset()


class Layer(torch.nn.Module):
    def __init__(self, arguments: BottleneckArguments) -> None:
        super().__init__()
        self.form = arguments.ring, arguments.depthwise
        for name, tensor in zip(NAMES[1:], arguments.tensors[1:], strict=True):
            assert tensor is not None
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.core, self.factor_out, self.factor_in, self.bias)
        return bottleneck_conv2d(x, *weights, 2, "valid", 1, *self.form)


@every_form
def test_exports_with_any_batch(case: BottleneckCase, device: str) -> None:
    layer = Layer(case.make(device=device))
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(layer, (case.make(device=device).x,), dynamic_shapes=dynamic)
    for n in (3, 7):
        x = case.but(n=n).make(device=device).x
        assert relative(exported.module()(x), layer(x)) <= 1e-6


@every_form
@every_way
def test_autocast(case: BottleneckCase, way: str, device: str) -> None:
    arguments = case.make(device=device).leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = calling(way, arguments)
        double = calling(way, arguments.double())
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert relative(y.detach(), bottleneck_oracle(arguments)) <= 2e-2
    y.float().square().sum().backward()
    exact = arguments.double().leaves()
    calling(way, exact).square().sum().backward()
    for name, ours, theirs in zip(NAMES, arguments.given, exact.given, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.float32
        assert relative(ours.grad, theirs.grad) <= 4e-2, name


@every_form
@every_way
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_transforms(case: BottleneckCase, way: str, mode: Callable[[], object], device: str) -> None:
    arguments = case.but(stride=2).make(device=device)
    x, exact_arguments = arguments.x, arguments.double()

    def call(x: Tensor) -> Tensor:
        return calling(way, arguments._replace(x=x))

    def exact(x: Tensor) -> Tensor:
        return reference.bottleneck_conv2d(*exact_arguments._replace(x=x.double()))

    direction = torch.randn_like(x)
    wanted = exact(x + direction) - exact(x)  # linear in x
    images = torch.stack([x, 2 * x])
    with mode():  # type: ignore[attr-defined]
        assert relative(jvp(call, (x,), (direction,))[1], wanted) <= 1e-5
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
            assert tangent is not None and relative(tangent, wanted) <= 1e-5
        assert relative(vmap(call)(images)[1], exact(images[1])) <= 1e-5
        for found, image in zip(vmap(grad(lambda x: call(x).square().sum()))(images), images, strict=True):
            right = grad(lambda x: exact(x).square().sum())(image.double())
            assert relative(found, right) <= 1e-5


@pytest.mark.parametrize("case", [RING, DEPTHWISE], ids=str)
def test_mapped_gradients(case: BottleneckCase, device: str) -> None:
    """The graph is made outside of the transform, its backward runs inside."""
    arguments = case.make(device=device).leaves()
    options = (case.ring, case.depthwise, False)
    y = differentiable_bottleneck(*arguments.tensors, arguments.geometry, options)
    several = torch.randn(3, *y.shape, device=device)
    found = torch.autograd.grad(y, arguments.core, several, is_grads_batched=True)[0]
    for ours, each in zip(found, several, strict=True):
        assert relative(ours, bottleneck_gradients(arguments, each)["core"]) <= 1e-5


def test_whatever_native_code_cannot_take_has_a_reason() -> None:
    for case in FORMS:
        assert native_support(*case.make()) == _native.status()
    double = RING.make(torch.float64)
    on_meta = RING.make(device="meta")
    assert "no native bottleneck_conv2d for device 'meta'" in native_support(*on_meta).reason
    with pytest.raises(ValueError, match=r"bottleneck_conv2d: backend='native' cannot serve: "):
        bottleneck_conv2d(*double, backend="native")
    if _native.status().ok:
        assert "not torch.float64" in native_support(*double).reason
    for case in FORMS:
        arguments = case.make()
        y = bottleneck_conv2d(*arguments, backend="reference")
        assert relative(y, bottleneck_oracle(arguments)) <= 1e-5
