"""The suite of low-rank + sparse weights: reconstruction, packed linear layers, training steps."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..formats import SVD, LowRankSparse
from ..ops import lowrank_sparse_weight, pack_mask
from ..plan import PlannedLayer
from .candidates import Candidate
from .devices import Device
from .layers import default_way, tuned_way
from .measure import FUSED, OP, measure_ways, offer, row_head
from .roofline import Probe
from .sparse_cases import LARGE, SparseCase
from .sparse_library import ADDED, COMPILED, EAGER, library_ways
from .sparse_problem import SparseProblem
from .timing import Effort


def build_layer(problem: SparseProblem) -> Any:
    """A ``FactorizedLinear`` with the problem's weight, packed unless it is trained; it chooses its plan."""
    case = problem.case
    layer_class = importlib.import_module("tensorcomp_ext.nn").FactorizedLinear
    # Weights born under inference mode have no version and would be prepared again at every call.
    with torch.inference_mode(False), torch.no_grad():
        layer = layer_class(case.c_in, case.c_out, format="lowrank_sparse", rank=case.rank, mode=case.mode)
        a, b, values, bias = (w.detach().clone() for w in problem.weights())
        layer.weight = LowRankSparse(SVD(a, b), values, problem.mask, mode=case.mode)
        layer.bias = torch.nn.Parameter(bias)
        layer.train(problem.training).requires_grad_(problem.training)
        return layer if problem.training else layer.finalize()


def our_ways(problem: SparseProblem) -> list[Candidate]:
    """The op where W is reconstructed; else the layer, packed for inference, also held to its own op."""
    layout = problem.case.layout
    if problem.case.rows is None:
        return [offer(OP, "ours", layout, lambda: _op(problem))]

    x = problem.x()

    def call(layer: PlannedLayer) -> Any:
        weight: Any = layer.weight
        trained = (
            [weight.low_rank.a, weight.low_rank.b, weight.sparse, layer.bias, x] if layer.training else []
        )
        return problem.call(lambda: layer(x), trained)

    def fused() -> Candidate:
        layer = build_layer(problem)
        layer.plan = "fused"
        found = Candidate(FUSED, "ours", layout, call(layer))
        found.note = "fused"
        return found

    ways = [] if problem.training else [offer(FUSED, "ours", layout, fused)]
    example = x.detach().clone()
    return [
        *ways,
        default_way(layout, lambda: build_layer(problem), call, example),
        tuned_way(layout, lambda: build_layer(problem), call, example),
    ]


def _op(problem: SparseProblem) -> Candidate:
    a, b, values = problem.weights()
    mask, mode = pack_mask(problem.mask), problem.case.mode

    def forward() -> Tensor:
        return lowrank_sparse_weight(a, b, values, mask, mode=mode)

    return Candidate(OP, "ours", problem.case.layout, problem.call(forward, [a, b, values]))


def measure_sparse(
    case: SparseCase,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types, with everything :func:`measure.outcome` gives.

    Of a reconstructed weight also ``over_eager`` and ``over_compiled``, how many times as long as ours the
    best eager way and the compiled one take. The headline is the op there, what ``tune`` picked elsewhere.
    """
    large = device.name != "cuda" or case.c_out * case.c_in >= LARGE
    problem = SparseProblem(case, training=direction == "backward", device=device.name)
    row = measure_ways(
        problem,
        lambda: our_ways(problem) + library_ways(problem, compiled),
        row_head(case, direction, threads, device, large=large),
        device=device,
        effort=effort,
        probe=probe,
    )
    if row["error"] is None and case.rows is None:
        medians = {c["name"]: c["median_us"] for c in row["candidates"] if "median_us" in c}
        eager = [medians[name] for name in (EAGER, ADDED) if name in medians]
        row["over_eager"] = min(eager) / row["ours_us"] if eager else None
        row["over_compiled"] = medians[COMPILED] / row["ours_us"] if COMPILED in medians else None
    return row
