"""The suite of embeddings: random lookups in a factorized table."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..plan import PlannedLayer
from .candidates import Candidate
from .chain_cases import LAYOUT
from .devices import Device
from .embedding_cases import EmbeddingCase
from .embedding_library import GATHER, REBUILT, SLICES, library_ways
from .embedding_problem import EmbeddingProblem
from .layers import default_way, tuned_way
from .measure import FUSED, TUNED, as_it_runs, measure_candidates, offer, outcome, row_head, slack
from .ours import LAYER
from .roofline import Probe
from .timing import Effort


def build_embedding(problem: EmbeddingProblem) -> Any:
    """A ``FactorizedEmbedding`` of the case's format holding the problem's cores; it chooses its plan."""
    case = problem.case
    layer_class = importlib.import_module("tensorcomp_ext.nn").FactorizedEmbedding
    rank: Any = case.cores.ranks[0] if len(case.cores.ranks) == 1 else case.cores.ranks
    # Weights born under inference mode have no version and would be prepared again at every call.
    with torch.inference_mode(False), torch.no_grad():
        layer = layer_class(
            case.vocab,
            case.dim,
            device=torch.device(problem.device),
            dtype=problem.grad.dtype,
            format=case.format,
            rank=rank,
            in_modes=case.dim_modes,
            out_modes=case.vocab_modes,
        )
        for parameter, value in zip(layer.weight.factors, problem.weights(), strict=True):
            parameter.copy_(value)
    layer.train(problem.training)
    layer.requires_grad_(problem.training)
    return layer


def our_ways(problem: EmbeddingProblem) -> list[Candidate]:
    """The layer held to its own op, as it comes, and after ``tune``.

    The latter two may keep the whole table for inference, which gathers fast and saves no memory.
    """

    def call(layer: PlannedLayer) -> Any:
        return problem.call(layer, list(layer.weight.factors))

    def fused() -> Candidate:
        layer = build_embedding(problem)
        layer.plan = "fused"
        found = Candidate(FUSED, "ours", LAYOUT, call(layer))
        found.note = "fused"
        return found

    example = problem.indices.clone()
    return [
        offer(FUSED, "ours", LAYOUT, fused),
        default_way(LAYOUT, lambda: build_embedding(problem), call, example),
        tuned_way(LAYOUT, lambda: build_embedding(problem), call, example),
    ]


def measure_embedding(
    case: EmbeddingCase,
    direction: str,
    threads: int,
    *,
    device: Device,
    compiled: str,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types, with everything :func:`measure.outcome` gives.

    The headline is the layer on its own op, which never has the table: what ``tune`` picks may be the dense
    plan, a gather from a kept table, and would be compared with itself. ``over_rebuilt`` is the time of
    gathering from a table rebuilt at every call over ours. ``memory`` has the peak bytes of a call of each
    way beyond the weights and indices (of ours, with the table where the dense plan keeps it), and those of
    cores and output.
    """
    training = direction == "backward"
    problem = EmbeddingProblem(case, training=training, device=device.name)
    row = row_head(case, direction, threads, device, large=True, macs=problem.macs(), dense_macs=0)
    with as_it_runs(device, case.dtype, training):
        candidates = our_ways(problem) + library_ways(problem, compiled)
        row["candidates"], timed = measure_candidates(
            candidates, lambda c, outputs: problem.fault(outputs, slack(c)), device, effort
        )
        row["memory"] = _memory(problem, [c for c in candidates if c.name in timed], device)
    flops, moved = problem.work()
    roof = probe.bound(flops, moved, moved, case.dtype or "float32", threads)
    row["roofline"] = roof.to_dict()
    row |= outcome(row, timed, FUSED)
    if REBUILT in timed and row["error"] is None:
        row["over_rebuilt"] = timed[REBUILT].median_us / row["ours_us"]
    return row


def _memory(problem: EmbeddingProblem, candidates: list[Candidate], device: Device) -> dict[str, Any] | None:
    wanted = {FUSED: "ours_bytes", TUNED: "tuned_bytes", LAYER: "layer_bytes", SLICES: "stages_bytes"}
    wanted |= {GATHER: "dense_bytes", REBUILT: "rebuilt_bytes"}
    peaks = {wanted[c.name]: device.peak_bytes(c.call) for c in candidates if c.name in wanted}
    table = problem.case.vocab * problem.case.dim * problem.grad.element_size()
    for candidate in candidates:
        if candidate.group == "ours" and candidate.note == "dense" and not problem.training:
            peaks[wanted[candidate.name]] += table  # prepared before the call, so that its peak misses it
    ours = peaks.get("ours_bytes")
    if ours is None:
        return None
    return peaks | {"least_bytes": problem.bytes_least(), "ratio": ours / problem.bytes_least()}
