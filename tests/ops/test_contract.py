"""The contraction of a network of cores against one sum over all labels, and as a citizen of torch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from contract_problems import CASES, LAYOUTS, ContractCase, laid, random_case
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from tucker2_bad_calls import raised
from tucker2_problems import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative

from tensorcomp_ext import _native, reference
from tensorcomp_ext.ops._contract_program import PairProgram, decode, fault, numbered
from tensorcomp_ext.ops.contract import contract, native_support

OPS = torch.ops.tensorcomp
every_case = pytest.mark.parametrize("name", CASES)
every_way = pytest.mark.parametrize("way", ["op", "function"])
RING = CASES["ring"]


def call(way: str, cores: Sequence[Tensor], case: ContractCase) -> Tensor:
    if way == "op":
        result: Tensor = OPS.contract(list(cores), case.program.encode())[0]
        return result
    return contract(cores, case.program)


def leaves(cores: Sequence[Tensor]) -> list[Tensor]:
    return [core.detach().requires_grad_() for core in cores]


@every_case
def test_the_oracle_sums_over_what_two_cores_share(name: str) -> None:
    case = CASES[name]
    cores = case.make(torch.float64)
    found = reference.contract(cores, *case.program)[-1]
    assert relative(found, case.exact(cores)) <= 1e-12


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(name: str, layout: str, isa: str) -> None:
    case = CASES[name]
    if layout == "slice" and "" in case.terms:
        pytest.skip("a number has no slice")
    cores = case.make(layout=layout)
    for way in ("op", "function"):
        result = call(way, cores, case)
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert relative(result, case.exact(cores)) <= FORWARD_TOLERANCE[torch.float32]


@every_case
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients(name: str, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    case = CASES[name]
    cores = leaves(case.make())
    for way in ("op", "function"):
        result = call(way, cores, case)
        assert relative(result.detach(), case.exact(cores).detach()) <= FORWARD_TOLERANCE[torch.float32]
        dy = laid(torch.randn(result.shape), "turned")
        found = torch.autograd.grad(result, cores, dy)
        for ours, right in zip(found, case.exact_gradients(cores, dy), strict=True):
            assert relative(ours, right) <= GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("seeds", [range(at, at + 20) for at in range(100, 180, 20)], ids=str)
def test_random_networks(seeds: Sequence[int]) -> None:
    for seed in seeds:
        case = random_case(seed)
        cores = leaves(case.make())
        result = contract(cores, case.program)
        assert relative(result.detach(), case.exact(cores).detach()) <= 1e-5, seed
        dy = torch.randn(result.shape)
        found = torch.autograd.grad(result, cores, dy)
        for ours, right in zip(found, case.exact_gradients(cores, dy), strict=True):
            assert relative(ours, right) <= 1e-4, seed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    cores = leaves(RING.make(dtype))
    assert not native_support(cores).ok
    for way in ("op", "function"):
        result = call(way, cores, RING)
        assert result.dtype == dtype and result.is_contiguous()
        assert relative(result.detach(), RING.exact(cores).detach()) <= 3 * FORWARD_TOLERANCE[dtype]
        dy = torch.randn(result.shape).to(dtype)
        for ours, right in zip(
            torch.autograd.grad(result, cores, dy), RING.exact_gradients(cores, dy), strict=True
        ):
            assert ours.dtype == dtype and relative(ours, right) <= 3 * GRADIENT_TOLERANCE[dtype]


def test_repeats_bit_by_bit() -> None:
    case = CASES["large ring"]
    torch.set_num_threads(2)
    cores = leaves(case.make())
    dy = torch.randn(call("op", cores, case).shape)
    first, *others = (
        [y, *torch.autograd.grad(y, cores, dy)] for y in (call("op", cores, case) for _ in range(3))
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@every_way
def test_only_the_gradients_asked_for(way: str) -> None:
    cores = RING.make()
    numbers = RING.program.encode()
    result, saved = OPS.contract(cores, numbers)
    dy = torch.randn(result.shape)
    expected = RING.exact_gradients(cores, dy)
    for needed in itertools.product((False, True), repeat=len(cores)):
        mask = sum(n << bit for bit, n in enumerate(needed))
        found = OPS.contract_backward(dy, cores, saved, numbers, mask)
        for ours, right, wanted in zip(found, expected, needed, strict=True):
            assert ours.shape == (right.shape if wanted else (0,))
            assert not wanted or relative(ours, right) <= 1e-5, needed
        some = [core.detach().requires_grad_(n) for core, n in zip(cores, needed, strict=True)]
        made = call(way, some, RING)
        assert made.requires_grad == any(needed)
        if any(needed):
            made.backward(dy)
        assert tuple(core.grad is not None for core in some) == needed


@every_way
def test_float64_derivatives(way: str) -> None:
    case = CASES["train"]
    cores = leaves(case.make(torch.float64))
    assert torch.autograd.gradcheck(lambda *cores: call(way, cores, case), cores)
    assert torch.autograd.gradgradcheck(lambda *cores: call(way, cores, case), cores)


@every_way
def test_second_derivatives_of_float32(way: str) -> None:
    cores = leaves(RING.make())

    def second(cores: Sequence[Tensor], result: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(result.square().sum(), cores[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), cores[1:])

    doubles = [core.detach().double().requires_grad_() for core in cores]
    for ours, right in zip(
        second(cores, call(way, cores, RING)), second(doubles, RING.exact(doubles)), strict=True
    ):
        assert relative(ours, right) <= 1e-4


@pytest.mark.parametrize("name", ["ring", "numbers", "matrix"])
def test_opcheck(name: str) -> None:
    case = CASES[name]
    cores, numbers = leaves(case.make()), case.program.encode()
    torch.library.opcheck(OPS.contract.default, (cores, numbers))
    plain = case.make()
    result, saved = OPS.contract(plain, numbers)
    for mask in (-1, 0b01, 0b10):
        torch.library.opcheck(
            OPS.contract_backward.default,
            (torch.randn_like(result), plain, saved, numbers, mask),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fake_results_have_the_form_of_real_ones(name: str, dtype: torch.dtype) -> None:
    cores, numbers = CASES[name].make(dtype, "turned"), CASES[name].program.encode()
    result, saved = OPS.contract(cores, numbers)
    calls: list[tuple[Any, list[Any]]] = [(OPS.contract, [cores, numbers])]
    calls += [(OPS.contract_backward, [result, cores, saved, numbers, mask]) for mask in (-1, 2)]
    for op, arguments in calls:
        with FakeTensorMode() as mode:
            fakes = op(
                *(torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, part) for part in arguments)
            )
        for real, shadow in zip(op(*arguments), fakes, strict=True):
            assert (real.shape, real.dtype) == (shadow.shape, shadow.dtype)
            assert real.is_contiguous() and shadow.is_contiguous()


@every_way
def test_compiles_whole(way: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(lambda *cores: call(way, cores, RING) + 1, fullgraph=True, backend=counter)
    cores = leaves(RING.make())
    found, expected = compiled(*cores), call(way, cores, RING) + 1
    assert relative(found.detach(), expected.detach()) <= 1e-6
    ours, theirs = (torch.autograd.grad(y.square().sum(), cores) for y in (found, expected))
    assert all(relative(one, other) <= 1e-5 for one, other in zip(ours, theirs, strict=True))
    assert counter.frame_count == 1
    torch.compiler.reset()


@every_way
def test_autocast(way: str) -> None:
    cores = leaves(RING.make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(way, cores, RING)
        double = call(way, [core.double() for core in cores], RING)
    assert result.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert relative(result.detach(), RING.exact(cores).detach()) <= 3e-2
    dy = torch.randn_like(result)
    for ours, right in zip(
        torch.autograd.grad(result, cores, dy), RING.exact_gradients(cores, dy), strict=True
    ):
        assert ours.dtype == torch.float32 and relative(ours, right) <= 5e-2


@every_way
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_transforms(way: str, mode: Callable[[], Any]) -> None:
    first, *rest = RING.make()
    direction, several = torch.randn_like(first), torch.stack([first, 2 * first])

    def of_first(core: Tensor) -> Tensor:
        return call(way, [core, *rest], RING)

    image = RING.exact([direction, *rest])
    with mode():
        assert relative(jvp(of_first, (first,), (direction,))[1], image) <= 1e-5
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(of_first(forward_ad.make_dual(first, direction))).tangent
            assert tangent is not None and relative(tangent, image) <= 1e-5
        assert relative(vmap(of_first)(several)[1], 2 * RING.exact([first, *rest])) <= 1e-5
        found = vmap(grad(lambda core: of_first(core).square().sum()))(several)[1]
    right = RING.exact_gradients([first, *rest], 4 * RING.exact([first, *rest]))[0]
    assert relative(found, right) <= 1e-5


@every_way
def test_mapped_gradients(way: str) -> None:
    """The graph is made outside of the transform, its backward runs inside."""
    cores = leaves(RING.make())
    result = call(way, cores, RING)
    several = torch.randn(3, *result.shape)
    found = torch.autograd.grad(result, cores[1], several, is_grads_batched=True)[0]
    for ours, each in zip(found, several, strict=True):
        assert relative(ours, RING.exact_gradients(cores, each)[1]) <= 1e-5


def test_backends() -> None:
    cores = RING.make()
    assert torch.equal(
        contract(cores, RING.program, backend="reference"), reference.contract(cores, *RING.program)[-1]
    )
    if _native.status().ok:
        assert relative(contract(cores, RING.program, backend="native"), RING.exact(cores)) <= 1e-5
    with pytest.raises(ValueError, match=r"contract: backend='native' cannot serve: "):
        contract(RING.make(torch.float64), RING.program, backend="native")
    with pytest.raises(
        ValueError, match=r"contract: backend must be None, 'native' or 'reference', got 'fast'"
    ):
        contract(cores, RING.program, backend="fast")


def test_empty_cores() -> None:
    case = ContractCase("ab,bc->ac", (3, 0, 4), ((0, 1),))
    cores = leaves(case.make())
    result = call("op", cores, case)
    assert torch.equal(result, torch.zeros(3, 4))
    assert all(g.numel() == 0 for g in torch.autograd.grad(result, cores, torch.ones(3, 4)))


# --- programs ---


@every_case
def test_programs_survive_encoding(name: str) -> None:
    program = CASES[name].program
    assert fault(program) == "" and decode(program.encode()) == program
    assert len(program.encode()) == 2 * len(program.labels)


def test_what_the_op_does_not_take() -> None:
    pair, sizes = ((0, 1),), dict.fromkeys(range(14), 2) | {13: 1}
    assert numbered(((7, 9), (9, 4)), (4, 7), pair, sizes) == PairProgram(((1, 2), (2, 3)), (3, 1), pair)
    assert numbered(((0, 1), (1, 13)), (0,), pair, sizes) == PairProgram(((1, 2), (2, 3)), (1,), pair)
    assert numbered(((0, 1), (1, 2)), (0,), pair, sizes) is None  # summed alone
    assert numbered(((0, 1), (1, 2)), (0, 1, 2), pair, sizes) is None  # shared and kept
    assert numbered(((0, 1), (1,), (1, 2)), (0, 2), ((0, 1), (2, 3)), sizes) is None  # in three cores
    assert numbered(((0, 1, 0), (1, 2)), (2,), pair, sizes) is None  # a trace
    assert numbered((tuple(range(13)), (0,)), tuple(range(1, 13)), pair, sizes) is None
    many = tuple((at, at + 1) for at in range(13))
    assert numbered(many, (0, 13), [(0, 1), *((at, 11 + at) for at in range(2, 13))], sizes) is None


def bad_call(**changes: Any) -> Tensor:
    arguments = {
        "cores": [torch.zeros(4, 2), torch.zeros(2, 3)],
        "program": CASES["matrix"].program,
    } | changes
    return contract(**arguments)


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cores": torch.zeros(2, 2)}, TypeError, "contract: cores must be a list of tensors, got Tensor"),
    ({"cores": [torch.zeros(4, 2), 3]}, TypeError, "contract: cores[1] must be a tensor, got int"),
    ({"cores": [torch.zeros(4, 2)]}, ValueError, "contract: cores must be 2 tensors, got 1"),
    (
        {"cores": [torch.zeros(4, 2), torch.zeros(2)]},
        ValueError,
        "contract: cores[1] must have 2 modes, got [2]",
    ),
    (
        {"cores": [torch.zeros(4, 2), torch.zeros(3, 3)]},
        ValueError,
        "contract: cores[1] must have size 2 in mode 0, got [3, 3]",
    ),
    (
        {"program": PairProgram(((1, 2), (2, 3)), (1,), ((0, 1),))},
        ValueError,
        "contract: cores[1] must have size 1 in mode 1, which nothing else has, got [2, 3]",
    ),
    (
        {"cores": [torch.zeros(4, 2), torch.zeros(2, 3).double()]},
        TypeError,
        "contract: cores[1] must have the dtype of the first torch.float32, got torch.float64",
    ),
    (
        {"cores": [torch.zeros(4, 2), torch.zeros(2, 3, device="meta")]},
        ValueError,
        "contract: cores[1] must be on the first one's device cpu, got meta",
    ),
    (
        {"cores": [torch.zeros(4, 2).int(), torch.zeros(2, 3).int()]},
        TypeError,
        "contract: cores must be of a floating dtype, got torch.int32",
    ),
    (
        {"program": PairProgram(((1, 2), (2, 3)), (1, 2, 3), ((0, 1),))},
        ValueError,
        "contract: program: pair 0 must share no label that something else has, got {1, 2} and {2, 3}",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    assert raised(lambda: bad_call(**changes)) == (error.__name__, message)


def test_hostile_programs() -> None:
    """Any numbers at all are either the program of these cores or an error."""
    draw = random.Random(0)
    cores = RING.make()
    good = RING.program.encode()
    result, saved = OPS.contract(cores, good)
    for _ in range(400):
        numbers = list(good)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(numbers))
            numbers[at] = draw.choice([0, 1, -1, 31, 1 << 62, -(1 << 63), good[at] ^ 1 << draw.randrange(20)])
        if draw.random() < 0.3:
            numbers = numbers[: draw.randrange(len(numbers))]
        try:
            program = decode(numbers)
        except ValueError:
            program = None
        for attempt in (
            lambda numbers=numbers: OPS.contract(cores, numbers),
            lambda numbers=numbers: OPS.contract_backward(result, cores, saved, numbers, -1),
        ):
            try:
                attempt()
                assert program is not None
            except (ValueError, RuntimeError):
                pass


@pytest.mark.parametrize("what", ["grad", "saved", "saved dtype", "saved strides", "core"])
def test_hostile_backward(what: str) -> None:
    cores, numbers = RING.make(), RING.program.encode()
    result, saved = OPS.contract(cores, numbers)
    given = {
        "grad": (result[:-1], cores, saved),
        "saved": (result, cores, saved[:-1]),
        "saved dtype": (result, cores, saved.double()),
        "saved strides": (result, cores, saved[:1].expand(saved.numel())),
        "core": (result, [cores[0][..., :-1], *cores[1:]], saved),
    }[what]
    if not _native.status().ok and what.startswith("saved"):
        pytest.skip("the oracle saves for nobody")
    with pytest.raises((RuntimeError, ValueError)):
        OPS.contract_backward(*given, numbers, -1)
