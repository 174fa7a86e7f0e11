"""Every CUDA kernel against the float64 oracle: sizes, windows, layouts, masks, dtypes."""

from __future__ import annotations

import pytest
import torch
from bottleneck_problems import BOTTLENECK_GEOMETRIES, BOTTLENECK_SIZES, DEPTHWISE, RING, BottleneckCase
from cuda_problems import (
    EVERY_OP,
    MODES,
    check_bitwise,
    check_differences,
    check_forward,
    check_gradients,
    check_masks,
    check_second_derivatives,
    convolution,
    misaligned,
    pair,
)
from tucker2_problems import GEOMETRIES, LAYOUTS, Case

modes = pytest.mark.parametrize("mode", MODES)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

BASE = BottleneckCase(n=3, c_in=17, c_out=16, size=(9, 11), rank_in=6, rank_out=17)


def of(case: Case) -> BottleneckCase:
    """The same case, for the functions that know rings and depthwise cores too."""
    return BottleneckCase(**vars(case))


SIZES = [
    *(BASE.but(rank_in=r, rank_out=r) for r in (1, 6, 16, 17, 31, 64, 65, 130)),
    *(BASE.but(rank_in=r, rank_out=q) for r, q in ((1, 130), (64, 7), (31, 39), (130, 1))),
    *(BASE.but(c_in=c) for c in (1, 7, 16, 129)),
    *(BASE.but(c_out=c) for c in (1, 7, 17, 129)),
    *(BASE.but(n=n) for n in (0, 1)),
    *(BASE.but(size=s) for s in ((1, 1), (1, 33), (33, 1), (16, 16), (40, 23))),
    BASE.but(c_in=64, c_out=64, size=(28, 28), rank_in=16, rank_out=16),
    BASE.but(n=1, c_in=512, c_out=512, size=(7, 7), rank_in=31, rank_out=39, bias=False),
    BASE.but(c_in=1, c_out=1, rank_in=1, rank_out=1, kernel=(1, 1), padding=0),
]
WINDOWS = [
    BASE.but(kernel=(1, 1), padding=0),
    BASE.but(kernel=(3, 1), padding=(1, 0)),
    BASE.but(kernel=(5, 5), padding=2),
    *(BASE.but(stride=s) for s in (2, 3, (1, 2))),
    BASE.but(dilation=2, padding=2),
    BASE.but(padding=[3, 0, 1, 2]),
    BASE.but(padding=(0, 4, 5, 0), stride=(2, 1), dilation=(1, 2)),
    BASE.but(padding=0),
    BASE.but(padding=9),
    *map(of, GEOMETRIES),
]
# rows, in, rank, out
PAIRS = [
    *(((33,), 17, r, 129) for r in (1, 6, 16, 17, 31, 64, 65, 130)),
    *(((5,), c, 6, 16) for c in (1, 7, 16, 17, 129, 1000)),
    *(((5,), 16, 6, c) for c in (1, 7, 16, 17, 129, 1000)),
    *((rows, 24, 8, 40) for rows in ((1,), (0,), (2, 0, 3), (3, 1, 5), (257,), ())),
    ((1,), 512, 64, 768),
    ((130,), 256, 256, 192),
]


@modes
@layouts
@pytest.mark.parametrize("case", SIZES + WINDOWS, ids=str)
def test_tucker2(cuda: str, case: BottleneckCase, layout: str, mode: str) -> None:
    problem = convolution(case.but(layout=layout), mode, cuda)
    check_forward(problem)
    check_gradients(problem)


@modes
@layouts
@pytest.mark.parametrize("case", BOTTLENECK_SIZES + BOTTLENECK_GEOMETRIES, ids=str)
def test_rings_and_depthwise_cores(cuda: str, case: BottleneckCase, layout: str, mode: str) -> None:
    problem = convolution(case.but(layout=layout), mode, cuda)
    check_forward(problem)
    check_gradients(problem)


@modes
@pytest.mark.parametrize(("rows", "c_in", "rank", "c_out"), PAIRS, ids=str)
def test_pair(cuda: str, rows: tuple[int, ...], c_in: int, rank: int, c_out: int, mode: str) -> None:
    for bias in (True, False):
        problem = pair(rows, c_in, rank, c_out, mode, cuda, bias=bias)
        check_forward(problem)
        check_gradients(problem)


@modes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", [BASE, RING, DEPTHWISE], ids=["tucker2", "ring", "depthwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x(cuda: str, layout: str, form: BottleneckCase, stride: int, mode: str) -> None:
    """Slices of larger tensors, permuted and expanded ones, without a contiguous copy by the caller."""
    problem = convolution(form.but(layout=layout, stride=stride), mode, cuda)
    check_forward(problem)
    check_gradients(problem)


