"""The chain with matrices packed once, for inference, and what the kernel does with rows and threads."""

from __future__ import annotations

import random

import pytest
import torch
from chain_problems import PROGRAMS, ChainArguments, ChainCase, chain_oracle, pair, tensor_train_matrix
from torch import Tensor
from torch.func import jvp
from tucker2_problems import FORWARD_TOLERANCE, relative

from tensorcomp_ext import reference
from tensorcomp_ext.ops import Program, Step, chain
from tensorcomp_ext.ops.chain import bind_packed_chain, native_support, pack_chain, program_numbers

OPS = torch.ops.tensorcomp
pytestmark = pytest.mark.native
all_programs = pytest.mark.parametrize("program", PROGRAMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def packed_call(a: ChainArguments, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    return bind_packed_chain(pack_chain(a.matrices, a.program), a.program, relu=relu)(a.x, a.bias, residual)


def make(program: Program, rows: int) -> ChainArguments:
    matrices = [torch.randn(s) / s[1] ** 0.5 for s in program.matrix_shapes()]
    return ChainArguments(
        torch.randn(rows, program.in_features), matrices, torch.randn(program.out_features), program
    )


@dtypes
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 29)], ids=str)
@all_programs
def test_is_the_chain(program: str, rows: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    arguments = ChainCase(program, rows).make(dtype)
    y = packed_call(arguments)
    assert torch.equal(
        y, chain(arguments.x, arguments.matrices, arguments.bias, program=arguments.program, backend="native")
    )


@dtypes
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@all_programs
def test_residual_and_relu(program: str, bias: bool, relu: bool, dtype: torch.dtype, isa: str) -> None:
    arguments = ChainCase(program, (3, 5), bias).make(dtype)
    expected = chain_oracle(arguments)
    residual = torch.randn(expected.shape).to(dtype)
    expected = expected + residual.double()
    y = packed_call(arguments, residual.transpose(0, 1).contiguous().transpose(0, 1), relu)
    tolerance = len(arguments.matrices) * FORWARD_TOLERANCE[dtype]
    assert relative(y, expected.relu() if relu else expected) <= tolerance


def test_relu_alone_keeps_nan(isa: str) -> None:
    arguments = ChainCase("pair", (4,)).make()
    arguments.x[1, 0] = float("nan")
    y = packed_call(arguments, relu=True)
    assert torch.isnan(y[1]).all()
    assert relative(y[2], chain_oracle(arguments)[2].relu()) <= 1e-6 and bool((y[[0, 2, 3]] >= 0).all())


@dtypes
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3, 45, 131])
@pytest.mark.parametrize(
    "program", [pair(768, 31, 384), pair(96, 200, 700), tensor_train_matrix((8, 7), (9, 12), (1, 30, 1))]
)
def test_threads(program: Program, rows: int, threads: int, dtype: torch.dtype, isa: str) -> None:
    made = make(program, rows)
    arguments = ChainArguments(
        made.x.to(dtype),
        [m.to(dtype) for m in made.matrices],
        made.bias.to(dtype),
        program,  # type: ignore[union-attr]
    )
    torch.set_num_threads(threads)
    y = packed_call(arguments)
    assert relative(y, chain_oracle(arguments)) <= 2 * FORWARD_TOLERANCE[dtype]
    assert torch.equal(y, packed_call(arguments))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("program", [pair(2048, 700, 1100), pair(4096, 5, 1024)])
def test_large_matrices_and_strides(program: Program, threads: int) -> None:
    """Matrices beyond a private cache, and rows a multiple of its ways apart."""
    torch.set_num_threads(threads)
    for rows in (1, 17, 70):
        arguments = make(program, rows)
        assert relative(packed_call(arguments), chain_oracle(arguments)) <= 1e-5


def test_reads_rows_where_they_are(isa: str) -> None:
    arguments = ChainCase("train", (6,)).make()
    wide = torch.randn(4, 6, 2 * arguments.program.in_features)
    for x in (
        wide[..., : arguments.program.in_features],
        wide[0, ::2, 3 : 3 + arguments.program.in_features],
    ):
        moved = ChainArguments(x, arguments.matrices, arguments.bias, arguments.program)
        assert relative(packed_call(moved), chain_oracle(moved)) <= 1e-5


