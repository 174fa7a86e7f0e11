"""A few rows under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

For following one machine over time (``--benchmark-autosave``, ``--benchmark-compare``). The comparison with
the library, interleaved and against the roofline, is ``python -m benchmarks.run``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tensorcomp_ext.bench.candidates import library_candidates
from tensorcomp_ext.bench.cases import Case, development_cases
from tensorcomp_ext.bench.ours import our_candidates
from tensorcomp_ext.bench.problem import Problem

pytest.importorskip("pytest_benchmark")

CASES = [development_cases()[index] for index in (0, 3, 7)]
NAMES = ("ours layer", "ours op", "stages eager nhwc", "dense eager nhwc")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_tucker2(benchmark, case: Case, direction: str, name: str) -> None:
    training = direction == "backward"
    problem = Problem(replace(case, layout="nhwc", dtype="float32"), training=training)
    with torch.inference_mode(not training):
        candidates = {c.name: c for c in our_candidates(problem) + library_candidates(problem)}
        chosen = candidates[name]
        assert problem.fault(chosen.to_factors(chosen.call())) is None
        benchmark.group = f"{direction} {case.label()}"
        benchmark(chosen.call)