@modes
@pytest.mark.parametrize("view", ["columns", "every other", "transposed", "expanded"])
def test_strides_of_a_pairs_x(cuda: str, view: str, mode: str) -> None:
    problem = pair((6, 10), 18, 7, 12, mode, cuda)
    dtype = MODES[mode]
    x = {
        "columns": lambda: torch.randn(6, 10, 25).to(cuda, dtype)[..., 3:21],
        "every other": lambda: torch.randn(6, 20, 36).to(cuda, dtype)[:, ::2, ::2],
        "transposed": lambda: torch.randn(18, 10, 6).to(cuda, dtype).permute(2, 1, 0),
        "expanded": lambda: torch.randn(6, 1, 18).to(cuda, dtype).expand(6, 10, 18),
    }[view]()
    problem = problem.but([x, *problem.tensors[1:]])
    check_forward(problem)
    check_gradients(problem)


@modes
@pytest.mark.parametrize("name", EVERY_OP)
def test_memory_one_element_off(cuda: str, name: str, mode: str) -> None:
    """No tensor starts at an address that vector loads could use."""
    problem = EVERY_OP[name](mode, cuda)
    moved = problem.but([t if t is None else misaligned(t) for t in problem.tensors])
    assert all(t.data_ptr() % 16 for t in moved.given.values())
    check_forward(moved)
    check_gradients(moved)


@modes
@pytest.mark.parametrize("name", EVERY_OP)
def test_weights_of_any_strides(cuda: str, name: str, mode: str) -> None:
    problem = EVERY_OP[name](mode, cuda)

    def scattered(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_empty([2 * n + 1 for n in t.shape]).permute(*reversed(range(t.dim())))
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
        return view.copy_(t)

    weights = [t if t is None else scattered(t) for t in problem.tensors[1:]]
    assert not any(t.is_contiguous() for t in weights if t is not None and t.numel() > 1)
    strided = problem.but([problem.tensors[0], *weights])
    check_forward(strided)
    check_gradients(strided)


@modes
@pytest.mark.parametrize("name", EVERY_OP)
class TestEveryOp:
    def test_every_mask(self, cuda: str, name: str, mode: str) -> None:
        check_masks(EVERY_OP[name](mode, cuda))

    def test_second_derivatives(self, cuda: str, name: str, mode: str) -> None:
        """Double backward goes to the oracle."""
        check_second_derivatives(EVERY_OP[name](mode, cuda))

    def test_bitwise_reproducible(self, cuda: str, name: str, mode: str) -> None:
        check_bitwise(EVERY_OP[name](mode, cuda))

    def test_native_code_serves(self, cuda: str, name: str, mode: str) -> None:
        """Small and middle sizes are the kernels' own; nothing here passes by way of the reference."""
        problem = EVERY_OP[name](mode, cuda)
        assert problem.support().ok, problem.support().reason
        check_forward(problem, backend="native")
        check_gradients(problem, backend="native")


@modes
@pytest.mark.parametrize("rank", [6, 16, 17, 31, 32, 64])
def test_native_code_serves_the_ranks_it_is_for(cuda: str, rank: int, mode: str) -> None:
    problem = convolution(BASE.but(rank_in=rank, rank_out=rank, c_in=64, c_out=64), mode, cuda)
    assert problem.support().ok, problem.support().reason
    check_forward(problem, backend="native")
    check_gradients(problem, backend="native")


@modes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_tiles(cuda: str, layout: str, mode: str) -> None:
    """More blocks than multiprocessors, sizes that no tile divides; sums over 100,000 pixels in backward."""
    case = BASE.but(n=33, size=(61, 53), c_in=65, c_out=67, rank_in=33, rank_out=31, layout=layout)
    problem = convolution(case, mode, cuda)
    check_forward(problem)
    check_gradients(problem)
    check_bitwise(problem, 2)


@modes
def test_many_rows(cuda: str, mode: str) -> None:
    problem = pair((100_003,), 65, 17, 67, mode, cuda)
    check_forward(problem)
    check_gradients(problem)
    check_bitwise(problem, 2)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("name", EVERY_OP)
def test_other_dtypes_take_the_oracle(cuda: str, name: str, dtype: torch.dtype) -> None:
    problem = EVERY_OP[name]("float32", cuda)
    double = problem.but([t if t is None else t.to(dtype) for t in problem.tensors])
    assert "float64" in double.support().reason
    assert torch.allclose(double.call(), double.oracle(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="cannot serve"):
        double.call(backend="native")


def test_float32_is_not_rounded_unless_torch_allows(cuda: str) -> None:
    """TF32 keeps 10 bits: where it is off the result must be far better than that."""
    problem = convolution(BASE.but(c_in=129, rank_in=64, rank_out=64), "float32", cuda)
    y = check_forward(problem)
    error = float((y.double() - problem.oracle()).norm() / problem.oracle().norm())
    assert error <= 1e-5


DIFFERENCES = {
    **{name: lambda device, make=make: make("float32", device) for name, make in EVERY_OP.items()},
    "tucker2 several tiles": lambda device: convolution(
        BASE.but(size=(35, 21), c_in=65, c_out=70, rank_in=33, rank_out=31, layout="channels_last"),
        "float32",
        device,
    ),
    "pair of many rows": lambda device: pair((300,), 72, 40, 96, "float32", device),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_gradients_are_differences_of_the_native_forward(cuda: str, name: str) -> None:
    """What gradcheck would do, had the kernels float64."""
    problem = DIFFERENCES[name](cuda)
    assert problem.support().ok, problem.support().reason
    check_differences(problem)
