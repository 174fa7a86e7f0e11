"""The tables of the low-rank + sparse suite: reconstructed weights, linear layers, and their means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measure import FUSED, TUNED
from .ours import LAYER
from .sparse_library import CSR, DENSE, DENSE_COMPILED, PRODUCT, REBUILT, REBUILT_COMPILED
from .summary import geometric_mean
from .tables import Table, number, time_us

Row = dict[str, Any]
_HEAD = ["dtype", "direction", "threads"]


def sparse_tables(results: dict[str, Any]) -> list[tuple[str, Table]]:
    """Title and table of each kind of row that the run had."""
    rows = results["rows"]
    kinds = (
        ("Weights reconstructed", _weights, [row for row in rows if row["case"]["rows"] is None]),
        ("Linear layers, packed", _packed, _linear(rows, "forward")),
        ("Linear layers, training steps", _steps, _linear(rows, "backward")),
    )
    return [(title, table(chosen)) for title, table, chosen in kinds if chosen]


def sparse_lines(results: dict[str, Any]) -> list[str]:
    """Geometric means over the reconstructed weights, a line for each dtype, direction and thread count."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in results["rows"]:
        if results["suite"] == "lowrank_sparse" and row["case"]["rows"] is None and not row["error"]:
            key = (row["case"]["dtype"], row["direction"], row["threads"])
            groups.setdefault(key, []).append(row)
    return [
        f"weights reconstructed, {dtype} {direction}, {threads} threads: {_mean(rows, 'over_eager')} times "
        f"the speed of the best eager way, {_mean(rows, 'over_compiled')} of the compiled one"
        for (dtype, direction, threads), rows in groups.items()
    ]


def _linear(rows: Sequence[Row], direction: str) -> list[Row]:
    return [row for row in rows if row["case"]["rows"] is not None and row["direction"] == direction]


def _mean(rows: Sequence[Row], ratio: str) -> str:
    found = [row[ratio] for row in rows if row.get(ratio) is not None]
    return number(geometric_mean(found)) if found else "–"


def _weights(rows: Sequence[Row]) -> Table:
    head = ["weight", *_HEAD, "ours us", "best eager us", "over it", "compiled us", "over it"]
    head += ["product alone us", "roofline"]
    body = []
    for row in rows:
        cells = _cells(row)
        if not row["error"]:
            ours = row["ours_us"]
            eager, compiled = row["over_eager"], row["over_compiled"]
            cells += [time_us(ours), _time(eager and eager * ours), number(eager)]
            cells += [_time(compiled and compiled * ours), number(compiled)]
            cells += [_time(_times(row).get(PRODUCT)), number(row["roofline_share"])]
        body.append(_filled(row, cells, len(head)))
    return head, body


def _packed(rows: Sequence[Row]) -> Table:
    head = ["layer", *_HEAD, "own op us", "before tune us", "tuned us (plan)", "pair and CSR us", "dense us"]
    head += ["dense compiled us", "dense over op", "dense over tuned"]
    body = []
    for row in rows:
        cells = _cells(row)
        if not row["error"]:
            times = _times(row)
            cells += [_time(times.get(FUSED)), _time(times.get(LAYER)), _tuned(row, times)]
            cells += [_time(times.get(name)) for name in (CSR, DENSE, DENSE_COMPILED)]
            cells += [_ratio(times.get(DENSE), times.get(FUSED)), _ratio(times.get(DENSE), times.get(TUNED))]
        body.append(_filled(row, cells, len(head)))
    return head, body


def _steps(rows: Sequence[Row]) -> Table:
    head = ["layer", *_HEAD, "before tune us", "tuned us (plan)", "rebuilt us", "rebuilt compiled us"]
    head += ["dense us", "rebuilt over tuned", "tuned of dense"]
    body = []
    for row in rows:
        cells = _cells(row)
        if not row["error"]:
            times = _times(row)
            cells += [_time(times.get(LAYER)), _tuned(row, times)]
            cells += [_time(times.get(name)) for name in (REBUILT, REBUILT_COMPILED, DENSE)]
            cells += [
                _ratio(times.get(REBUILT), times.get(TUNED)),
                _ratio(times.get(TUNED), times.get(DENSE)),
            ]
        body.append(_filled(row, cells, len(head)))
    return head, body


def _cells(row: Row) -> list[str]:
    return [row["label"], row["case"]["dtype"], row["direction"], str(row["threads"])]


def _filled(row: Row, cells: list[str], columns: int) -> list[str]:
    if row["error"]:
        cells = [*cells, f"failed: {row['error']}"]
    return [*cells, *["–"] * (columns - len(cells))]


def _times(row: Row) -> dict[str, float]:
    return {c["name"]: c["median_us"] for c in row["candidates"] if "median_us" in c}


def _tuned(row: Row, times: dict[str, float]) -> str:
    plan = next((c.get("plan", "–") for c in row["candidates"] if c["name"] == TUNED), "–")
    return f"{time_us(times[TUNED])} ({plan})" if TUNED in times else "–"


def _time(value: float | None) -> str:
    return "–" if value is None else time_us(value)


def _ratio(over: float | None, under: float | None) -> str:
    return "–" if over is None or under is None else number(over / under)
