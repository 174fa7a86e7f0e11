"""Measures the candidates of a row on any device, and what follows from their medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .candidates import Candidate, Group
from .cuda_timing import Prepared, first_line
from .devices import Device
from .problem import LIBRARY_SLACK
from .roofline import Probe
from .row import conclusions
from .timing import Effort, Timing

TUNED, FUSED, PARTIAL, STAGED, OP = "ours tuned", "ours fused", "ours partial", "ours staged", "ours op"
"""The headline is what ``tune`` picks; the others show what single plans are worth."""

COMPILE_S = 20.0
"""Seconds a row may spend on building compiled candidates; those left then are recorded as left out."""

_FAILURES = (RuntimeError, ValueError, TypeError)
"""What a candidate that cannot serve raises; anything else is an error of the benchmark's own."""

Fault = Callable[[Candidate, tuple[Tensor, ...]], str | None]
"""What is wrong with a candidate's outputs, or None."""


def slack(candidate: Candidate) -> float:
    """How many times a dtype's limits a candidate's error may be."""
    return 1.0 if candidate.group == "ours" else LIBRARY_SLACK


def refused(name: str, group: Group, layout: str, reason: str) -> Candidate:
    """A candidate that could not be built; the row says why."""

    def call() -> tuple[Tensor, ...]:
        raise ValueError(reason)

    return Candidate(name, group, layout, call)


def offer(name: str, group: Group, layout: str, make: Callable[[], Candidate]) -> Candidate:
    """What ``make`` builds, or the refusal it raised."""
    try:
        return make()
    except _FAILURES as error:
        return refused(name, group, layout, first_line(error))


def measure_candidates(
    candidates: Iterable[Candidate],
    fault: Fault,
    device: Device,
    effort: Effort,
    compile_s: float = COMPILE_S,
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Check every candidate against the oracle, eager and as it will be timed, then time those that agree.

    Returns a record for each candidate, in JSON types, and the timings by name.
    """
    ready: dict[str, Prepared] = {}
    records: list[dict[str, Any]] = []
    spent = 0.0
    for candidate in candidates:
        record: dict[str, Any] = {
            "name": candidate.name,
            "group": candidate.group,
            "layout": candidate.layout,
        }
        begin = time.perf_counter()
        if candidate.compiled and spent > compile_s:
            error: str | None = f"left out: compilers had taken {spent:.0f} s of this row"
        else:
            error, prepared, differs = _check(candidate, fault, device)
            record |= {"differs": True} if differs else {}
            if prepared is not None:
                ready[candidate.name] = prepared
                record |= {"how": prepared.how, "capture_error": prepared.reason}
        if candidate.compiled:
            spent += time.perf_counter() - begin
        if candidate.note:
            record["plan"] = candidate.note
        if candidate.macs is not None:
            record["macs"] = candidate.macs
        records.append(record | {"error": error})
    timed = device.time({name: found.call for name, found in ready.items()}, effort) if ready else {}
    for record in records:
        if record["name"] in timed:
            record |= timed[record["name"]].to_dict()
    return records, timed


def _check(candidate: Candidate, fault: Fault, device: Device) -> tuple[str | None, Prepared | None, bool]:
    """What keeps a candidate from being timed, else how it is called; whether the oracle differs from it."""
    try:
        found = fault(candidate, candidate.to_factors(candidate.call()))
        if found is not None:
            return found, None, True
        prepared = device.prepare(candidate.call, candidate.graph)
        if prepared.how == "graph":
            found = fault(candidate, candidate.to_factors(prepared.call()))
            if found is not None:
                return f"replayed: {found}", None, True
        return None, prepared, False
    except _FAILURES as error:
        if device.name == "cuda":
            # After an illegal access every later call fails too: better one error than a run of them.
            torch.cuda.synchronize()
        return first_line(error), None, False


def row_head(
    case: Any,
    direction: str,
    threads: int,
    device: Device,
    *,
    large: bool,
    macs: int | None = None,
    dense_macs: int | None = None,
) -> dict[str, Any]:
    """What a row says before anything is measured, in JSON types.

    Args:
        macs, dense_macs: None: the case knows.
    """
    return {
        "case": case.to_dict(),
        "label": case.label(),
        "direction": direction,
        "threads": threads,
        "device": device.name,
        "macs": case.macs() if macs is None else macs,
        "dense_macs": case.dense_macs() if dense_macs is None else dense_macs,
        "large": large,
    }


@contextmanager
def as_it_runs(device: Device, dtype: str | None, training: bool) -> Iterator[None]:
    """The device's settings for a dtype, and gradients or inference mode."""
    with (
        device.settings(dtype or "float32"),
        torch.set_grad_enabled(training),
        torch.inference_mode(not training),
    ):
        yield


def measure_ways(
    problem: Any,
    ways: Callable[[], Iterable[Candidate]],
    head: dict[str, Any],
    *,
    device: Device,
    effort: Effort,
    probe: Probe,
) -> dict[str, Any]:
    """One row as JSON types, with everything :func:`outcome` gives.

    Args:
        problem: holds the case, and the answer every way is held to.
        ways: makes the candidates, under the settings they run with.
        head: from :func:`row_head`.
    """
    case, training = problem.case, problem.training
    with as_it_runs(device, case.dtype, training):
        records, timed = measure_candidates(
            ways(), lambda c, outputs: problem.fault(outputs, slack(c)), device, effort
        )
    roof = probe.roofline(case, head["direction"], head["threads"])
    row = head | {"candidates": records, "roofline": roof.to_dict()}
    return row | outcome(row, timed)


def outcome(row: dict[str, Any], timed: dict[str, Timing], wanted: str = TUNED) -> dict[str, Any]:
    """Ratios of a row, its headline being what ``tune`` picked (or the way ``wanted``), or the fastest of
    ours where that failed.

    Beside what :func:`row.conclusions` gives: ``wrong``, the ways of ours that disagree with the oracle, each
    with its error; ``over_dense`` against the best dense way in any layout,
    ``over_dense_here`` against the best one in the row's own, and under ``ours`` the same ratios for every
    way of ours that was measured.
    """
    medians = {name: timing.median_us for name, timing in timed.items()}
    groups = {c["name"]: c["group"] for c in row["candidates"]}
    layouts = {c["name"]: c["layout"] for c in row["candidates"]}
    own = [name for name in medians if groups[name] == "ours"]
    headline = wanted if wanted in medians or not own else min(own, key=lambda name: medians[name])
    found = conclusions(row, medians, headline) | {"wrong": wrong(row["candidates"])}
    if found["error"] is not None:
        return found
    dense = [medians[name] for name in medians if groups[name] == "dense"]
    here = [medians[n] for n in medians if groups[n] == "dense" and layouts[n] == row["case"]["layout"]]
    ours = found["ours_us"]
    found |= {
        "headline": headline,
        "over_dense": min(dense) / ours if dense else None,
        "over_dense_here": min(here) / ours if here else None,
        "ours": {name: _ratios(row, found, medians[name]) for name in own},
    }
    return found


def wrong(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ways of ours whose results the oracle does not confirm: no refusals, but mistakes."""
    return [f"{r['name']}: {r['error']}" for r in records if r["group"] == "ours" and r.get("differs")]


def _ratios(row: dict[str, Any], found: dict[str, Any], median: float) -> dict[str, Any]:
    scale = found["ours_us"] / median
    names = ("over_stages", "over_any", "roofline_share", "saved")
    return {"median_us": median} | {n: found[n] * scale if found[n] is not None else None for n in names}