def test_packed_matrices_serve_their_program_alone(isa: str) -> None:
    arguments = ChainCase("train").make()
    x, numbers = arguments.x, program_numbers(arguments.program)
    packed = pack_chain(arguments.matrices, arguments.program)
    other = program_numbers(PROGRAMS["odd train"])
    for bad, of in ((packed, other), (packed[:-4].clone(), numbers), (x, numbers)):
        with pytest.raises(RuntimeError, match="chain_packed: "):
            OPS.chain_packed(x, bad, None, of)
    with pytest.raises(RuntimeError, match="chain_packed: bias must be"):
        OPS.chain_packed(x, packed, torch.zeros(3), numbers)
    with pytest.raises(RuntimeError, match="chain_packed: residual must have the result's shape"):
        OPS.chain_packed(x, packed, None, numbers, torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="chain_packed: the matrices were packed for another"):
        OPS.chain_packed(x.bfloat16(), packed, None, numbers)
    with pytest.raises(RuntimeError, match=r"for inference only; .* use chain"):
        jvp(lambda x: OPS.chain_packed(x, packed, None, numbers), (x,), (x,))
    with pytest.raises(ValueError, match=r"chain: matrices\[0\] must be"):
        pack_chain(arguments.matrices[::-1], arguments.program)


# Sizes that wrap to others in 64 bits or are negative, places that are not there, lists that are too long.
HOSTILE: dict[str, list[int]] = {
    "wraps to 0": [2, 2**32, 2**32, 1, 1, 0, 1, 3, 2, 0, 1],
    "wraps to 4": [2, 2**62 + 1, 4, 1, 1, 0, 1, 3, 2, 0, 1],
    "brings 0": [1, 4, 1, 1, 0, 2, 2**32, 2**32, 2, 0, 1],
    "a row in between": [
        1,
        1,
        3,
        *(1, 0, 1, 2**20, 1, 0),
        *(0, 3, 2**20, 2**20, 2**20, 4, 0, 1, 2, 3),
        1,
        0,
        0,
        0,
    ],
    "most of 64 bits": [1, 2**63 - 1, 1, 1, 0, 1, 2, 1, 0],
    "negative": [1, -4, 1, 1, 0, 1, 3, 1, 0],
    "brings less than none": [1, 4, 1, 1, 0, 1, -3, 1, 0],
    "no such place": [1, 4, 1, 1, 7, 1, 3, 1, 0],
    "a place below 0": [1, 4, 1, 1, -1, 1, 3, 1, 0],
    "orders what is not there": [1, 4, 1, 1, 0, 1, 3, 1, 5],
    "a list of 2**62": [2**62, 4],
    "2**62 steps": [1, 4, 2**62, 1, 0, 1, 3, 1, 0],
}


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("form", HOSTILE)
def test_hostile_programs(form: str, rows: int) -> None:
    numbers = HOSTILE[form]
    refuses = pytest.raises((RuntimeError, ValueError, OverflowError), match=r"chain|steps|program")
    packed = pack_chain([torch.zeros(3, 4)], Program((4,), (Step((0,), (3,), (0,)),)))
    for features in (0, 4):
        x, matrices = torch.zeros(rows, features), [torch.zeros(3, features)]
        with refuses:
            OPS.chain(x, matrices, None, numbers)
        with refuses:
            OPS.chain_backward(torch.zeros(rows, 3), x, matrices, numbers, -1)
        with refuses:
            OPS.chain_packed(x, packed, None, numbers)
        with refuses:
            OPS.chain_pack(matrices, numbers)
    with refuses:
        OPS.cuda_fits_chain(numbers, 4, 200_000)


