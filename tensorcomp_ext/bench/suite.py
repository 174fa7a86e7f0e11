"""Runs a suite and keeps its results on disk row by row."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensorcomp_ext.compress.atomic import replacing

from .candidates import COMPILED
from .cases import LAYOUTS, development_cases
from .chain_summary import against_dense
from .cuda_machine import gpu
from .cuda_timing import first_line
from .device_summary import device_summary, network_summary
from .devices import DEVICES, Device, get_device
from .machine import isa, machine, versions
from .ours import layer_plan
from .overhead import layer_overhead
from .roofline import Probe
from .row import DIRECTIONS, measure_row
from .suites import SUITES, AnyCase
from .summary import summarise_rows
from .timing import Effort

FORMAT = 1
CUDA_EFFORT = Effort(budget_s=0.3)
"""Samples on CUDA are single calls: a row needs less time for as many."""

QUICK = Effort(budget_s=0.1, min_rounds=5, max_rounds=15, warmup_s=0.005)


def choose_effort(device: str, *, quick: bool = False, seconds: float | None = None) -> Effort:
    """How long rows are measured: ``seconds`` of samples where given, what the device needs otherwise."""
    if seconds is not None:
        return Effort(budget_s=seconds, limit_s=max(10.0, 4 * seconds))
    return QUICK if quick else CUDA_EFFORT if device == "cuda" else Effort()


COMPILED_TEXT = {
    "always": "torch.compile candidates in every row, in the given layout and in channels-last",
    "best": "torch.compile candidates only in the layout in which the eager ones are faster",
    "never": "no torch.compile candidates: the library stages and the dense convolution ran eager only",
}


@dataclass(frozen=True)
class Settings:
    """What to run. Raises ValueError for a name that is none of the known ones."""

    suite: str = "tucker2"
    cases: Sequence[AnyCase] = field(default_factory=development_cases)
    dtypes: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ("nchw", "nhwc")
    directions: Sequence[str] = DIRECTIONS
    threads: Sequence[int] = (1, 2)
    device: str = "cpu"
    compiled: str = "always"
    effort: Effort = field(default_factory=Effort)
    overhead: bool = True
    limit_s: float | None = None
    """Seconds after which no further row is begun; None: all rows."""

    def __post_init__(self) -> None:
        named: list[tuple[str, Sequence[str], Sequence[str]]] = [
            ("suite", [self.suite], tuple(SUITES)),
            ("device", [self.device], tuple(DEVICES)),
            ("layout", self.layouts, tuple(LAYOUTS)),
            ("direction", self.directions, DIRECTIONS),
            ("compiled", [self.compiled], COMPILED),
        ]
        for name, values, known in named:
            wrong = [v for v in values if v not in known]
            if wrong or not values:
                raise ValueError(
                    f"{name} must be of {', '.join(known)}, got {wrong[0] if wrong else 'none'!r}"
                )
        known = DEVICES[self.device].dtypes
        wrong = [dtype for dtype in self.dtypes if dtype not in known]
        if wrong or not self.dtypes:
            raise ValueError(f"dtype must be of {', '.join(known)}, got {wrong[0] if wrong else 'none'!r}")
        for case in self.cases:
            if case.dtype is not None and case.dtype not in known:
                raise ValueError(
                    f"case {case.label()}: dtype must be of {', '.join(known)}, got {case.dtype!r}"
                )
        get_device(self.device)
        cores = os.cpu_count() or 1
        if not self.threads or min(self.threads) < 1 or max(self.threads) > cores:
            raise ValueError(f"threads must be 1 to {cores} (the cores here), got {list(self.threads)}")

    @property
    def plain(self) -> bool:
        """Whether rows are those of the Tucker-2 suite on the CPU, with one way of ours as their headline."""
        return self.suite == "tucker2" and self.device == "cpu"

    def rows(self) -> list[tuple[AnyCase, str, int]]:
        """Case, direction and threads of every row; the smallest groups together, threads outermost.

        On CUDA a run that reaches its limit has what matters most: large cases come before small ones, then
        dtypes in the order asked for, channels-last first, inference before training.
        """
        cases = SUITES[self.suite].expand(self.cases, self.dtypes, self.layouts)
        if self.device == "cuda":
            rows = [(case, d, t) for t in self.threads for d in self.directions for case in cases]
            return sorted(rows, key=lambda row: self._rank(*row))
        return [(case, d, t) for t in self.threads for d in self.directions for case in cases]

    def _rank(self, case: AnyCase, direction: str, threads: int) -> tuple[Any, ...]:
        dtype = self.dtypes.index(case.dtype) if case.dtype in self.dtypes else len(self.dtypes)
        small, training = not SUITES[self.suite].large(case), direction == "backward"
        return small, dtype, case.layout == "nchw", training, threads

    def to_dict(self) -> dict[str, Any]:
        return {
            "dtypes": list(self.dtypes),
            "layouts": list(self.layouts),
            "directions": list(self.directions),
            "threads": list(self.threads),
            "device": self.device,
            "compiled": self.compiled,
            "compiled_means": COMPILED_TEXT[self.compiled],
            "effort": self.effort.to_dict(),
        } | ({} if self.limit_s is None else {"limit_s": self.limit_s})


Report = Callable[[int, int, dict[str, Any]], None]
Start = Callable[[int, int, str], None]


def run_suite(
    settings: Settings, path: Path | None = None, *, report: Report | None = None, start: Start | None = None
) -> dict[str, Any]:
    """Measure every row and return the results; with ``path`` also write them there after each row.

    ``start`` hears of a row before it is measured (index from 0, count, label), ``report`` afterwards.
    Interrupted with Ctrl-C, the rows so far are summarised, marked ``"complete": false``, written, and the
    interrupt goes on. A run that reaches its limit is not complete either.
    """
    rows = settings.rows()
    device = get_device(settings.device)
    probe = device.probe()
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "format": FORMAT,
        "suite": settings.suite,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "machine": machine(),
        "versions": versions(),
        "isa": isa(),
        "layer_plan": layer_plan() or "automatic",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "settings": settings.to_dict(),
        "rows": [],
    }
    if settings.device == "cuda":
        results["gpu"] = gpu()

    def keep() -> None:
        results["rates"] = probe.to_dict()
        results["summary"] = summary_of(settings, results["rows"])
        if path is not None:
            write_json(path, results)

    keep()  # a folder that cannot be written shows now, not after the first row
    try:
        if settings.overhead and settings.plain:
            effort = settings.effort
            results["overhead"] = [row for t in settings.threads for row in layer_overhead(t, effort)]
        for index, (case, direction, threads) in enumerate(rows):
            if settings.limit_s is not None and time.perf_counter() - begin > settings.limit_s:
                results["rows_left_out"] = len(rows) - index
                return results
            if start:
                start(index, len(rows), f"{case.dtype} {case.layout} {direction} {case.label()}")
            row = _measure(settings, case, direction, threads, device, probe)
            results["rows"].append(row)
            keep()
            if report:
                report(index + 1, len(rows), row)
        results["rates_at_end"] = _again(settings, device.probe())
        results["complete"] = True
    finally:
        results["finished"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        keep()
    return results


def _measure(
    settings: Settings, case: Any, direction: str, threads: int, device: Device, probe: Probe
) -> dict[str, Any]:
    options: dict[str, Any] = {"compiled": settings.compiled, "effort": settings.effort, "probe": probe}
    if settings.plain:
        return measure_row(case, direction, threads, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return SUITES[settings.suite].measure(case, direction, threads, device=device, **options)
    except RuntimeError as error:  # no memory for the oracle, say: the other rows may well have it
        if device.name == "cuda":
            torch.cuda.synchronize()  # raises where no later call can succeed
        return {
            "case": case.to_dict(),
            "label": case.label(),
            "direction": direction,
            "threads": threads,
            "device": device.name,
            "large": SUITES[settings.suite].large(case),
            "error": first_line(error),
        }
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
        device.tidy()


def summary_of(settings: Settings, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of a suite come to."""
    if settings.suite == "network":
        return {"groups": [], "bfloat16": [], "network": network_summary(rows)}
    found = summarise_rows(rows)
    if settings.plain:
        return found
    found["device"] = device_summary(rows)
    if settings.suite == "chain":
        found["chain"] = against_dense(rows)
    return found


def _again(settings: Settings, probe: Probe) -> dict[str, Any]:
    """The peaks measured once more, to show whether the clock moved during the run."""
    if settings.suite == "network":
        return probe.to_dict()  # networks have no roofline
    for dtype in sorted({case.dtype or "float32" for case, _, _ in settings.rows()}):
        for threads in settings.threads:
            probe.peak(dtype, threads)
    return probe.to_dict()


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all: a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as written:
        written.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """Results written by :func:`run_suite`.

    Raises:
        ValueError: not such a file, or of a later format.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(data, dict) or "rows" not in data or "format" not in data:
        raise ValueError(f"{path}: not the results of a benchmark run")
    if data["format"] != FORMAT:
        raise ValueError(f"{path}: results of format {data['format']}, this version reads format {FORMAT}")
    return data
