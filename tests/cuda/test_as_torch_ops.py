"""The CUDA ops as citizens of torch: streams, graphs, no waiting, memory, devices, autocast."""

from __future__ import annotations

import pytest
import torch
from bottleneck_problems import BottleneckCase
from cuda_problems import (
    EVERY_OP,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    MODES,
    Problem,
    convolution,
    output_gradient,
    pair,
    step,
)
from torch import Tensor
from tucker2_problems import relative

modes = pytest.mark.parametrize("mode", MODES)
every_op = pytest.mark.parametrize("name", EVERY_OP)
BUSY_CYCLES = 50_000_000  # some tens of milliseconds
WARM_UP = 3


def warm(problem: Problem, grad: Tensor) -> None:
    """Everything that is done once: modules loaded, attributes of kernels set."""
    for _ in range(WARM_UP):
        step(problem, grad)
        with torch.no_grad():
            problem.call()
    torch.cuda.synchronize()


@every_op
@modes
def test_works_on_the_current_stream(cuda: str, name: str, mode: str) -> None:
    """The input is written late on a stream of its own; whoever works on another one reads zeros."""
    problem = EVERY_OP[name](mode, cuda)
    x, *weights = problem.tensors
    assert x is not None
    late = problem.but([torch.zeros_like(x), *weights]).leaves()
    grad = output_gradient(problem)
    warm(late, grad)
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        with torch.no_grad():
            late.given["x"].copy_(x)
        found = step(late, grad)
        event.record()
    torch.cuda.current_stream().wait_event(event)
    expected = (problem.oracle(), *problem.oracle_gradients(grad).values())
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) <= GRADIENT_TOLERANCE[mode]


@every_op
@modes
def test_captured_in_a_graph(cuda: str, name: str, mode: str) -> None:
    """Forward and a training step; a replay with other numbers gives what an eager call gives."""
    problem = EVERY_OP[name](mode, cuda).leaves()
    grad = output_gradient(problem)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm(problem, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(problem, grad)
    with torch.no_grad():
        for tensor in (*problem.given.values(), grad):
            tensor.copy_(torch.randn(tensor.shape).to(tensor))
    graph.replay()
    for ours, theirs in zip(found, step(problem, grad), strict=True):
        assert torch.equal(ours, theirs)


@every_op
@modes
def test_never_waits_for_the_device(cuda: str, name: str, mode: str) -> None:
    problem = EVERY_OP[name](mode, cuda).leaves()
    grad = output_gradient(problem)
    warm(problem, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(problem, grad)
        with torch.no_grad():
            problem.call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
@modes
def test_memory_is_torchs(cuda: str, name: str, mode: str) -> None:
    """Every byte comes from torch's allocator, and none stays when the results are gone."""
    problem = EVERY_OP[name](mode, cuda).leaves()
    grad = output_gradient(problem)
    warm(problem, grad)
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(20):
        results = step(problem, grad)
    torch.cuda.synchronize()
    grown = torch.cuda.memory_reserved() - reserved
    now, _ = torch.cuda.mem_get_info()
    assert free - now <= grown
    del results
    assert torch.cuda.memory_allocated() == held


@every_op
def test_other_device_than_the_current_one(cuda: str, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    problem = EVERY_OP[name]("float16", "cuda:1").leaves()
    assert torch.cuda.current_device() == 0
    grad = output_gradient(problem)
    expected = (problem.oracle(), *problem.oracle_gradients(grad).values())
    for ours, theirs in zip(step(problem, grad), expected, strict=True):
        assert ours.device.index == 1
        assert relative(ours, theirs) <= GRADIENT_TOLERANCE["float16"]
    assert torch.cuda.current_device() == 0


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(cuda: str, name: str, dtype: torch.dtype) -> None:
    mode = str(dtype).removeprefix("torch.")
    leaves = EVERY_OP[name]("float32", cuda).leaves()
    with torch.autocast("cuda", dtype=dtype):
        y = leaves.call()
        through_op = leaves.forward_op(*leaves.arguments())
    assert y.dtype == through_op.dtype == dtype
    low = leaves.but([t if t is None else t.detach().to(dtype) for t in leaves.tensors])
    assert relative(y.detach(), low.oracle()) <= FORWARD_TOLERANCE[mode]
    grad = torch.randn(y.shape).to(y)
    found = torch.autograd.grad(y, list(leaves.given.values()), grad)
    for ours, theirs in zip(found, low.oracle_gradients(grad).values(), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) <= GRADIENT_TOLERANCE[mode]


@every_op
def test_tensors_of_two_devices_are_refused(cuda: str, name: str) -> None:
    problem = EVERY_OP[name]("float32", cuda)
    x, weight, *others = problem.tensors
    assert weight is not None
    with pytest.raises(ValueError, match="must be on x's device"):
        problem.but([x, weight.cpu(), *others]).call()


# --- offsets beyond 31 bits ---

PIXELS = 184
IMAGES = 1024
CHANNELS = 64  # IMAGES CHANNELS PIXELS^2 > 2^31


def need_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"{size >> 30} GiB of device memory are needed, {free >> 30} are free")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_offsets_of_64_bits(cuda: str, layout: torch.memory_format) -> None:
    """Input, output and their gradients of more than 2^31 elements; the last image is compared."""
    need_memory(40 << 30)
    case = BottleneckCase(n=1, c_in=CHANNELS, c_out=CHANNELS, size=(3, 3), rank_in=16, rank_out=16)
    small = convolution(case, "float16", cuda)
    x = torch.empty(IMAGES, CHANNELS, PIXELS, PIXELS, dtype=torch.float16, device=cuda, memory_format=layout)
    assert x.numel() > 1 << 31
    x.normal_()
    problem = small.but([x, *small.tensors[1:]])
    y = problem.call()
    last = problem.but([x[-1:], *small.tensors[1:]])
    assert relative(y[-1:], last.oracle()) <= FORWARD_TOLERANCE["float16"]
    grad = y  # as good as any other
    (found, *_) = problem.backward_op(*problem.backward_arguments(grad, 0b1))
    expected = last.oracle_gradients(grad[-1:].clone())["x"]
    assert relative(found[-1:], expected) <= GRADIENT_TOLERANCE["float16"]


@pytest.mark.slow
def test_offsets_of_64_bits_in_a_pair(cuda: str) -> None:
    need_memory(40 << 30)
    rows = (1 << 31) // 256 + 3
    small = pair((3,), 256, 16, 256, "float16", cuda)
    x = torch.empty(rows, 256, dtype=torch.float16, device=cuda).normal_()
    problem = small.but([x, *small.tensors[1:]])
    y = problem.call()
    last = problem.but([x[-100:], *small.tensors[1:]])
    assert relative(y[-100:], last.oracle()) <= FORWARD_TOLERANCE["float16"]
    (found, *_) = problem.backward_op(*problem.backward_arguments(y, 0b1))
    expected = last.oracle_gradients(y[-100:].clone())["x"]
    assert relative(found[-100:], expected) <= GRADIENT_TOLERANCE["float16"]
