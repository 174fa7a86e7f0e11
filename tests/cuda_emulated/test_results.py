"""Results of the emulated CUDA ops: their memory, masks, what goes to the reference, the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_problems import DEPTHWISE, FORMS, PLAIN, RING
from cuda_problems import MODES, Problem, convolution, pair
from emulated_problems import (
    EVERY_OP,
    backward,
    check_like_fake,
    compare_gradients,
    forward,
    geometry,
    mallopt,
    no_reference,
    pair_problem,
    random_grad,
)
from pair_problems import PAIR_LAYOUTS, PairCase
from tucker2_problems import LAYOUTS, relative

from tensorcomp_ext import reference

names = pytest.mark.parametrize("name", EVERY_OP)
modes = pytest.mark.parametrize("mode", MODES)
SHAPES = [
    {},
    {"c_in": 1, "c_out": 1},
    {"size": (1, 6)},
    {"size": (6, 1)},
    {"size": (1, 1)},
    {"n": 1},
    {"n": 1, "c_in": 1, "c_out": 1, "size": (1, 1)},
    {"n": 0},
    {"n": 0, "c_in": 1},
]


# --- shapes, strides, dtypes ---


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_are_like_their_fakes(emulated: Any, layout: str, sizes: dict[str, Any]) -> None:
    for form in (PLAIN, RING):  # tucker2_conv2d and bottleneck_conv2d
        problem = convolution(form.but(layout=layout, **sizes), "float16", "cpu")
        with no_reference():
            y = forward(emulated, problem)
            grad = torch.randn(y.shape).to(y)
            check_like_fake(problem.op, y, *problem.arguments())
            for mask in (31, 0):
                arguments = problem.backward_arguments(grad, mask)
                found = getattr(emulated, f"{problem.op}_backward")(*arguments)
                check_like_fake(f"{problem.op}_backward", found, *arguments)


@pytest.mark.parametrize("rows", [(), (1,), (4,), (0,), (3, 5), (2, 0, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_pairs_are_like_their_fakes(emulated: Any, layout: str, rows: tuple[int, ...]) -> None:
    problem = pair_problem(PairCase(rows=rows, layout=layout), "bfloat16")
    y = forward(emulated, problem)
    grad = torch.randn(y.shape).to(y)
    check_like_fake(problem.op, y, *problem.arguments())
    for mask in (15, 1, 0):
        arguments = problem.backward_arguments(grad, mask)
        found = emulated.two_factor_linear_backward(*arguments)
        check_like_fake("two_factor_linear_backward", found, *arguments)


# --- masks ---


@names
def test_every_mask(emulated: Any, name: str) -> None:
    """What is asked for agrees with the oracle, the rest is empty; with no bit set nothing is computed."""
    problem = EVERY_OP[name]("float32")
    grad = random_grad(problem)
    for mask in range(1 << len(problem.names)):
        with no_reference():
            found = backward(emulated, problem, grad, mask)
        compare_gradients(problem, grad, found, mask)


@names
@pytest.mark.parametrize("mask", [0, 1, 8])
def test_masks_of_nothing_to_sum(emulated: Any, name: str, mask: int) -> None:
    """No images, no rows: what is asked for is zero."""
    problem = EVERY_OP[name]("float32")
    empty = problem.but([problem.given["x"][:0], *problem.tensors[1:]])
    found = backward(emulated, empty, random_grad(problem)[:0], mask)
    compare_gradients(empty, random_grad(problem)[:0], found, mask)


# --- precision ---


@names
def test_float32_is_rounded_where_that_is_allowed_and_nowhere_else(emulated: Any, name: str) -> None:
    """TF32 keeps 10 bits: what a call with ``allow_tf32`` multiplies is off by more than float32 may be."""
    exact, rounded = EVERY_OP[name]("float32"), EVERY_OP[name]("tf32")
    rounded = rounded.but(exact.tensors)
    grad = random_grad(exact)
    expected = (exact.oracle(), *exact.oracle_gradients(grad).values())[: len(exact.names)]
    for problem, least, most in ((exact, 0.0, 1e-6), (rounded, 1e-5, 2e-3)):
        found = (forward(emulated, problem), *backward(emulated, problem, grad))
        for part, ours, theirs in zip(("y", *exact.names), found, expected, strict=False):
            assert least <= relative(ours, theirs) <= most, part


# --- determinism ---


@modes
@names
def test_the_same_bits_whatever_memory_held(emulated: Any, name: str, mode: str) -> None:
    """Scratch and results are written before they are read, and sums are in one order."""
    problem = EVERY_OP[name](mode)
    grad = random_grad(problem)
    runs = []
    for byte in (0x00, 0xFF, 0x3C, 0x7B):  # zero, NaN, about one, large
        with mallopt(byte):
            runs.append((forward(emulated, problem), *backward(emulated, problem, grad)))
    for run in runs[1:]:
        for part, once, again in zip(("y", *problem.names), runs[0], run, strict=True):
            assert torch.equal(once, again), part


def test_many_tiles_and_splits_give_the_same_bits(emulated: Any) -> None:
    problem = convolution(PLAIN.but(n=3, size=(23, 19), stride=(1, 2)), "float32", "cpu")
    grad = random_grad(problem)
    for once, again in zip(backward(emulated, problem, grad), backward(emulated, problem, grad), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("byte", [0x00, 0x3C, 0xFF])
def test_fresh_memory_holds_what_the_tests_ask_for(byte: int) -> None:
    """Else the tests that rely on it could not fail."""
    with mallopt(byte) as works:
        if not works:
            pytest.skip("this C library is not glibc: fresh memory cannot be filled")
        for size in (5000, 100_000, 10_000_000):
            assert torch.empty(size, dtype=torch.uint8).eq(byte).all()


# --- what goes to the reference ---


def served_by_reference(ops: Any, problem: Problem) -> None:
    """Forward and backward fail where the reference does, and give its results where it does not."""
    x = problem.given["x"]
    grad = random_grad(problem)
    for call, op in (
        (lambda: forward(ops, problem), problem.op),
        (lambda: backward(ops, problem, grad), f"{problem.op}_backward"),
    ):
        with no_reference() as called, pytest.raises(RuntimeError):
            call()
        assert called == [op]
    y = forward(ops, problem)
    expected = getattr(torch.ops.tensorcomp, f"{problem.op}_reference")(*problem.arguments())
    assert y.dtype == x.dtype and torch.equal(y, expected)
    mask = (1 << len(problem.names)) - 1
    gradients = getattr(torch.ops.tensorcomp, f"{problem.op}_backward_reference")
    expected = gradients(*problem.backward_arguments(grad, mask))
    for name, ours, theirs in zip(problem.names, backward(ops, problem, grad), expected, strict=True):
        assert torch.equal(ours, theirs), name


@names
def test_float64(emulated: Any, name: str) -> None:
    problem = EVERY_OP[name]("float32")
    double = problem.but([t if t is None else t.double() for t in problem.tensors])
    served_by_reference(emulated, double)


# Shared memory holds a tile of 16 pixels in rank space, of some thousand ranks.
LARGE = {
    "rank_in": PLAIN.but(rank_in=6000, rank_out=2, kernel=(1, 1), size=(2, 2), padding=0),
    "rank_out": PLAIN.but(rank_in=2, rank_out=6000, kernel=(1, 1), size=(2, 2), padding=0),
    "ring": RING.but(ring=400, rank_in=12, rank_out=1, size=(2, 2)),
    "depthwise": DEPTHWISE.but(rank_in=6000, size=(2, 2)),
}


@modes
@pytest.mark.parametrize("name", LARGE)
def test_ranks_beyond_shared_memory(emulated: Any, name: str, mode: str) -> None:
    problem = convolution(LARGE[name], mode, "cpu", op="bottleneck_conv2d")
    served_by_reference(emulated, problem)
    if name.startswith("rank"):
        served_by_reference(emulated, convolution(LARGE[name], mode, "cpu"))


@modes
def test_pairs_of_ranks_beyond_shared_memory(emulated: Any, mode: str) -> None:
    served_by_reference(emulated, pair((3,), 4, 6000, 5, mode, "cpu"))


@pytest.mark.parametrize("empty", ["c_in", "c_out"])
def test_pairs_without_features(emulated: Any, empty: str) -> None:
    served_by_reference(emulated, pair_problem(PairCase(rows=(2, 3)).but(**{empty: 0}), "float32"))


@modes
@pytest.mark.parametrize("name", ["rank_in", "rank_out"])
def test_packed_ranks_beyond_shared_memory_are_refused(emulated: Any, name: str, mode: str) -> None:
    """There is no reference that could take the packed form."""
    problem = convolution(LARGE[name], mode, "cpu")
    weights = emulated.tucker2_conv2d_pack(*problem.tensors[1:4])
    ints = geometry(problem, problem.tf32)
    with pytest.raises(RuntimeError, match=r"tucker2_conv2d_packed: rank.* shared memory"):
        emulated.tucker2_conv2d_packed(problem.given["x"], weights, problem.tensors[4], ints)
    z = torch.randn(2, LARGE[name].rank_in, 2, 2).to(MODES[mode])
    with pytest.raises(RuntimeError, match=r"tucker2_conv2d_tail: rank.* shared memory"):
        emulated.tucker2_conv2d_tail(z, weights, problem.tensors[4], ints)
    x, a, b, bias = pair((3,), 4, 6000, 5, mode, "cpu").tensors
    with pytest.raises(RuntimeError, match=r"two_factor_linear_packed: .*rank.* shared memory"):
        emulated.two_factor_linear_packed(
            x, emulated.two_factor_linear_pack(a, b), bias, [5, 6000, 4, int(problem.tf32)]
        )


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=["plain", "ring", "depthwise"])
def test_images_without_pixels(emulated: Any, form: Any, size: tuple[int, int]) -> None:
    """Borders alone are convolved: the result is the bias."""
    problem = convolution(form.but(size=size, padding=2), "float32", "cpu")
    y = forward(emulated, problem)
    bias = problem.given["bias"]
    assert torch.equal(y, bias[:, None, None].expand(y.shape))
    found = backward(emulated, problem, torch.ones(y.shape))
    assert all(not g.any() for g in found[:4])
    assert torch.equal(found[4], torch.full_like(bias, y.numel() / len(bias)))


@pytest.mark.parametrize("channels", [(0, 6), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=["plain", "ring", "depthwise"])
def test_images_without_channels(emulated: Any, form: Any, channels: tuple[int, int]) -> None:
    problem = convolution(form.but(c_in=channels[0], c_out=channels[1]), "float32", "cpu")
    y = forward(emulated, problem)
    assert relative(y, problem.oracle()) == 0
    grad = random_grad(problem)
    compare_gradients(problem, grad, backward(emulated, problem, grad))


def test_reference_is_told_from_kernels() -> None:
    """The check that others rest on: a call of a reference is caught, and only then."""
    problem = EVERY_OP["pair"]("float32")
    with no_reference() as called, pytest.raises(RuntimeError):
        torch.ops.tensorcomp.two_factor_linear_reference(*problem.arguments())
    assert called == ["two_factor_linear"]
    y = torch.ops.tensorcomp.two_factor_linear_reference(*problem.arguments())
    assert relative(y, reference.two_factor_linear(*problem.tensors)) == 0  # type: ignore[arg-type]
