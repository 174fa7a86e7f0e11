"""Problems large enough to be worked in several bands and to ask for cache lines ahead."""

from __future__ import annotations

import pytest
import torch

from tensorcomp_ext import reference

pytestmark = pytest.mark.native

# shape of x, kernel, stride, padding, dilation: bands that lie wholly in the padding, rows and columns that
# no output reads (stride beyond the kernel), wide dilation, several bands of plain 3x3.
CASES = [
    ((1, 64, 16, 512), 5, 1, 2, 1),
    ((1, 64, 16, 512), 3, 1, 2, 2),
    ((1, 512, 33, 65), 3, 1, 6, 6),
    ((1, 512, 33, 65), 3, 1, 12, 12),
    ((1, 256, 65, 65), 3, 1, 18, 18),
    ((8, 64, 64, 64), 1, 2, 0, 1),
    ((8, 64, 64, 64), 2, 3, 0, 1),
    ((2, 32, 40, 300), 3, 2, 5, 3),
    ((1, 16, 200, 300), 3, 1, 1, 1),
]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation"), CASES)
def test_large_problems_match_the_oracle(shape, kernel, stride, padding, dilation, dtype, layout):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    core = (torch.randn(8, 8, kernel, kernel) / (8 * kernel)).to(dtype)
    factor_out, factor_in = torch.randn(24, 8).to(dtype), (torch.randn(shape[1], 8) / 8).to(dtype)
    window = ([stride] * 2, [padding] * 2, [dilation] * 2)
    leaves = [t.double().requires_grad_() for t in (x, core, factor_out, factor_in)]
    expected = reference.tucker2_conv2d(*leaves, None, *window)
    grad = torch.randn(expected.shape).to(dtype).contiguous(memory_format=layout)
    expected_gradients = torch.autograd.grad(expected, leaves, grad.double())
    forward, backward = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 2e-2)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y = torch.ops.tensorcomp.tucker2_conv2d(x, core, factor_out, factor_in, None, *window)
            assert relative(y, expected.detach()) < forward
            found = torch.ops.tensorcomp.tucker2_conv2d_backward(
                grad, x, core, factor_out, factor_in, *window, 0b11111
            )
            for got, wanted in zip(found, expected_gradients, strict=False):
                assert relative(got, wanted) < backward
    finally:
        torch.set_num_threads(threads)


def test_width_zero_with_an_expanded_row_stride():
    x = torch.empty(1, 3, 2, 0)[:, :, :1].expand(1, 3, 4, 0)
    y = torch.ops.tensorcomp.tucker2_conv2d(
        x, torch.ones(2, 2, 1, 1), torch.ones(5, 2), torch.ones(3, 2), torch.ones(5), [1], [1], [1]
    )
    assert y.shape == (1, 5, 6, 2) and bool((y == 1).all())
