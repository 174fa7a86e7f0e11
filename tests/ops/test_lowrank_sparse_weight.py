"""The low-rank + sparse weight against its dense formula, and as a citizen of torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lowrank_sparse_problems import EVERY_WEIGHT, LAYOUTS, WeightCase, dense_weight
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import lowrank_sparse_weight, pack_mask
from tensorcomp_ext.ops.lowrank_sparse_weight import native_support

OPS = torch.ops.tensorcomp
MODES = ("additive", "masking")


def by_function(tensors: list[Tensor], mode: str, **options: Any) -> Tensor:
    a, b, values, mask = tensors
    return lowrank_sparse_weight(a, b, values, mask, mode=mode, **options)


def by_op(tensors: list[Tensor], mode: str) -> Tensor:
    return OPS.lowrank_sparse_weight(*tensors, mode == "masking")


WAYS = {"function": by_function, "op": by_op}
every_way = pytest.mark.parametrize("way", WAYS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_case = pytest.mark.parametrize("case", EVERY_WEIGHT, ids=str)
LAID_OUT = [c.but(layout=layout) for layout in LAYOUTS[1:] for c in EVERY_WEIGHT[::5]]
every_layout = pytest.mark.parametrize("case", [*EVERY_WEIGHT, *LAID_OUT], ids=str)


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def leaves(tensors: list[Tensor], needed: tuple[bool, ...] = (True,) * 3) -> list[Tensor]:
    """The same with factors and values that ask for gradients where ``needed``, their strides kept."""
    return [t.detach().requires_grad_(n) for t, n in zip(tensors, (*needed, False), strict=True)]


def dense_gradients(tensors: list[Tensor], mode: str, dw: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a, b and values in float64."""
    exact = [t.detach().double().requires_grad_() for t in tensors[:3]]
    w = dense_weight(*exact, tensors[3], mode)
    return torch.autograd.grad(w, exact, dw.double())


