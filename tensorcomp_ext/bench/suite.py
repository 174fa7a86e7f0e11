"""Runs a suite and keeps its results on disk row by row."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .candidates import COMPILED
from .cases import DTYPES, LAYOUTS, Case, development_cases, expand
from .machine import isa, machine, versions
from .ours import layer_plan
from .overhead import layer_overhead
from .roofline import Probe
from .row import DIRECTIONS, measure_row
from .summary import summarise_rows
from .timing import Effort

FORMAT = 1
SUITES = ("tucker2",)
QUICK = Effort(budget_s=0.1, min_rounds=5, max_rounds=15, warmup_s=0.005)

COMPILED_TEXT = {
    "always": "torch.compile candidates in every row, in the given layout and in channels-last",
    "best": "torch.compile candidates only in the layout in which the eager ones are faster",
    "never": "no torch.compile candidates: the library stages and the dense convolution ran eager only",
}


@dataclass(frozen=True)
class Settings:
    """What to run. Raises ValueError for a name that is none of the known ones."""

    suite: str = "tucker2"
    cases: Sequence[Case] = field(default_factory=development_cases)
    dtypes: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ("nchw", "nhwc")
    directions: Sequence[str] = DIRECTIONS
    threads: Sequence[int] = (1, 2)
    device: str = "cpu"
    compiled: str = "always"
    effort: Effort = field(default_factory=Effort)
    overhead: bool = True

    def __post_init__(self) -> None:
        named: list[tuple[str, Sequence[str], Sequence[str]]] = [
            ("suite", [self.suite], SUITES),
            ("dtype", self.dtypes, tuple(DTYPES)),
            ("layout", self.layouts, tuple(LAYOUTS)),
            ("direction", self.directions, DIRECTIONS),
            ("device", [self.device], ("cpu",)),
            ("compiled", [self.compiled], COMPILED),
        ]
        for name, values, known in named:
            wrong = [v for v in values if v not in known]
            if wrong or not values:
                raise ValueError(
                    f"{name} must be of {', '.join(known)}, got {wrong[0] if wrong else 'none'!r}"
                )
        cores = os.cpu_count() or 1
        if not self.threads or min(self.threads) < 1 or max(self.threads) > cores:
            raise ValueError(f"threads must be 1 to {cores} (the cores here), got {list(self.threads)}")

    def rows(self) -> list[tuple[Case, str, int]]:
        """Case, direction and threads of every row; the smallest groups together, threads outermost."""
        cases = expand(self.cases, self.dtypes, self.layouts)
        return [(case, d, t) for t in self.threads for d in self.directions for case in cases]

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
        }


Report = Callable[[int, int, dict[str, Any]], None]
Start = Callable[[int, int, str], None]


def run_suite(
    settings: Settings, path: Path | None = None, *, report: Report | None = None, start: Start | None = None
) -> dict[str, Any]:
    """Measure every row and return the results; with ``path`` also write them there after each row.

    ``start`` hears of a row before it is measured (index from 0, count, label), ``report`` afterwards.
    Interrupted with Ctrl-C, the rows so far are summarised, marked ``"complete": false``, written, and the
    interrupt goes on.
    """
    rows = settings.rows()
    probe = Probe()
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

    def keep() -> None:
        results["rates"] = probe.to_dict()
        results["summary"] = summarise_rows(results["rows"])
        if path is not None:
            write_json(path, results)

    keep()  # a folder that cannot be written shows now, not after the first row
    try:
        if settings.overhead:
            effort = settings.effort
            results["overhead"] = [row for t in settings.threads for row in layer_overhead(t, effort)]
        for index, (case, direction, threads) in enumerate(rows):
            if start:
                start(index, len(rows), f"{case.dtype} {case.layout} {direction} {case.label()}")
            row = measure_row(
                case, direction, threads, compiled=settings.compiled, effort=settings.effort, probe=probe
            )
            results["rows"].append(row)
            keep()
            if report:
                report(index + 1, len(rows), row)
        results["rates_at_end"] = _again(settings)
        results["complete"] = True
    finally:
        results["finished"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        keep()
    return results


def _again(settings: Settings) -> dict[str, Any]:
    """The peaks measured once more, to show whether the clock moved during the run."""
    probe = Probe()
    for dtype in sorted({case.dtype or "float32" for case, _, _ in settings.rows()}):
        for threads in settings.threads:
            probe.peak(dtype, threads)
    return probe.to_dict()


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all: a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
