"""A few rows of the chain suite under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench.chain import our_ways
from tensorcomp_ext.bench.chain_cases import ChainCase, chain_cases
from tensorcomp_ext.bench.chain_library import library_ways
from tensorcomp_ext.bench.chain_problem import ChainProblem

pytest.importorskip("pytest_benchmark")

CASES = [chain_cases("cpu")[index] for index in (0, 5, 13)]
NAMES = ("ours tuned", "pair eager", "dense eager")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=ChainCase.label)
def test_chain(benchmark, case: ChainCase, direction: str, name: str) -> None:
    training = direction == "backward"
    problem = ChainProblem(replace(case, dtype="float32"), training=training)
    with torch.inference_mode(not training):
        ways = our_ways(problem) if name.startswith("ours") else library_ways(problem, "never")
        chosen = {way.name: way for way in ways}[name]
        assert problem.fault(chosen.to_factors(chosen.call())) is None
        benchmark.group = f"{direction} {case.label()}"
        benchmark(chosen.call)
