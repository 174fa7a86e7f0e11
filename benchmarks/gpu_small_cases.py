"""Every CUDA op, forward and backward, at tiny odd sizes: what compute-sanitizer can look at in a minute.

``compute-sanitizer --tool memcheck python benchmarks/gpu_small_cases.py``. The oracle runs on the CPU, so
that the device sees little beside our kernels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cuda"), str(ROOT / "tests" / "ops")]

from bottleneck_problems import BottleneckCase  # noqa: E402
from chain_problems import ChainCase, chain_gradients, chain_oracle  # noqa: E402
from cuda_problems import (  # noqa: E402
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    MODES,
    OPS,
    Problem,
    convolution,
    pair,
)
from embedding_problems import EmbeddingCase  # noqa: E402
from lowrank_sparse_problems import LinearCase, WeightCase, dense_linear, dense_weight  # noqa: E402
from tucker2_problems import relative  # noqa: E402

from tensorcomp_ext import reference  # noqa: E402
from tensorcomp_ext.ops._conv_arguments import resolve_geometry  # noqa: E402
from tensorcomp_ext.ops.tucker2_packed import pack_tucker2, packed_geometry  # noqa: E402
from tensorcomp_ext.ops.two_factor_linear import pack_two_factor, two_factor_sizes  # noqa: E402

BASE = BottleneckCase(n=2, c_in=9, c_out=11, size=(7, 5), rank_in=6, rank_out=5)
CONVOLUTIONS = {
    "tucker2": BASE,
    "tucker2 channels-last": BASE.but(layout="channels_last", c_in=17, c_out=24, rank_in=17, rank_out=9),
    "tucker2 wide ranks": BASE.but(rank_in=65, rank_out=33, size=(5, 9)),
    "tucker2 stride, padding": BASE.but(
        stride=(2, 1), padding=[1, 0, 2, 1], bias=False, layout="plane_slice"
    ),
    "tucker2 dilation": BASE.but(dilation=2, kernel=(3, 1), padding=(2, 0)),
    "tucker2 several tiles": BASE.but(n=1, size=(19, 37), c_in=40, c_out=33),
    "ring": BASE.but(ring=3),
    "depthwise": BASE.but(depthwise=True, rank_in=18),
}
PAIRS = {
    "pair": ((3, 5), 17, 6, 23),
    "pair wide": ((130,), 72, 40, 96),
}


CHAINS = {
    "chain": ChainCase("ring", rows=(19,)),
    "chain wide": ChainCase("wide rank", rows=(40,), layout="turned"),
}
EMBEDDINGS = {
    "embedding": EmbeddingCase(shape=(40,), padding=6),
    "embedding ring": EmbeddingCase((4, 3, 5), (3, 2, 5), (2, 3, 17), 4, (64,)),
}
WEIGHTS = {
    "sparse weight": WeightCase(m=9, n=13, rank=17),
    "sparse weight bits": WeightCase(m=133, n=280, rank=24, bits=True),
    "sparse weight slice": WeightCase(m=20, n=67, rank=5, layout="slice"),
}
LINEARS = {
    "sparse linear": LinearCase(rows=(3, 5), n=35, rank=9, m=40),
    "sparse linear columns": LinearCase(rows=(7,), n=67, rank=3, m=21, positions="columns", layout="turned"),
}

FEW = ("tucker2", "tucker2 channels-last", "ring", "depthwise", "pair", "chain", "embedding")
FEW += ("sparse weight bits", "sparse linear")
FEW_MODES = ("bfloat16", "tf32")
"""Under a sanitizer a launch takes a hundred times as long: each op in the two kinds of kernel."""


def problems(mode: str) -> Iterator[tuple[str, Problem]]:
    """Each problem of a mode, on the CPU."""
    for name, case in CONVOLUTIONS.items():
        yield name, convolution(case, mode, "cpu")
    for name, sizes in PAIRS.items():
        yield name, pair(*sizes, mode, "cpu")


def packed_calls(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """The inference forms of a problem that have weights packed on its device."""
    x, *weights, bias = problem.tensors
    if problem.op == "two_factor_linear":
        a, b = weights
        sizes = two_factor_sizes(a, b, problem.tf32)  # type: ignore[arg-type]
        return {"packed": lambda: OPS.two_factor_linear_packed(x, pack_two_factor(a, b), bias, sizes)}  # type: ignore[arg-type]
    if problem.op != "tucker2_conv2d":
        return {}
    core, factor_out, factor_in = weights
    assert x is not None and core is not None and factor_out is not None and factor_in is not None
    geometry = resolve_geometry(core.shape[2:], *problem.rest)
    shape = (factor_in.shape[0], factor_out.shape[0])
    numbers = packed_geometry(core.shape, *shape, geometry, problem.tf32)
    z = torch.einsum("nshw,sa->nahw", x.double().cpu(), factor_in.double().cpu()).to(x)
    return {
        "packed": lambda: OPS.tucker2_conv2d_packed(x, pack_tucker2(*weights), bias, numbers),
        "tail": lambda: OPS.tucker2_conv2d_tail(z, pack_tucker2(*weights), bias, numbers),
    }


def check(found: Tensor, expected: Tensor, allowed: float, what: str) -> list[str]:
    error = relative(found.detach().cpu(), expected)
    return [] if error <= allowed else [f"{what}: {error:.1e} from the oracle, allowed {allowed:.0e}"]


def run(problem: Problem, device: str) -> list[str]:
    """One problem in all its forms; what was wrong."""
    expected = problem.oracle()
    grad = torch.randn(expected.shape).to(MODES[problem.mode])
    gradients = problem.oracle_gradients(grad)
    moved = problem.but([t if t is None else t.to(device) for t in problem.tensors])
    allowed = FORWARD_TOLERANCE[problem.mode]
    wrong = check(moved.forward_op(*moved.arguments()), expected, allowed, "forward")
    full = (1 << len(problem.names)) - 1
    found = moved.backward_op(*moved.backward_arguments(grad.to(device), full))
    for name, gradient in zip(problem.names, found, strict=True):
        if name in gradients:
            wrong += check(gradient, gradients[name], GRADIENT_TOLERANCE[problem.mode], f"gradient of {name}")
    if device == "cuda" and moved.support().ok:
        for name, call in packed_calls(moved).items():
            wrong += check(call(), expected, 2 * allowed, name)
    return wrong


def run_chain(case: ChainCase, mode: str, device: str) -> list[str]:
    """The same of a chain."""
    problem = case.make(MODES[mode])
    expected = chain_oracle(problem)
    grad = torch.randn(expected.shape).to(problem.x)
    wanted = chain_gradients(problem, grad)
    numbers, tf32, allowed = problem.program.encode(), mode == "tf32", FORWARD_TOLERANCE[mode]
    x, matrices = problem.x.to(device), [m.to(device) for m in problem.matrices]
    bias = None if problem.bias is None else problem.bias.to(device)
    wrong = check(OPS.chain(x, matrices, bias, numbers, tf32), expected, allowed, "forward")
    mask = (4 << len(matrices)) - 1
    found = OPS.chain_backward(grad.to(device), x, matrices, numbers, mask, tf32)
    for i, (gradient, right) in enumerate(zip(found, wanted, strict=True)):
        wrong += check(gradient, right, GRADIENT_TOLERANCE[mode], f"gradient {i}")
    if device == "cuda":
        packed = OPS.chain_pack(matrices, numbers)
        y = OPS.chain_packed(x, packed, bias, numbers, grad.to(device), True, tf32)
        wrong += check(y, (expected + grad.double()).relu(), 2 * allowed, "packed")
    return wrong


def run_embedding(case: EmbeddingCase, mode: str, device: str) -> list[str]:
    """The same of an embedding."""
    indices, cores = case.indices(), case.cores(MODES[mode])
    padding = None if case.padding < 0 else case.padding
    exact = [c.double().requires_grad_() for c in cores]
    expected = reference.ttm_embedding(indices, exact, case.rows, padding)
    grad = torch.randn(expected.shape).to(cores[0])
    wanted = torch.autograd.grad(expected, exact, grad.double())
    there, moved = indices.to(device), [c.to(device) for c in cores]
    y = OPS.ttm_embedding(there, moved, case.rows, case.padding)
    wrong = check(y, expected.detach(), FORWARD_TOLERANCE[mode], "forward")
    mask = (1 << len(cores)) - 1
    found = OPS.ttm_embedding_backward(grad.to(device), there, moved, case.rows, case.padding, mask)
    for k, (gradient, right) in enumerate(zip(found, wanted, strict=True)):
        wrong += check(gradient, right, GRADIENT_TOLERANCE[mode], f"gradient of core {k}")
    return wrong


def run_weight(case: WeightCase, mode: str, device: str) -> list[str]:
    """The same of a low-rank + sparse weight, in both modes of its own."""
    tensors, tf32, wrong = case.make(MODES[mode]), mode == "tf32", []
    a, b, values, mask = (t.to(device) for t in tensors)
    grad = torch.randn(case.m, case.n).to(tensors[0])
    for kind in ("additive", "masking"):
        exact = [t.double().requires_grad_() for t in tensors[:3]]
        expected = dense_weight(*exact, tensors[3], kind)
        wanted = torch.autograd.grad(expected, exact, grad.double())
        w = OPS.lowrank_sparse_weight(a, b, values, mask, kind == "masking", tf32)
        wrong += check(w, expected.detach(), FORWARD_TOLERANCE[mode], f"{kind} forward")
        found = OPS.lowrank_sparse_weight_backward(grad.to(device), a, b, mask, kind == "masking", 7, tf32)
        for name, gradient, right in zip("ABS", found, wanted, strict=True):
            wrong += check(gradient, right, GRADIENT_TOLERANCE[mode], f"{kind} gradient of {name}")
    return wrong


def run_linear(case: LinearCase, mode: str, device: str) -> list[str]:
    """The same of a packed low-rank + sparse layer."""
    x, a, b, packed, bias = case.make(MODES[mode])
    exact = [t.double().requires_grad_() for t in (x, a, b, packed.values, bias)]
    expected = dense_linear(*exact[:3], packed._replace(values=exact[3]), exact[4])
    grad = torch.randn(expected.shape).to(x)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    x, a, b, bias, *parts = (t.to(device) for t in (x, a, b, bias, *packed[:3]))
    y = OPS.lowrank_sparse_linear(x, a, b, parts[0], bias, *parts[1:])
    wrong = check(y, expected.detach(), 2 * FORWARD_TOLERANCE[mode], "forward")
    found = OPS.lowrank_sparse_linear_backward(grad.to(device), x, a, b, *parts, 31)
    for name, gradient, right in zip(("x", "a", "b", "values", "bias"), found, wanted, strict=True):
        wrong += check(gradient, right, GRADIENT_TOLERANCE[mode], f"gradient of {name}")
    return wrong


def calls(mode: str, device: str) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Every case of a mode by name, as a function that gives its faults."""
    for name, problem in problems(mode):
        yield name, partial(run, problem, device)
    for name, chain in CHAINS.items():
        yield name, partial(run_chain, chain, mode, device)
    for name, embedding in EMBEDDINGS.items():
        yield name, partial(run_embedding, embedding, mode, device)
    for name, weight in WEIGHTS.items():
        yield name, partial(run_weight, weight, mode, device)
    for name, linear in LINEARS.items():
        yield name, partial(run_linear, linear, mode, device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, help="begin no further case after so long")
    parser.add_argument("--few", action="store_true", help="a few of the cases, for sanitizers")
    given: Any = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    torch.manual_seed(0)
    begin, done, left, wrong = time.perf_counter(), 0, 0, []
    for mode in FEW_MODES if given.few else ("bfloat16", "tf32", "float32", "float16"):
        for name, call in calls(mode, given.device):
            if given.few and name not in FEW:
                continue
            if given.seconds is not None and time.perf_counter() - begin > given.seconds:
                left += 1
                continue
            faults = [f"{mode} {name}: {text}" for text in call()]
            print("\n".join(faults) if faults else f"{mode} {name}: ok", flush=True)
            wrong += faults
            done += 1
    print(f"{done} cases, {len(wrong)} faults, {left} cases left out for time")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
