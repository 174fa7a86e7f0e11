"""Measures one row: checks every candidate against the oracle, then times them interleaved."""

from __future__ import annotations

from typing import Any

import torch

from .candidates import Candidate, compiled_candidates, library_candidates
from .cases import Case
from .memory import peak_bytes
from .ours import LAYER, our_candidates
from .problem import Problem
from .roofline import Probe
from .timing import Effort, Timing, interleave

DIRECTIONS = ("forward", "backward")


def measure_row(
    case: Case, direction: str, threads: int, *, compiled: str, effort: Effort, probe: Probe
) -> dict[str, Any]:
    """One row as JSON types. A candidate that fails or disagrees with the oracle is not timed and says why;
    when it is ours, the row has an ``error`` and no ratios.

    ``direction`` "backward" is a training step: forward and backward.
    """
    training = direction == "backward"
    row: dict[str, Any] = {
        "case": case.to_dict(),
        "label": case.label(),
        "direction": direction,
        "threads": threads,
        "macs": case.macs(),
        "dense_macs": case.dense_macs(),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problem = Problem(case, training=training)
        with torch.set_grad_enabled(training), torch.inference_mode(not training):
            records, timed = _measure(problem, compiled, effort)
            if training:
                row["memory"] = _memory(problem)
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
    row["candidates"] = records
    row["roofline"] = probe.roofline(case, direction, threads).to_dict()
    return row | conclusions(row, {name: t.median_us for name, t in timed.items()})


def _measure(
    problem: Problem, compiled: str, effort: Effort
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    candidates = our_candidates(problem) + library_candidates(problem)
    faults = {c.name: _fault(c, problem) for c in candidates}
    layouts = ["nchw", "nhwc"] if problem.layout == "nchw" else ["nhwc"]
    if compiled != "never":
        chosen = [layouts, layouts]
        if compiled == "best" and len(layouts) > 1:
            chosen = [[_faster_layout(group, candidates)] for group in ("stages", "dense")]
        more = compiled_candidates(problem, *chosen)
        faults |= {c.name: _fault(c, problem) for c in more}
        candidates += more
    timed = interleave({c.name: c.call for c in candidates if faults[c.name] is None}, effort)
    records = [
        {"name": c.name, "group": c.group, "layout": c.layout, "error": faults[c.name]}
        | (timed[c.name].to_dict() if c.name in timed else {})
        for c in candidates
    ]
    return records, timed


def _faster_layout(group: str, candidates: list[Candidate]) -> str:
    eager = {c.layout: c.call for c in candidates if c.name.startswith(f"{group} eager")}
    timed = interleave(eager, Effort(budget_s=0.0, min_rounds=5, warmup_s=0.01))
    return min(timed, key=lambda layout: timed[layout].median_us)


def _fault(candidate: Candidate, problem: Problem) -> str | None:
    try:
        outputs = candidate.call()
    except RuntimeError as error:  # a compiler that is missing or gives up must not end the run
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return problem.fault(candidate.to_factors(outputs))


def _memory(problem: Problem) -> dict[str, Any]:
    """Peak bytes of a training step beyond inputs and weights, ours and the eager stages in the given
    layout."""
    ours = our_candidates(problem)[0].call
    eager = [c for c in library_candidates(problem) if c.name == f"stages eager {problem.layout}"]
    peaks = {"ours_bytes": peak_bytes(ours), "stages_bytes": peak_bytes(eager[0].call)}
    return peaks | {"ratio": peaks["ours_bytes"] / peaks["stages_bytes"]}


def conclusions(row: dict[str, Any], medians: dict[str, float], headline: str = LAYER) -> dict[str, Any]:
    """The ratios of a row from its medians.

    ``over_stages``: best library stages / ours. ``over_any``: best of every library way, the dense ones
    included, / ours. ``roofline_share``: least possible time / ours. ``saved``: (dense time / ours) / (dense
    MACs / our MACs).
    """
    groups = {c["name"]: c["group"] for c in row["candidates"]}
    errors = {c["name"]: c["error"] for c in row["candidates"]}
    if headline not in medians:
        return {"error": f"{headline}: {errors.get(headline, 'not measured')}"}
    ours = medians[headline]

    def best(*wanted: str) -> str | None:
        names = [name for name in medians if groups[name] in wanted]
        return min(names, key=lambda name: medians[name]) if names else None

    stages, dense, library = best("stages"), best("dense"), best("stages", "rebuild", "dense")
    found: dict[str, Any] = {"error": None, "ours_us": ours, "best_stages": stages, "best_dense": dense}
    found["best_library"] = library
    found["over_stages"] = medians[stages] / ours if stages else None
    found["over_any"] = medians[library] / ours if library else None
    found["roofline_share"] = row["roofline"]["time_us"] / ours
    saved = row["dense_macs"] / row["macs"]  # 0 where the dense way only looks up
    found["saved"] = medians[dense] / ours / saved if dense and saved else None
    return found