def test_a_row_between_steps_that_no_memory_holds(isa: str) -> None:
    # Three small matrices bring a million values each, three more sum them away again.
    wide = 2**20
    brings = [[1, 0, 2, wide, 1, 2, 0, 1]] + [[1, k, 2, wide, 1, k + 2, *range(k + 2)] for k in (1, 2)]
    sums = [[1, k, 0, k, *range(k)] for k in (3, 2, 1)]
    numbers = [1, 1, 6] + [n for step in (*brings, *sums) for n in step]
    matrices = [torch.ones(wide, 1)] * 3 + [torch.ones(1, wide)] * 3
    for call in (
        lambda: OPS.chain_pack(matrices, numbers),
        lambda: OPS.cuda_fits_chain(numbers, 4, 200_000),
    ):
        with pytest.raises(RuntimeError, match="chain"):
            call()


@pytest.mark.parametrize("sizes", [(2**40, 2**40, 4), (-3, 2, 4), (3, 0, 4), (2**63 - 1, 2, 4)], ids=str)
def test_hostile_pairs(sizes: tuple[int, ...]) -> None:
    packed = OPS.two_factor_linear_pack(torch.zeros(3, 2), torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="two_factor_linear_packed: "):
        OPS.two_factor_linear_packed(torch.zeros(2, 4), packed, None, sizes)


def test_fake_packed_results() -> None:
    arguments = ChainCase("ring", (2, 3)).make()
    packed, numbers = pack_chain(arguments.matrices, arguments.program), program_numbers(arguments.program)
    torch.library.opcheck(
        OPS.chain_packed.default,
        (arguments.x, packed, arguments.bias, numbers),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_is_too_long_goes_to_the_oracle() -> None:
    steps = tuple(Step((0,), (3,), (0,)) for _ in range(13))
    many = Program((3,), steps)
    x, matrices = torch.randn(4, 3), [torch.randn(3, 3) for _ in steps]
    assert (
        native_support(x, matrices, many).reason
        == "the native kernels take 12 steps and dims, the program has 13"
    )
    assert torch.equal(chain(x, matrices, program=many), reference.chain(x, matrices, None, *many))
    assert torch.equal(
        OPS.chain(x, matrices, None, program_numbers(many)), reference.chain(x, matrices, None, *many)
    )
    with pytest.raises(ValueError, match=r"chain: backend='native' cannot serve: the native kernels take 12"):
        chain(x, matrices, program=many, backend="native")


def test_the_packed_program_is_read_where_none_is_given(isa: str) -> None:
    arguments = ChainCase("train").make()
    packed = pack_chain(arguments.matrices, arguments.program)
    y = OPS.chain_packed(arguments.x, packed, arguments.bias, [])
    assert relative(y, chain_oracle(arguments)) <= 1e-5
    assert torch.equal(packed, pack_chain(arguments.matrices, arguments.program))


def test_hostile_packed_programs() -> None:
    """Whatever a packed tensor says of itself, nothing is read outside it."""
    arguments = ChainCase("train").make()
    packed = pack_chain(arguments.matrices, arguments.program)
    draw = random.Random(0)
    words = packed[: packed.numel() // 8 * 8].view(torch.int64).numel()
    count = 8 + len(program_numbers(arguments.program))  # the header, then the program
    assert words > count
    for _ in range(300):
        bad = packed.clone()
        numbers = bad[: 8 * count].view(torch.int64)
        at = draw.randrange(count)
        numbers[at] = draw.choice([0, 1, -1, 7, 1 << 20, 1 << 62, -(1 << 63), int(numbers[at]) + 1])
        if draw.random() < 0.3:
            bad = bad[: draw.randrange(bad.numel())]
        try:
            OPS.chain_packed(arguments.x, bad, None, [])
        except RuntimeError:
            continue
        # The header's unused words, or a number that became what it was.
        assert torch.equal(bad[:64], packed[:64]) or at < 8
    longer = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    longer[1:] = packed
    with pytest.raises(RuntimeError, match="chain_packed: packed must come from"):
        OPS.chain_packed(arguments.x, longer[1:], None, [])


def test_more_programs_than_are_remembered() -> None:
    x = torch.randn(3, 6)
    for features in (*range(1, 150), 1, 2):
        program = Program((6,), (Step((0,), (features,), (0,)),))
        matrix = torch.randn(features, 6)
        y = OPS.chain_packed(x, pack_chain([matrix], program), None, [])
        torch.testing.assert_close(y, x @ matrix.T, rtol=1e-4, atol=1e-5)
