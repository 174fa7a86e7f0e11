"""The chain of products against its oracle, and as a citizen of torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chain_problems import PROGRAMS, ChainArguments, ChainCase, chain_gradients, chain_oracle
from pair_problems import PAIR_LAYOUTS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import Program, Step, chain
from tensorcomp_ext.ops.chain import differentiable_chain, program_numbers

OPS = torch.ops.tensorcomp
CALLS: dict[str, Callable[[ChainArguments], Tensor]] = {
    "op": lambda a: OPS.chain(a.x, a.matrices, a.bias, program_numbers(a.program)),
    "function": lambda a: chain(a.x, a.matrices, a.bias, program=a.program),
    "plan": lambda a: differentiable_chain(a.x, a.matrices, a.bias, program_numbers(a.program)),
}
every_way = pytest.mark.parametrize("way", ["op", "function"])
all_ways = pytest.mark.parametrize("way", CALLS)
all_programs = pytest.mark.parametrize("program", PROGRAMS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS: list[tuple[int, ...]] = [(), (1,), (0,), (3, 5), (2, 0, 3), (33,)]


def with_x(arguments: ChainArguments, x: Tensor) -> ChainArguments:
    return ChainArguments(x, arguments.matrices, arguments.bias, arguments.program)


def by_index(a: ChainArguments) -> Tensor:
    """One row at a time, one einsum a step, every dim a letter."""
    results = []
    for row in a.x.reshape(-1, a.program.in_features):
        z = row.reshape(a.program.dims)
        for matrix, (contracted, new, order) in zip(a.matrices, a.program.steps, strict=True):
            old = "abcdefgh"[: z.dim()]
            brought = "stuvwxyz"[: len(new)]
            summed = "".join(old[place] for place in contracted)
            arranged = [letter for letter in old if letter not in summed] + list(brought)
            result = "".join(arranged[place] for place in order)
            core = matrix.reshape(*new, *(z.shape[place] for place in contracted))
            z = torch.einsum(f"{old},{brought}{summed}->{result}", z, core)
        results.append(z.flatten() + (0 if a.bias is None else a.bias))
    return torch.stack(results)


@all_programs
def test_the_oracle_sums_what_the_program_says(program: str) -> None:
    arguments = ChainCase(program, (3,)).make(torch.float64)
    assert relative(chain_oracle(arguments), by_index(arguments)) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@all_programs
def test_matches_reference(program: str, layout: str, dtype: torch.dtype, isa: str) -> None:
    arguments = ChainCase(program, layout=layout).make(dtype)
    expected = chain_oracle(arguments)
    for way in ("op", "function"):
        y = CALLS[way](arguments)
        assert y.dtype == dtype and y.is_contiguous()
        # Every step's result may be rounded to the dtype.
        assert relative(y, expected) <= len(arguments.matrices) * FORWARD_TOLERANCE[dtype], way


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("program", ["pair", "odd train", "ring"])
def test_any_number_of_rows(program: str, bias: bool, rows: tuple[int, ...], isa: str) -> None:
    arguments = ChainCase(program, rows, bias).make()
    y = CALLS["op"](arguments)
    assert y.shape == (*rows, arguments.program.out_features)
    assert relative(y, chain_oracle(arguments)) <= FORWARD_TOLERANCE[torch.float32]


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@all_programs
def test_gradients(program: str, layout: str, isa: str) -> None:
    arguments = ChainCase(program, layout=layout).make().leaves()
    for way in CALLS:
        y = CALLS[way](arguments)
        dy = torch.randn(y.shape[::-1]).permute(*range(y.dim())[::-1])
        found = torch.autograd.grad(y, arguments.tensors, dy)
        for ours, right in zip(found, chain_gradients(arguments, dy), strict=True):
            assert relative(ours, right) <= GRADIENT_TOLERANCE[torch.float32], way


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("program", ["pair", "odd train", "ring"])
def test_gradients_of_any_number_of_rows(
    program: str, dtype: torch.dtype, rows: tuple[int, ...], isa: str
) -> None:
    arguments = ChainCase(program, rows).make(dtype).leaves()
    y = CALLS["op"](arguments)
    dy = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, arguments.tensors, dy)
    for ours, right in zip(found, chain_gradients(arguments, dy), strict=True):
        assert ours.dtype == dtype and relative(ours, right) <= GRADIENT_TOLERANCE[dtype]


@all_ways
def test_only_the_gradients_asked_for(way: str) -> None:
    arguments = ChainCase(rows=(2, 3)).make()
    dy = torch.randn(2, 3, arguments.program.out_features)
    expected = chain_gradients(arguments, dy)
    numbers = program_numbers(arguments.program)
    for needed in itertools.product((False, True), repeat=len(expected)):
        mask = sum(n << bit for bit, n in enumerate(needed))
        found = OPS.chain_backward(dy, arguments.x, arguments.matrices, numbers, mask)
        assert len(found) == len(expected)
        for ours, right, wanted in zip(found, expected, needed, strict=True):
            assert ours.shape == (right.shape if wanted else (0,))
            assert not wanted or relative(ours, right) <= 1e-5, needed
        leaves = arguments.leaves(needed)
        y = CALLS[way](leaves)
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(dy)
        assert tuple(t.grad is not None for t in leaves.tensors) == needed


@all_ways
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("program", ["last dim first", "back to all"])
def test_float64_derivatives(way: str, bias: bool, program: str) -> None:
    arguments = ChainCase(program, (2,), bias).make(torch.float64).leaves()

    def call(*tensors: Tensor) -> Tensor:
        x, *others = tensors
        of_bias = others.pop(0) if bias else None
        return CALLS[way](ChainArguments(x, others, of_bias, arguments.program))

    assert torch.autograd.gradcheck(call, arguments.tensors)
    assert torch.autograd.gradgradcheck(call, arguments.tensors)


@pytest.mark.parametrize(
    "case", [ChainCase(), ChainCase("pair", (2, 3), False, "turned"), ChainCase("ring", (0,))], ids=str
)
def test_opcheck(case: ChainCase) -> None:
    a, numbers = case.make().leaves(), program_numbers(PROGRAMS[case.program])
    torch.library.opcheck(OPS.chain.default, (a.x, a.matrices, a.bias, numbers))
    plain = case.make()
    dy = torch.randn_like(chain(plain.x, plain.matrices, plain.bias, program=plain.program))
    for mask in (-1, 0b1001, 0b0110):
        torch.library.opcheck(
            OPS.chain_backward.default,
            (dy, plain.x, plain.matrices, numbers, mask),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
@all_programs
def test_fake_results_have_the_form_of_real_ones(program: str, layout: str) -> None:
    a, numbers = ChainCase(program, layout=layout).make(), program_numbers(PROGRAMS[program])
    y = OPS.chain(a.x, a.matrices, a.bias, numbers)
    calls: list[tuple[Any, list[Any]]] = [(OPS.chain, [a.x, a.matrices, a.bias, numbers])]
    calls += [(OPS.chain_backward, [y, a.x, a.matrices, numbers, mask]) for mask in (-1, 6)]
    for op, arguments in calls:
        with FakeTensorMode() as mode:
            fake = [torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, part) for part in arguments]
            fakes = op(*fake)
        reals = op(*arguments)
        pairs = [(reals, fakes)] if isinstance(reals, Tensor) else zip(reals, fakes, strict=True)
        for real, shadow in pairs:
            assert (real.shape, real.dtype) == (shadow.shape, shadow.dtype)
            assert real.is_contiguous() and shadow.is_contiguous()


@every_way
def test_compiles_whole_with_any_batch(way: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    program = PROGRAMS["train"]
    numbers = program_numbers(program)

    def call(x: Tensor, bias: Tensor, *matrices: Tensor) -> Tensor:
        if way == "op":
            return OPS.chain(x, matrices, bias, numbers) + 1
        return chain(x, matrices, bias, program=program) + 1

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for n in (11, 2, 13):
        tensors = ChainCase(rows=(n, 3)).make().leaves().tensors
        found, expected = compiled(*tensors), call(*tensors)
        assert relative(found.detach(), expected.detach()) <= 1e-6
        ours, theirs = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one, other) <= 1e-5
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_exports_with_any_batch() -> None:
    arguments = ChainCase().make()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = torch.nn.ParameterList(arguments.matrices)
            self.bias = torch.nn.Parameter(arguments.bias)

        def forward(self, x: Tensor) -> Tensor:
            return chain(x, list(self.matrices), self.bias, program=PROGRAMS["train"])

    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Layer(), (arguments.x,), dynamic_shapes=dynamic).module()
    rows = torch.randn(5, arguments.program.in_features)
    assert relative(exported(rows).detach(), chain_oracle(with_x(arguments, rows))) <= 1e-5


@every_way
def test_autocast(way: str) -> None:
    arguments = ChainCase(rows=(3, 4)).make().leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = CALLS[way](arguments)
        double = CALLS[way](arguments.exact())
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert relative(y.detach(), chain_oracle(arguments)) <= 2e-2
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, arguments.tensors, dy)
    for ours, right in zip(found, chain_gradients(arguments, dy), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, right) <= 4e-2


@every_way
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_transforms(way: str, mode: Callable[[], Any]) -> None:
    arguments = ChainCase().make()
    x, direction = arguments.x, torch.randn_like(arguments.x)

    def call(x: Tensor) -> Tensor:
        return CALLS[way](with_x(arguments, x))

    def exact(x: Tensor) -> Tensor:
        return chain_oracle(with_x(arguments, x))

    wanted, images = exact(x + direction) - exact(x), torch.stack([x, 2 * x])
    with mode():
        assert relative(jvp(call, (x,), (direction,))[1], wanted) <= 1e-5
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
            assert tangent is not None and relative(tangent, wanted) <= 1e-5
        assert relative(vmap(call)(images)[1], exact(images[1])) <= 1e-5
        found = vmap(grad(lambda x: call(x).square().sum()))(images)[1]
        right = chain_gradients(with_x(arguments, images[1]), 2 * exact(images[1]))[0]
        assert relative(found, right) <= 1e-5


def test_mapped_gradients() -> None:
    """The graph is made outside of the transform, its backward runs inside."""
    arguments = ChainCase().make().leaves()
    y = CALLS["plan"](arguments)
    several = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, arguments.matrices[1], several, is_grads_batched=True)[0]
    for ours, each in zip(found, several, strict=True):
        assert relative(ours, chain_gradients(arguments, each)[3]) <= 1e-5


def test_backends() -> None:
    arguments = ChainCase().make()
    found = chain(arguments.x, arguments.matrices, program=arguments.program, backend="reference")
    assert torch.equal(found, reference.chain(arguments.x, arguments.matrices, None, *arguments.program))
    double = arguments.exact()
    with pytest.raises(ValueError, match=r"chain: backend='native' cannot serve: "):
        chain(double.x, double.matrices, program=double.program, backend="native")


PROGRAM = Program((2, 3), (Step((0,), (4,), (1, 0)), Step((1,), (5,), (0, 1))))


def call(**changes: Any) -> Tensor:
    arguments = {
        "x": torch.zeros(7, 6),
        "matrices": [torch.zeros(4, 2), torch.zeros(5, 3)],
        "program": PROGRAM,
    }
    return chain(**(arguments | changes))  # type: ignore[arg-type]


def changed(step: Step, dims: tuple[int, ...] = (2, 3)) -> Program:
    return Program(dims, (step, *PROGRAM.steps[1:]))


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "x no tensor": (lambda: call(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "x a number": (
        lambda: call(x=torch.zeros(())),
        ValueError,
        "x must be [..., in_features] with in_features = 6, got []",
    ),
    "features": (
        lambda: call(x=torch.zeros(7, 5)),
        ValueError,
        "x must be [..., in_features] with in_features = 6, got [7, 5]",
    ),
    "no list": (
        lambda: call(matrices=torch.zeros(2, 4, 2)),
        TypeError,
        "matrices must be a list of tensors, got Tensor",
    ),
    "too few": (
        lambda: call(matrices=[torch.zeros(4, 2)]),
        ValueError,
        "matrices must be one for each of 2 steps, got 1",
    ),
    "dims": (
        lambda: call(matrices=[torch.zeros(8), torch.zeros(5, 3)]),
        ValueError,
        "matrices[0] must be [new, contracted], got [8]",
    ),
    "shape": (
        lambda: call(matrices=[torch.zeros(4, 2), torch.zeros(3, 5)]),
        ValueError,
        "matrices[1] must be [new, contracted] = [5, 3], got [3, 5]",
    ),
    "bias": (
        lambda: call(bias=torch.zeros(19)),
        ValueError,
        "bias must be [out_features] with out_features = 20, got [19]",
    ),
    "dtype": (
        lambda: call(matrices=[torch.zeros(4, 2), torch.zeros(5, 3).double()]),
        TypeError,
        "matrices[1] must have x's dtype torch.float32, got torch.float64",
    ),
    "device": (
        lambda: call(bias=torch.zeros(20, device="meta")),
        ValueError,
        "bias must be on x's device cpu, got meta",
    ),
    "integers": (
        lambda: call(
            x=torch.zeros(7, 6, dtype=torch.int64),
            matrices=[torch.zeros(s, dtype=torch.int64) for s in ((4, 2), (5, 3))],
        ),
        TypeError,
        "x must be of a floating dtype, got torch.int64",
    ),
    "contracted": (
        lambda: call(program=changed(Step((2,), (4,), (1, 0)))),
        ValueError,
        "step 0 must contract distinct dims of (2, 3), got (2,)",
    ),
    "order": (
        lambda: call(program=changed(Step((0,), (4,), (1, 1)))),
        ValueError,
        "step 0 must order 2 dims, got (1, 1)",
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
    assert raised(made) == (kind.__name__, f"chain: {text}")


@pytest.mark.parametrize("numbers", [[], [1], [1, 4], [1, 4, 1], [1, 4, 1, 1, 0, 1, 2, 1, 0, 9]], ids=str)
def test_the_op_refuses_what_is_no_program(numbers: list[int]) -> None:
    with pytest.raises((RuntimeError, ValueError), match="chain: program "):
        OPS.chain(torch.zeros(3, 4), [torch.zeros(2, 4)], None, numbers)
