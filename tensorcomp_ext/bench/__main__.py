"""``python -m tensorcomp_ext.bench``: a suite without the packages that the command line needs.

For machines that have torch and little else, GPU machines above all; ``tensorcomp bench`` has more options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .chain_summary import chain_lines
from .device_summary import device_table, network_table, never_slower_line
from .embedding_summary import embedding_table
from .sparse_summary import sparse_lines, sparse_tables
from .suite import Settings, choose_effort, run_suite
from .suites import SUITES, suite_cases
from .tables import markdown, row_line, summary_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite; 1 where a row failed, 2 where the arguments do not fit."""
    parser = argparse.ArgumentParser(prog="python -m tensorcomp_ext.bench", description=__doc__)
    parser.add_argument("--suite", default="tucker2", choices=tuple(SUITES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=Path, help="JSON list of cases")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layout", default="nchw,nhwc")
    parser.add_argument("--direction", default="forward,backward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", default="never")
    parser.add_argument("--seconds", type=float, help="to spend on each row's samples")
    parser.add_argument("--limit", type=float, help="seconds after which no further row is begun")
    parser.add_argument("--quick", action="store_true", help="a few small cases, few samples")
    parser.add_argument("--json", type=Path, help="write the results here, after every row")
    given = parser.parse_args(arguments)
    try:
        settings = Settings(
            suite=given.suite,
            cases=suite_cases(given.suite, given.device, quick=given.quick, path=given.cases),
            dtypes=given.dtype.split(","),
            layouts=given.layout.split(","),
            directions=given.direction.split(","),
            threads=[given.threads],
            device=given.device,
            compiled=given.compiled,
            effort=choose_effort(given.device, quick=given.quick, seconds=given.seconds),
            overhead=False,
            limit_s=given.limit,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def report(index: int, count: int, row: dict[str, Any]) -> None:
        print(f"[{index}/{count}] {row_line(row)}", flush=True)

    results = run_suite(settings, given.json, report=report)
    if results["summary"]["groups"]:
        print(markdown(summary_table(results)))
    if results["summary"].get("device"):
        print(markdown(device_table(results)))
    if results["suite"] == "embedding":
        print(markdown(embedding_table(results)))
    if results["suite"] == "lowrank_sparse":
        for title, table in sparse_tables(results):
            print(f"{title}:\n\n{markdown(table)}")
    for line in [*chain_lines(results), *sparse_lines(results)]:
        print(line)
    if "network" in results["summary"]:
        print(markdown(network_table(results)))
        print(never_slower_line(results))
    if results.get("rows_left_out"):
        print(f"the limit of {given.limit:g} s left out {results['rows_left_out']} rows")
    failed = [row for row in results["rows"] if row["error"] or row.get("wrong")]
    if failed:
        print(f"{len(failed)} rows failed, the first: {failed[0]['error'] or failed[0]['wrong'][0]}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
