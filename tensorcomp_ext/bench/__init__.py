"""Latency measurement: the core of ``python -m benchmarks.run`` and of ``tensorcomp bench``."""

from .cases import Case, case_from_dict, development_cases, quick_cases, read_cases
from .roofline import Probe
from .row import measure_row
from .suite import Settings, read_results, run_suite
from .suites import SUITES, suite_cases
from .timing import Effort, Timing, interleave

__all__ = [
    "SUITES",
    "Case",
    "Effort",
    "Probe",
    "Settings",
    "Timing",
    "case_from_dict",
    "development_cases",
    "interleave",
    "measure_row",
    "quick_cases",
    "read_cases",
    "read_results",
    "run_suite",
    "suite_cases",
]