@every_mode
@every_case
def test_the_oracle_is_the_formula(case: WeightCase, mode: str) -> None:
    a, b, values, mask = case.make(torch.float64)
    found = reference.lowrank_sparse_weight(a, b, values, mask, mode == "masking")
    assert relative(found, dense_weight(a, b, values, mask, mode)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
@every_layout
def test_matches_reference(case: WeightCase, mode: str, dtype: torch.dtype, device: str, isa: str) -> None:
    tensors = case.make(dtype, device)
    expected = dense_weight(*tensors, mode)
    for name, way in WAYS.items():
        w = way(tensors, mode)
        assert w.dtype == dtype and w.is_contiguous()
        assert relative(w, expected) <= FORWARD_TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@every_mode
@every_case
def test_other_dtypes(case: WeightCase, mode: str, dtype: torch.dtype) -> None:
    tensors = case.make(dtype)
    for way in WAYS.values():
        w = way(tensors, mode)
        assert w.dtype == dtype and relative(w, dense_weight(*tensors, mode)) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_mode
@every_layout
def test_gradients(case: WeightCase, mode: str, dtype: torch.dtype, device: str, isa: str) -> None:
    tensors = leaves(case.make(dtype, device))
    w = by_function(tensors, mode)
    for layout in (torch.randn(w.shape), torch.randn(w.shape[::-1]).t(), torch.randn(()).expand(w.shape)):
        dw = layout.to(device, dtype)
        expected = dense_gradients(tensors, mode, dw)
        found = torch.autograd.grad(w, tensors[:3], dw, retain_graph=True)
        for name, ours, exact in zip("ABS", found, expected, strict=True):
            assert ours.dtype == dtype
            assert relative(ours, exact) <= GRADIENT_TOLERANCE[dtype], name


@every_mode
def test_what_is_pruned_takes_no_gradient_and_is_not_looked_at(mode: str, isa: str) -> None:
    case = WeightCase(m=30, n=50)
    for bits in (False, True):
        a, b, values, mask = case.make()
        hidden = torch.where(mask, values, torch.nan).requires_grad_()
        given = pack_mask(mask) if bits else mask
        w = lowrank_sparse_weight(a, b, hidden, given, mode=mode)
        assert relative(w.detach(), dense_weight(a, b, values, mask, mode)) <= 1e-6
        w.sum().backward()
        assert hidden.grad is not None and torch.equal(hidden.grad, mask.float())


@every_mode
def test_the_ends_of_the_mask(mode: str, isa: str) -> None:
    a, b, values, mask = WeightCase(m=21, n=45).make()
    none, every = torch.zeros_like(mask), torch.ones_like(mask)
    assert relative(lowrank_sparse_weight(a, b, values, none, mode=mode), a @ b) <= 1e-6
    whole = lowrank_sparse_weight(a, b, values, every, mode=mode)
    assert relative(whole, values + (a @ b if mode == "additive" else 0)) <= 1e-6


def test_bits_behind_the_last_column_mean_nothing(isa: str) -> None:
    tensors = leaves(WeightCase(m=15, n=43, bits=True).make())
    dirty = [*tensors[:3], tensors[3] | torch.tensor([0] * 5 + [0b11111000], dtype=torch.uint8)]
    for mode in MODES:
        one, other = by_function(tensors, mode), by_function(dirty, mode)
        assert torch.equal(one, other)
        pairs = (torch.autograd.grad(w.square().sum(), t[:3]) for w, t in ((one, tensors), (other, dirty)))
        assert all(map(torch.equal, *pairs))


@every_mode
def test_only_the_gradients_asked_for(mode: str, device: str, isa: str) -> None:
    tensors = WeightCase(m=20, n=37).make(device=device)
    dw = torch.randn(20, 37, device=device)
    expected = dense_gradients(tensors, mode, dw)
    a, b, _, mask = tensors
    for needed in itertools.product((False, True), repeat=3):
        bits = sum(n << bit for bit, n in enumerate(needed))
        found = OPS.lowrank_sparse_weight_backward(dw, a, b, mask, mode == "masking", bits)
        for gradient, exact, wanted in zip(found, expected, needed, strict=True):
            assert gradient.shape == (exact.shape if wanted else (0,))
            assert not wanted or relative(gradient, exact) <= 1e-5
        ours = leaves(tensors, needed)
        w = by_function(ours, mode)
        assert w.requires_grad == any(needed)
        if any(needed):
            w.backward(dw)
        assert tuple(t.grad is not None for t in ours[:3]) == needed


@every_way
@every_mode
@pytest.mark.parametrize("bits", [False, True])
def test_float64_derivatives(way: str, mode: str, bits: bool) -> None:
    *tensors, mask = leaves(WeightCase(m=3, n=4, rank=2, bits=bits).make(torch.float64))

    def call(*tensors: Tensor) -> Tensor:
        return WAYS[way]([*tensors, mask], mode)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@every_mode
def test_float32_gradients_can_be_differentiated(mode: str, device: str) -> None:
    def squared(tensors: list[Tensor]) -> Tensor:
        w = by_function(tensors, mode)
        (first,) = torch.autograd.grad((w**2).sum(), tensors[0], create_graph=True)
        return torch.autograd.grad((first**2).sum(), tensors[2])[0]

    tensors = leaves(WeightCase().make(device=device))
    exact = leaves([t.double() if t.is_floating_point() else t for t in tensors])
    assert relative(squared(tensors), squared(exact)) <= 1e-4


@every_mode
@pytest.mark.parametrize("case", EVERY_WEIGHT[::4], ids=str)
def test_opcheck(case: WeightCase, mode: str, device: str) -> None:
    tensors = case.make(device=device)
    masking = mode == "masking"
    torch.library.opcheck(OPS.lowrank_sparse_weight.default, (*leaves(tensors), masking))
    dw = torch.randn(case.m, case.n, device=device)
    for mask in (7, 0b101, 0b010):
        torch.library.opcheck(
            OPS.lowrank_sparse_weight_backward.default,
            (dw, *tensors[:2], tensors[3], masking, mask),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@every_layout
def test_fake_results_have_the_form_of_real_ones(case: WeightCase, device: str) -> None:
    a, b, values, mask = case.make(device=device)
    calls: list[tuple[Any, list[Any]]] = [(OPS.lowrank_sparse_weight, [a, b, values, mask, True])]
    calls += [(OPS.lowrank_sparse_weight_backward, [values, a, b, mask, False, m]) for m in (7, 2)]
    for op, arguments in calls:
        with FakeTensorMode() as mode:
            fakes = op(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments))
        reals = op(*arguments)
        pairs = [(reals, fakes)] if isinstance(reals, Tensor) else zip(reals, fakes, strict=True)
        for real, fake in pairs:
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
            assert real.is_contiguous() and fake.is_contiguous()


@every_way
@every_mode
def test_compiles_whole(way: str, mode: str, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: WAYS[way](list(t), mode) + 1, fullgraph=True, backend=counter)
    tensors = leaves(WeightCase(m=12, n=20).make(device=device))
    found, expected = compiled(*tensors), WAYS[way](tensors, mode) + 1
    assert relative(found.detach(), expected.detach()) <= 1e-6
    ours, theirs = (torch.autograd.grad(w.square().sum(), tensors[:3]) for w in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) <= 1e-5
    assert counter.frame_count == 1
    torch.compiler.reset()


class Weight(torch.nn.Module):
    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList(tensors[:3])
        self.register_buffer("mask", tensors[3])

    def forward(self, x: Tensor) -> Tensor:
        return x @ lowrank_sparse_weight(*self.parts, self.mask, mode="masking").t()


def test_exports() -> None:
    module = Weight(WeightCase().make())
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(module, (torch.randn(4, 13),), dynamic_shapes=dynamic)
    x = torch.randn(9, 13)
    assert relative(program.module()(x).detach(), module(x).detach()) <= 1e-6


@every_way
@every_mode
def test_function_transforms(way: str, mode: str, device: str) -> None:
    a, b, values, mask = WeightCase().make(device=device)

    def call(a: Tensor) -> Tensor:
        return WAYS[way]([a, b, values, mask], mode)

    exact = dense_weight(a, b, values, mask, mode)
    change = dense_weight(2 * a, b, values, mask, mode) - exact
    both = vmap(call)(torch.stack([a, 2 * a]))
    assert relative(both, torch.stack([exact, exact + change])) <= 1e-6
    assert relative(jvp(call, (a,), (a,))[1], change) <= 1e-5
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(a, a))).tangent
        assert tangent is not None and relative(tangent, change) <= 1e-5
    found = grad(lambda a: call(a).square().sum())(a)
    assert relative(found, dense_gradients([a, b, values, mask], mode, 2 * exact)[0]) <= 1e-5


