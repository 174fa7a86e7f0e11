"""Properties of the Tucker-2 convolution over random shapes, windows, layouts and slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from tucker2_problems import (
    DTYPES,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    NAMES,
    Arguments,
    Case,
    relative,
)

from tensorcomp_ext.ops import tucker2_conv2d

pytestmark = pytest.mark.native

small = st.integers(1, 20)
pair = st.tuples(st.integers(1, 3), st.integers(1, 3))

cases = st.builds(
    Case,
    n=st.integers(0, 3),
    c_in=st.integers(1, 40),
    c_out=st.integers(1, 70),
    size=st.tuples(small, st.integers(1, 40)),
    rank_in=st.integers(1, 35),
    rank_out=st.integers(1, 50),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=pair,
    padding=st.tuples(*[st.integers(0, 6)] * 4),
    dilation=pair,
    bias=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
quiet = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


def fits(case: Case) -> bool:
    top, bottom, left, right = case.padding
    room = (case.size[0] + top + bottom, case.size[1] + left + right)
    return all(room[d] > case.dilation[d] * (case.kernel[d] - 1) for d in (0, 1))


def drawn(case: Case, dtype: torch.dtype) -> Arguments:
    """The same numbers whenever an example is run again, so that a failure can be shrunk."""
    torch.manual_seed(0)
    return case.make(dtype)


def dense_convolution(arguments: Arguments) -> torch.Tensor:
    x, core, factor_out, factor_in, bias = arguments.tensors
    weight = torch.einsum("tb,bayx,sa->tsyx", factor_out, core, factor_in)
    top, bottom, left, right = arguments.padding
    padded = F.pad(x, (left, right, top, bottom))
    return F.conv2d(padded, weight, bias, arguments.stride, 0, arguments.dilation)


@quiet
@given(case=cases, dtype=st.sampled_from(DTYPES), threads=st.sampled_from([1, 1, 1, 2]))
def test_equals_the_dense_convolution(isa: str, case: Case, dtype: torch.dtype, threads: int) -> None:
    assume(fits(case))
    arguments = drawn(case, dtype)
    expected = dense_convolution(arguments.double())
    torch.set_num_threads(threads)
    y = tucker2_conv2d(*arguments, backend="native")
    torch.set_num_threads(1)
    assert relative(y, expected) <= FORWARD_TOLERANCE[dtype]


@settings(quiet, max_examples=80)
@given(
    case=cases,
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 1, 1, 2]),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_gradients_equal_the_dense_convolutions(
    isa: str, case: Case, dtype: torch.dtype, threads: int, layout: str
) -> None:
    assume(fits(case))
    arguments = drawn(case, dtype)
    ours, theirs = arguments.leaves(), arguments.double().leaves()
    expected_y = dense_convolution(theirs)
    grad = LAYOUTS[layout](tuple(expected_y.shape), dtype)
    wanted = [i for i, t in enumerate(ours.tensors) if t is not None]
    expected = torch.autograd.grad(expected_y, [theirs[i] for i in wanted], grad.double())
    torch.set_num_threads(threads)
    found = torch.autograd.grad(tucker2_conv2d(*ours, backend="native"), [ours[i] for i in wanted], grad)
    torch.set_num_threads(1)
    for i, ours_i, theirs_i in zip(wanted, found, expected, strict=True):
        assert relative(ours_i, theirs_i) <= GRADIENT_TOLERANCE[dtype], NAMES[i]


@settings(quiet, max_examples=40)
@given(case=cases, dtype=st.sampled_from(DTYPES))
def test_neighbours_in_memory_do_not_matter(isa: str, case: Case, dtype: torch.dtype) -> None:
    """A slice gives what its copy of the same strides' order gives, NaN all around it or not."""
    assume(fits(case) and case.n > 0)
    arguments = drawn(case.but(layout="channels_last"), dtype)
    n, c, h, w = arguments.x.shape
    around = torch.full((n + 1, c + 3, h + 2, w + 3), torch.nan, dtype=dtype)
    for form in (torch.channels_last, torch.contiguous_format):
        larger = around.contiguous(memory_format=form)
        inside = larger[:n, 1 : 1 + c, 1 : 1 + h, 2 : 2 + w]
        inside.copy_(arguments.x)
        y = tucker2_conv2d(*arguments._replace(x=inside), backend="native")
        assert relative(y, dense_convolution(arguments.double())) <= FORWARD_TOLERANCE[dtype]
