"""The two-factor linear layer against its oracle, and as a citizen of torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pair_problems import PAIR_CASES, PAIR_LAYOUTS, PAIR_NAMES, PairCase, pair_gradients, pair_oracle
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext.ops import two_factor_linear
from tensorcomp_ext.ops.two_factor_linear import (
    bind_packed_pair,
    differentiable_two_factor,
    native_support,
    pack_two_factor,
    two_factor_sizes,
)

OPS = torch.ops.tensorcomp
CALLS = {
    "op": OPS.two_factor_linear,
    "function": two_factor_linear,
    "plan": lambda *tensors: differentiable_two_factor(*tensors),
}
every_way = pytest.mark.parametrize("way", ["op", "function"])
all_ways = pytest.mark.parametrize("way", CALLS)


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def leaves(tensors: list[Any], needed: tuple[bool, ...] = (True,) * 4) -> list[Any]:
    """The same with tensors that ask for gradients where ``needed``, their strides kept."""
    return [t if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]


def given(tensors: list[Any]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


@pytest.mark.parametrize("case", PAIR_CASES, ids=str)
def test_the_oracle_is_the_dense_layer(case: PairCase) -> None:
    x, a, b, bias = case.make(torch.float64)
    expected = x @ (a @ b).t() + (0 if bias is None else bias)  # type: ignore[operator]
    assert relative(pair_oracle([x, a, b, bias]), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@pytest.mark.parametrize("case", PAIR_CASES, ids=str)
def test_matches_reference(case: PairCase, layout: str, dtype: torch.dtype, device: str, isa: str) -> None:
    tensors = case.but(layout=layout).make(dtype, device)
    expected = pair_oracle(tensors)
    for way in ("op", "function"):
        y = CALLS[way](*tensors)
        assert y.dtype == dtype and y.is_contiguous()
        # The oracle, which serves here, rounds every stage to the dtype.
        assert relative(y, expected) <= 2 * FORWARD_TOLERANCE[dtype], way


@all_ways
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@pytest.mark.parametrize("case", PAIR_CASES, ids=str)
def test_gradients(case: PairCase, layout: str, way: str, device: str) -> None:
    tensors = leaves(case.but(layout=layout).make(device=device))
    y = CALLS[way](*tensors)
    dy = torch.randn(y.shape[::-1], device=device).permute(*range(y.dim())[::-1])
    expected = pair_gradients(tensors, dy)
    for name, found in zip(expected, torch.autograd.grad(y, given(tensors), dy), strict=True):
        assert relative(found, expected[name]) <= GRADIENT_TOLERANCE[torch.float32], name


@all_ways
def test_only_the_gradients_asked_for(way: str, device: str) -> None:
    tensors = PairCase(rows=(2, 3)).make(device=device)
    dy = torch.randn(2, 3, 9, device=device)
    expected = pair_gradients(tensors, dy)
    for needed in itertools.product((False, True), repeat=4):
        mask = sum(n << bit for bit, n in enumerate(needed))
        found = OPS.two_factor_linear_backward(dy, *tensors[:3], mask)
        for name, gradient, wanted in zip(PAIR_NAMES, found, needed, strict=True):
            assert gradient.shape == (expected[name].shape if wanted else (0,))
            assert not wanted or relative(gradient, expected[name]) <= 1e-5, (needed, name)
        ours = leaves(tensors, needed)
        y = CALLS[way](*ours)
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(dy)
        assert tuple(t.grad is not None for t in ours) == needed


@all_ways
@pytest.mark.parametrize("bias", [True, False])
def test_float64_derivatives(way: str, bias: bool) -> None:
    tensors = leaves(PairCase(rows=(2, 2), c_in=3, rank=2, c_out=4, bias=bias).make(torch.float64))

    def call(*tensors: Tensor) -> Tensor:
        return CALLS[way](*(*tensors, None)[:4])

    assert torch.autograd.gradcheck(call, given(tensors))
    assert torch.autograd.gradgradcheck(call, given(tensors))


@pytest.mark.parametrize(
    "case", [PairCase(), PairCase(rows=(2, 3), layout="turned", bias=False), PairCase(rows=(0,))], ids=str
)
def test_opcheck(case: PairCase, device: str) -> None:
    tensors = case.make(device=device)
    torch.library.opcheck(OPS.two_factor_linear.default, tuple(leaves(tensors)))
    dy = torch.randn_like(two_factor_linear(*tensors))
    for mask in (15, 0b1001, 0b0110):
        torch.library.opcheck(
            OPS.two_factor_linear_backward.default,
            (dy, *tensors[:3], mask),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@pytest.mark.parametrize("case", PAIR_CASES, ids=str)
def test_fake_results_have_the_form_of_real_ones(case: PairCase, layout: str, device: str) -> None:
    tensors = case.but(layout=layout).make(device=device)
    y = OPS.two_factor_linear(*tensors)
    calls = [(OPS.two_factor_linear, tensors)]
    calls += [(OPS.two_factor_linear_backward, [y, *tensors[:3], mask]) for mask in (15, 6)]
    for op, arguments in calls:
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
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
    for n in (11, 2, 13):
        tensors = leaves(PairCase(rows=(n, 3)).make(device=device))
        found, expected = compiled(*tensors), CALLS[way](*tensors) + 1
        assert relative(found.detach(), expected.detach()) <= 1e-6
        ours, theirs = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one, other) <= 1e-5
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_exports_with_any_batch(device: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self, weights: list[Any]) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(weights)

        def forward(self, x: Tensor) -> Tensor:
            return two_factor_linear(x, *self.weights)

    x, *weights = PairCase().make(device=device)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Layer(weights), (x,), dynamic_shapes=dynamic).module()
    rows = torch.randn(5, 12, device=device)
    assert relative(exported(rows).detach(), two_factor_linear(rows, *weights)) <= 1e-6


@every_way
def test_autocast(way: str, device: str) -> None:
    tensors = leaves(PairCase(rows=(3, 4)).make(device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = CALLS[way](*tensors)
        double = CALLS[way](*(t.double() for t in tensors))
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert relative(y.detach(), pair_oracle(tensors)) <= 2e-2
    dy = torch.randn_like(y)
    expected = pair_gradients(tensors, dy)
    for name, found in zip(expected, torch.autograd.grad(y, tensors, dy), strict=True):
        assert found.dtype == torch.float32
        assert relative(found, expected[name]) <= 4e-2, name


@every_way
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_transforms(way: str, mode: Callable[[], Any], device: str) -> None:
    x, *weights = PairCase().make(device=device)
    assert x is not None
    direction = torch.randn_like(x)

    def call(x: Tensor) -> Tensor:
        return CALLS[way](x, *weights)

    def exact(x: Tensor) -> Tensor:
        return pair_oracle([x, *weights])

    wanted, images = exact(x + direction) - exact(x), torch.stack([x, 2 * x])
    with mode():
        assert relative(jvp(call, (x,), (direction,))[1], wanted) <= 1e-5
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
            assert tangent is not None and relative(tangent, wanted) <= 1e-5
        assert relative(vmap(call)(images)[1], exact(images[1])) <= 1e-5
        found = vmap(grad(lambda x: call(x).square().sum()))(images)[1]
        dy = 2 * exact(images[1])
        assert relative(found, pair_gradients([images[1], *weights], dy)["x"]) <= 1e-5


def test_mapped_gradients(device: str) -> None:
    """The graph is made outside of the transform, its backward runs inside."""
    tensors = leaves(PairCase().make(device=device))
    y = differentiable_two_factor(*tensors)
    several = torch.randn(3, *y.shape, device=device)
    found = torch.autograd.grad(y, tensors[2], several, is_grads_batched=True)[0]
    for ours, each in zip(found, several, strict=True):
        assert relative(ours, pair_gradients(tensors, each)["b"]) <= 1e-5


def test_tensors_that_outlive_a_transform() -> None:
    tensors, kept = leaves(PairCase().make()), []
    grad(lambda x: kept.append(x) or x.sum())(tensors[0])
    y = differentiable_two_factor(kept[0], *tensors[1:])
    wanted = pair_gradients(tensors, torch.ones_like(y))["x"]
    assert relative(torch.autograd.grad(y.sum(), tensors[0])[0], wanted) <= 1e-5


def test_whatever_native_code_cannot_take_has_a_reason() -> None:
    tensors = PairCase().make(torch.float64)
    assert not native_support(*tensors).ok
    with pytest.raises(ValueError, match="two_factor_linear: backend='native' cannot serve: "):
        two_factor_linear(*tensors, backend="native")
    assert torch.equal(two_factor_linear(*tensors, backend="reference"), two_factor_linear(*tensors))
    assert (
        not native_support(*PairCase(c_in=0).make()).ok and not native_support(*PairCase(c_out=0).make()).ok
    )


@pytest.mark.native
def test_native_code_takes_what_the_kernel_can() -> None:
    tensors = PairCase().make()
    assert native_support(*tensors).ok
    assert relative(two_factor_linear(*tensors, backend="native"), pair_oracle(tensors)) <= 1e-6


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in PAIR_CASES if c.c_in and c.c_out], ids=str)
def test_packed(case: PairCase, dtype: torch.dtype, isa: str) -> None:
    x, a, b, bias = tensors = case.make(dtype)
    assert x is not None and a is not None and b is not None
    y = bind_packed_pair(pack_two_factor(a, b), two_factor_sizes(a, b))(x, bias)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, two_factor_linear(*tensors))


@pytest.mark.native
def test_packed_factors_serve_their_sizes_alone(isa: str) -> None:
    x, a, b, bias = PairCase().make()
    assert a is not None and b is not None
    assert two_factor_sizes(a, b) == [9, 5, 12] and two_factor_sizes(a, b, True) == [9, 5, 12, 1]
    packed = pack_two_factor(a, b)
    for sizes, other in (([9, 4, 12, 0], packed), ([9, 5, 12], packed[:-4].clone()), ([9, 5, 12], x)):
        with pytest.raises(RuntimeError, match="two_factor_linear_packed: "):
            OPS.two_factor_linear_packed(x, other, bias, sizes)
    with pytest.raises(RuntimeError, match=r"for inference only; .* use two_factor_linear"):
        jvp(lambda x: OPS.two_factor_linear_packed(x, packed, bias, [9, 5, 12, 0]), (x,), (x,))
    with pytest.raises(ValueError, match=r"two_factor_linear: b must be \[R, in\] with R = 5, got \[4, 12\]"):
        pack_two_factor(a, b[1:])


def call(**changes: Any) -> Tensor:
    arguments = {"x": torch.zeros(7, 6), "a": torch.zeros(8, 3), "b": torch.zeros(3, 6)}
    return two_factor_linear(**(arguments | changes))  # type: ignore[arg-type]


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x no tensor": (lambda: call(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x a number": (lambda: call(x=torch.zeros(())), ValueError, "x must be [..., in], got []"),
    "a no tensor": (lambda: call(a=None), TypeError, "a must be a tensor, got NoneType"),
    "a's dims": (lambda: call(a=torch.zeros(3)), ValueError, "a must be [out, R], got [3]"),
    "b's dims": (lambda: call(b=torch.zeros(3, 6, 1)), ValueError, "b must be [R, in], got [3, 6, 1]"),
    "rank": (
        lambda: call(b=torch.zeros(4, 6)),
        ValueError,
        "b must be [R, in] with R = 3, got [4, 6]",
    ),
    "rank 0": (
        lambda: call(a=torch.zeros(8, 0), b=torch.zeros(0, 6)),
        ValueError,
        "a must be [out, R] with R >= 1, got [8, 0]",
    ),
    "features": (
        lambda: call(x=torch.zeros(7, 5)),
        ValueError,
        "b must be [R, in] with in = 5, got [3, 6]",
    ),
    "bias's dims": (lambda: call(bias=torch.zeros(8, 1)), ValueError, "bias must be [out], got [8, 1]"),
    "bias's length": (
        lambda: call(bias=torch.zeros(7)),
        ValueError,
        "bias must be [out] with out = 8, got [7]",
    ),
    "dtype": (
        lambda: call(a=torch.zeros(8, 3).double()),
        TypeError,
        "a must have x's dtype torch.float32, got torch.float64",
    ),
    "device": (
        lambda: call(b=torch.zeros(3, 6, device="meta")),
        ValueError,
        "b must be on x's device cpu, got meta",
    ),
    "integers": (
        lambda: two_factor_linear(*(torch.zeros(s, dtype=torch.int64) for s in ((7, 6), (8, 3), (3, 6)))),
        TypeError,
        "x must be of a floating dtype, got torch.int64",
    ),
    "backend": (
        lambda: call(backend="fast"),
        ValueError,
        "backend must be None, 'native' or 'reference', got 'fast'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    made, kind, text = BAD[name]
    assert raised(made) == (kind.__name__, f"two_factor_linear: {text}")