def test_mapped_gradients(device: str, isa: str) -> None:
    """The graph is made outside of the transform, its backward runs inside."""
    tensors = leaves(WeightCase().make(device=device))
    w = by_function(tensors, "masking")
    several = torch.randn(3, *w.shape, device=device)
    found = torch.autograd.grad(w, tensors[:3], several, is_grads_batched=True)
    for at, each in enumerate(several):
        for ours, exact in zip(found, dense_gradients(tensors, "masking", each), strict=True):
            assert relative(ours[at], exact) <= 1e-5


@every_way
def test_autocast_changes_nothing(way: str) -> None:
    for dtype in (torch.float32, torch.float64):
        tensors = WeightCase().make(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            w = WAYS[way](tensors, "additive")
        assert w.dtype == dtype and torch.equal(w, WAYS[way](tensors, "additive"))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_and_reproducible(isa: str, dtype: torch.dtype, threads: int) -> None:
    tensors = leaves(WeightCase(m=301, n=530, rank=21).make(dtype))
    dw = torch.randn(301, 530).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mode in MODES:
            runs = []
            for _ in range(2):
                w = by_function(tensors, mode)
                runs.append([w, *torch.autograd.grad(w, tensors[:3], dw)])
            assert all(map(torch.equal, *runs))
            assert relative(runs[0][0], dense_weight(*tensors, mode).detach()) <= FORWARD_TOLERANCE[dtype]
            for ours, exact in zip(runs[0][1:], dense_gradients(tensors, mode, dw), strict=True):
                assert relative(ours, exact) <= GRADIENT_TOLERANCE[dtype]
    finally:
        torch.set_num_threads(before)


def test_forced_backends() -> None:
    tensors = WeightCase().make(torch.float64)
    assert not native_support(*tensors[:2]).ok
    kind, text = raised(lambda: by_function(tensors, "masking", backend="native"))
    assert kind == "ValueError" and text.startswith("lowrank_sparse_weight: backend='native' cannot serve: ")
    exact = dense_weight(*tensors, "masking")
    assert relative(by_function(tensors, "masking", backend="reference"), exact) <= 1e-12
    single = WeightCase().make()
    if native_support(*single[:2]).ok:
        native, slow = (by_function(single, "masking", backend=b) for b in ("native", "reference"))
        assert relative(native, slow) <= 1e-6
    assert not native_support(*WeightCase(m=0).make()[:2]).ok


def test_arguments() -> None:
    a, b, values, mask = WeightCase().make()

    def said(a: Any = a, b: Any = b, values: Any = values, mask: Any = mask, mode: Any = "masking") -> str:
        return raised(lambda: lowrank_sparse_weight(a, b, values, mask, mode=mode))[1]

    name = "lowrank_sparse_weight: "
    assert said([1]) == name + "a must be a tensor, got list"
    assert said(a[0]) == name + "a must be [m, r], got [3]"
    assert said(a[:, :0]) == name + "b must be [r, n] with r = 0, got [3, 13]"
    assert said(b=b[:2]) == name + "b must be [r, n] with r = 3, got [2, 13]"
    assert said(values=values[:, 1:]) == name + "values must be [m, n] = [9, 13], got [9, 12]"
    assert said(b=b.double()) == name + "b must have a's dtype torch.float32, got torch.float64"
    assert said(values=values.to("meta")) == name + "values must be on a's device cpu, got meta"
    assert said(a.long(), b.long(), values.long()) == name + "a must be of a floating dtype, got torch.int64"
    assert said(mask=mask[1:]) == name + "mask of dtype bool must be [m, n] = [9, 13], got [8, 13]"
    assert said(mask=pack_mask(mask)[:, 1:]).endswith("must be [m, ceil(n / 8)] = [9, 2], got [9, 1]")
    assert said(mask=mask.int()).endswith(
        "mask must be bool, or uint8 as pack_mask makes it, got torch.int32"
    )
    assert said(mode="add") == name + "mode must be 'additive' or 'masking', got 'add'"
    assert raised(lambda: by_function([a, b, values, mask], "masking", backend="gpu"))[1] == (
        name + "backend must be None, 'native' or 'reference', got 'gpu'"
    )
