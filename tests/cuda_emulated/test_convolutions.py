"""Convolutions of the emulated CUDA ops against the float64 oracle: sizes, windows, layouts, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bottleneck_problems import (
    BOTTLENECK_GEOMETRIES,
    BOTTLENECK_SIZES,
    DEPTHWISE,
    FORMS,
    RING,
    BottleneckCase,
)
from cuda_problems import MODES, convolution
from emulated_problems import (
    CONVOLUTIONS,
    SMALL,
    check_forward,
    check_gradients,
    far_apart,
    inside,
    of,
    random_grad,
    shifted,
    turned,
)
from tucker2_problems import GEOMETRIES, LAYOUTS, SIZES

modes = pytest.mark.parametrize("mode", MODES)
dense = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
forms = pytest.mark.parametrize("form", FORMS, ids=["plain", "ring", "depthwise"])

FULL = [of(case) for case in SIZES + GEOMETRIES]
ONES = {
    "one channel in": {"c_in": 1},
    "one channel out": {"c_out": 1},
    "one row": {"size": (1, 7)},
    "one column": {"size": (7, 1)},
    "one pixel": {"size": (1, 1)},
    "one image of one channel": {"n": 1, "c_in": 1, "c_out": 1},
    "one element": {"n": 1, "c_in": 1, "c_out": 1, "size": (1, 1)},
}
"""Sizes of one, where strides mean nothing."""


def in_turn(cases: list[BottleneckCase]) -> list[tuple[BottleneckCase, str]]:
    """Each case in float32 and in one other mode, with x contiguous in one and channels-last in one."""
    others = [mode for mode in MODES if mode != "float32"]
    orders = ("contiguous", "channels_last")
    return [
        (case.but(layout=orders[(i + turn) % 2]), mode)
        for i, case in enumerate(cases)
        for turn, mode in enumerate(("float32", others[i % len(others)]))
    ]


@pytest.mark.parametrize(("case", "mode"), in_turn(FULL), ids=str)
def test_tucker2(emulated: Any, case: BottleneckCase, mode: str) -> None:
    problem = convolution(case, mode, "cpu")
    check_forward(emulated, problem)
    check_gradients(emulated, problem)


@pytest.mark.parametrize(
    ("case", "mode"), in_turn([*FORMS, *BOTTLENECK_SIZES, *BOTTLENECK_GEOMETRIES]), ids=str
)
def test_bottleneck(emulated: Any, case: BottleneckCase, mode: str) -> None:
    problem = convolution(case, mode, "cpu", op="bottleneck_conv2d")
    check_forward(emulated, problem)
    check_gradients(emulated, problem)


@modes
@dense
@forms
@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(emulated: Any, n: int, form: BottleneckCase, layout: str, mode: str) -> None:
    problem = convolution(form.but(n=n, layout=layout), mode, "cpu")
    check_forward(emulated, problem)
    check_gradients(emulated, problem)


@modes
@forms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x_and_grad(emulated: Any, layout: str, form: BottleneckCase, mode: str) -> None:
    """Slices of larger tensors, permuted and expanded ones, of both or of one beside dense memory."""
    form = form.but(stride=(1, 2), n=3)
    strided = convolution(form.but(layout=layout), mode, "cpu")
    y = check_forward(emulated, strided)
    grad = LAYOUTS[layout](tuple(y.shape), MODES[mode])
    check_gradients(emulated, strided, grad)
    other = convolution(form.but(layout="channels_last"), mode, "cpu")
    check_gradients(emulated, other, grad)


@pytest.mark.parametrize("sizes", ONES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_of_one(emulated: Any, layout: str, sizes: str) -> None:
    for form, mode in zip(FORMS, ("float32", "bfloat16", "bfloat16"), strict=True):
        problem = convolution(form.but(layout=layout, **ONES[sizes]), mode, "cpu")
        y = check_forward(emulated, problem)
        check_gradients(emulated, problem, LAYOUTS[layout](tuple(y.shape), MODES[mode]))


@modes
@pytest.mark.parametrize("start", [0, 1, 2, 4, 8])
def test_channels_that_start_anywhere(emulated: Any, start: int, mode: str) -> None:
    """Vector loads need addresses and steps of 16 bytes: slices of channels with and without them."""
    for width in (24, 25, 28):
        problem = convolution(BottleneckCase(c_in=16, c_out=16), mode, "cpu")

        def sliced(image: torch.Tensor, width: int = width) -> torch.Tensor:
            n, c, h, w = image.shape
            wide = image.new_full((n, h, w, width), float("nan")).permute(0, 3, 1, 2)
            return wide[:, start : start + c].copy_(image)

        problem = problem.but([sliced(problem.given["x"]), *problem.tensors[1:]])
        check_forward(emulated, problem)
        check_gradients(emulated, problem, sliced(random_grad(problem)))


@modes
@dense
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_memory_one_element_off(emulated: Any, name: str, layout: str, mode: str) -> None:
    """No tensor starts at an address that vector loads could use, and NaN lies on both sides of each."""
    problem = CONVOLUTIONS[name](mode)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, *weights = problem.tensors
    assert x is not None
    x = shifted(x.contiguous(memory_format=form))
    moved = problem.but([x, *(t if t is None else shifted(t) for t in weights)])
    assert all(t.data_ptr() % 16 for t in moved.given.values())
    check_forward(emulated, moved)
    check_gradients(emulated, moved, shifted(random_grad(moved).contiguous(memory_format=form)))


@modes
@pytest.mark.parametrize("view", [inside, turned])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_of_any_strides(emulated: Any, name: str, view: Any, mode: str) -> None:
    """The bias too is every other element of a larger one."""
    problem = CONVOLUTIONS[name](mode)
    constant = inside(torch.randn(SMALL.c_out).to(MODES[mode]))
    weights = [view(t) for t in problem.tensors[1:4] if t is not None]
    assert not any(t.is_contiguous() for t in (*weights, constant))
    strided = problem.but([problem.tensors[0], *weights, constant])
    check_forward(emulated, strided)
    check_gradients(emulated, strided)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_expanded_weights(emulated: Any, name: str) -> None:
    problem = CONVOLUTIONS[name]("float32")
    single = [torch.randn([1] * t.dim()).expand(t.shape) for t in problem.tensors[1:4] if t is not None]
    expanded = problem.but([problem.tensors[0], *single, torch.randn(1).expand(SMALL.c_out)])
    check_forward(emulated, expanded)
    check_gradients(emulated, expanded)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_elements_far_apart(emulated: Any, name: str) -> None:
    """Strides of more than 32 bits, of every dimension in turn."""
    for dim in range(4):
        problem = CONVOLUTIONS[name]("float16")
        problem = problem.but([far_apart(problem.given["x"], dim), *problem.tensors[1:]])
        check_forward(emulated, problem)
        check_gradients(emulated, problem, far_apart(random_grad(problem), dim))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_lazily_negated_memory(emulated: Any, name: str) -> None:
    """Of a conjugated complex tensor torch keeps the sign of the imaginary part aside."""
    problem = CONVOLUTIONS[name]("float32")
    x = torch.view_as_complex(torch.randn(*problem.given["x"].shape, 2)).conj().imag
    assert x.is_neg()
    problem = problem.but([x, *problem.tensors[1:]])
    check_forward(emulated, problem)
    check_gradients(emulated, problem)


@modes
@pytest.mark.parametrize("padding", [[3, 0, 1, 2], [0, 2, 0, 0], [0, 0, 0, 5], [4, 4, 0, 1]], ids=str)
def test_four_paddings(emulated: Any, padding: list[int], mode: str) -> None:
    """As the op takes them: top, bottom, left, right."""
    for form in (SMALL, RING, DEPTHWISE):
        problem = convolution(form.but(padding=padding, stride=2, layout="channels_last"), mode, "cpu")
        assert problem.rest[1] == padding
        check_forward(emulated, problem)
        check_gradients(emulated, problem)


@pytest.mark.parametrize("spelling", [([2], [1], [1]), ([2, 2], [1, 1], [1, 1])], ids=str)
def test_one_int_is_a_pair(emulated: Any, spelling: tuple[list[int], ...]) -> None:
    made = SMALL.but(stride=2).make()
    y = emulated.tucker2_conv2d(*made.tensors, *spelling)
    whole = emulated.tucker2_conv2d(*made.tensors, [2, 2], [1, 1, 1, 1], [1, 1])
    assert torch.equal(y, whole)
    grad = torch.randn(y.shape)
    for one, both in zip(
        emulated.tucker2_conv2d_backward(grad, *made.tensors[:4], *spelling, 31),
        emulated.tucker2_conv2d_backward(grad, *made.tensors[:4], [2, 2], [1, 1, 1, 1], [1, 1], 31),
        strict=True,
    ):
        assert torch.equal(one, both)


@modes
@pytest.mark.parametrize(("rank_in", "rank_out"), [(600, 3), (3, 600), (130, 140)])
def test_ranks_of_hundreds(emulated: Any, rank_in: int, rank_out: int, mode: str) -> None:
    case = SMALL.but(n=1, size=(2, 3), rank_in=rank_in, rank_out=rank_out, kernel=(1, 2), padding=0)
    problem = convolution(case, mode, "cpu")
    check_forward(emulated, problem)
    check_gradients(emulated, problem)


@modes
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_one_bad_pixel_stays_where_it_is(emulated: Any, value: str, name: str, mode: str) -> None:
    """Pixels that no tap brings together do not mix, not even as products with zero."""
    problem = CONVOLUTIONS[name](mode)
    x = problem.given["x"].clone()
    x[1, 3, 2, 4] = float(value)
    poisoned = problem.but([x, *problem.tensors[1:]])
    touched = ~poisoned.oracle().isfinite()
    y = getattr(emulated, problem.op)(*poisoned.arguments())
    assert touched.any() and not touched.all()
    assert torch.equal(~y.isfinite(), touched)
    clean = problem.oracle()
    error = (y.double() - clean)[~touched].norm() / clean[~touched].norm()
    assert error <= 1e-2
