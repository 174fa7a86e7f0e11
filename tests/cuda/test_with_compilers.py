"""The CUDA ops through torch's tracers and compilers: whole seconds a test, so they come last."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cuda_problems import (
    EVERY_OP,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    MODES,
    output_gradient,
    set_precision,
)
from torch import Tensor
from tucker2_problems import relative

modes = pytest.mark.parametrize("mode", MODES)
every_op = pytest.mark.parametrize("name", EVERY_OP)


@every_op
@modes
def test_opcheck(cuda: str, name: str, mode: str) -> None:
    problem = EVERY_OP[name](mode, cuda)
    allowed = GRADIENT_TOLERANCE[mode]
    leaves = problem.leaves()
    torch.library.opcheck(problem.forward_op, leaves.arguments(), atol=allowed, rtol=allowed)
    with torch.no_grad():
        grad = output_gradient(problem)
        for mask in ((1 << len(problem.names)) - 1, 0b101):
            torch.library.opcheck(
                problem.backward_op,
                problem.backward_arguments(grad, mask),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


@every_op
@modes
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(cuda: str, name: str, mode: str, backend: str) -> None:
    if backend == "inductor" and mode != "float16":
        pytest.skip("seconds of compiling: one dtype stands for all")
    if backend == "inductor" and importlib.util.find_spec("triton") is None:
        pytest.skip("inductor compiles for CUDA with triton, which is not installed")
    set_precision(mode)
    problem = EVERY_OP[name](mode, cuda).leaves()
    public = getattr(problem.module, problem.op)
    grad = output_gradient(problem)

    def call(*tensors: Tensor | None) -> Tensor:
        return public(*tensors, *problem.rest) * 2

    torch.compiler.reset()
    try:
        y = torch.compile(call, fullgraph=True, backend=backend)(*problem.tensors)
        found = torch.autograd.grad(y, list(problem.given.values()), grad)
    finally:
        torch.compiler.reset()
    assert relative(y.detach(), 2 * problem.oracle()) <= FORWARD_TOLERANCE[mode]
    expected = problem.oracle_gradients(2 * grad)
    for (key, wanted), ours in zip(expected.items(), found, strict=True):
        assert relative(ours, wanted) <= GRADIENT_TOLERANCE[mode], key
