"""Backward's ways to work: bands of rows in either form, and whole images in one or several groups.

Which way a problem takes is the kernel's choice, by sizes; these sizes reach every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from tucker2_problems import DTYPES, LAYOUTS, Case

from tensorcomp_ext import reference

pytestmark = pytest.mark.native

CASES = {
    # Weights too large for a private cache: whole images, some at a time.
    "several-groups": Case(n=6, c_in=256, c_out=192, size=(14, 14), rank_in=70, rank_out=60, bias=False),
    "several-groups-strided": Case(
        n=9, c_in=300, c_out=200, size=(23, 19), rank_in=70, rank_out=61, stride=2, bias=False
    ),
    "several-groups-dilated": Case(
        n=5, c_in=200, c_out=210, size=(12, 13), rank_in=72, rank_out=64, padding=2, dilation=2, bias=False
    ),
    # Few rows for each thread: whole images.
    "few-rows": Case(n=1, c_in=33, c_out=65, size=(7, 7), rank_in=31, rank_out=39),
    "weights-against-padding": Case(
        n=1, c_in=8, c_out=9, size=(3, 4), rank_in=90, rank_out=80, padding=(4, 5), stride=(3, 2)
    ),
    "weights-stride-beyond-kernel": Case(
        n=1, c_in=9, c_out=8, size=(9, 8), rank_in=190, rank_out=180, kernel=(2, 1), stride=(3, 4), padding=0
    ),
    # Ranks that fill vectors badly: bands of [rank][pixel].
    "lines": Case(n=4, c_in=24, c_out=40, size=(33, 40), rank_in=6, rank_out=5),
    "lines-strided-rows": Case(n=4, c_in=17, c_out=33, size=(34, 48), rank_in=7, rank_out=3, stride=(2, 1)),
    "lines-dilated": Case(
        n=3, c_in=16, c_out=20, size=(30, 48), rank_in=5, rank_out=9, padding=(4, 2), dilation=(3, 2)
    ),
    "lines-even-kernel": Case(
        n=5, c_in=20, c_out=12, size=(25, 32), rank_in=9, rank_out=6, kernel=(2, 4), padding=[0, 2, 3, 1]
    ),
    "lines-narrow": Case(n=20, c_in=32, c_out=32, size=(16, 16), rank_in=12, rank_out=12),
    # Ranks that fill them: bands of [pixel][rank].
    "columns": Case(n=3, c_in=40, c_out=24, size=(30, 21), rank_in=16, rank_out=32, stride=(1, 2)),
}
LAYOUT_NAMES = ("contiguous", "channels_last", "channel_slice", "every_other")
MASKS = (0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b10000, 0b01001, 0b00110, 0b01010)


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def oracle(case: Case, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in tensors]
    y = reference.tucker2_conv2d(*leaves, None, case.stride, case.padding, case.dilation)
    return [*torch.autograd.grad(y, leaves, grad.double()), grad.double().sum((0, 2, 3))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("name", CASES)
def test_every_wanted_gradient_matches_the_oracle(
    isa: str, name: str, layout: str, dtype: torch.dtype, threads: int
) -> None:
    case = CASES[name].but(layout=layout)
    arguments = case.make(dtype)
    tensors = [t for t in arguments.tensors[:4] if t is not None]
    window = [list(g) for g in arguments.geometry]
    y = torch.ops.tensorcomp.tucker2_conv2d(*tensors, None, *window)
    grad = LAYOUTS[layout](tuple(y.shape), dtype)
    expected = oracle(case, tensors, grad)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    for mask in MASKS:
        found = torch.ops.tensorcomp.tucker2_conv2d_backward(grad, *tensors, *window, mask)
        for bit, (got, want) in enumerate(zip(found, expected, strict=True)):
            if not mask >> bit & 1:
                assert got.numel() == 0
                continue
            assert got.shape == want.shape
            # Sums over all pixels may cancel: a bias gradient is held to the size of what was summed.
            scale = grad.double().norm() if bit == 4 else want.norm()
            assert float((got.double() - want).norm()) <= allowed * float(scale), (bit, bin(mask))


def one_column(n: int, channels: int, height: int, width: int) -> Tensor:
    """Of a wider image, so that rows and the one pixel of each have the same stride."""
    return torch.randn(n, channels, height, 3 * width)[..., ::3]


@pytest.mark.parametrize("spread", ["one number for all", "one column"])
@pytest.mark.parametrize("rank", [4, 5, 16])
def test_images_one_pixel_wide(isa: str, rank: int, spread: str, threads: int) -> None:
    """Their pixels' own stride says nothing: what follows is the next row, at any distance."""
    case = Case(n=2, c_in=6, c_out=9, size=(40, 1), rank_in=rank, rank_out=rank, bias=False)
    tensors = [one_column(2, 6, 40, 1), *(t for t in case.make().tensors[1:4] if t is not None)]
    grad = torch.randn(()).expand(2, 9, 40, 1) if spread == "one number for all" else one_column(2, 9, 40, 1)
    found = torch.ops.tensorcomp.tucker2_conv2d_backward(grad, *tensors, [1, 1], [1, 1], [1, 1], 0b11111)
    for got, want in zip(found, oracle(case, tensors, grad), strict=True):
        assert float((got.double() - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize("name", ["several-groups", "lines", "columns"])
def test_gradients_are_the_same_bits_at_every_call(name: str, threads: int) -> None:
    arguments = CASES[name].make()
    tensors = [t for t in arguments.tensors[:4] if t is not None]
    window = [list(g) for g in arguments.geometry]
    grad = torch.randn_like(torch.ops.tensorcomp.tucker2_conv2d(*tensors, None, *window))
    first = torch.ops.tensorcomp.tucker2_conv2d_backward(grad, *tensors, *window, 0b11111)
    for _ in range(5):
        again = torch.ops.tensorcomp.tucker2_conv2d_backward(grad, *tensors, *window, 0b11111)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
