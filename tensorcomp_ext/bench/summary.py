"""From rows to the few figures that count, and from two runs to what changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

_RATIOS = ("over_stages", "over_any", "roofline_share", "saved")
_OF_THE_GROUP = ("dtype", "layout")


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log v)) of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _group(row: Row) -> tuple[str, str, int, str]:
    case = row["case"]
    return case["dtype"], row["direction"], row["threads"], case["layout"]


def row_key(row: Row) -> tuple[Any, ...]:
    """What two rows must share to be the same measurement."""
    case = row["case"]
    sizes = (
        f"{k}={case[k]}".replace("[", "(").replace("]", ")") for k in sorted(case) if k not in _OF_THE_GROUP
    )
    return (*_group(row), *sizes)


def summarise_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Per dtype, direction, threads and layout (and both layouts together): each ratio's geometric mean, and
    its least value with the case it comes from; greatest memory ratio; rows without a result. Then bfloat16
    against our own float32."""
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        dtype, direction, threads, layout = _group(row)
        for name in (layout, "all"):
            groups.setdefault((dtype, direction, threads, name), []).append(row)
    layouts = {_group(row)[3] for row in rows}
    found = []
    order = sorted(groups.items(), key=lambda item: item[0][3] == "all")  # stable: in the order of the rows
    for (dtype, direction, threads, layout), members in order:
        if layout == "all" and len(layouts) < 2:
            continue
        head = {"dtype": dtype, "direction": direction, "threads": threads, "layout": layout}
        found.append(head | _figures(members))
    return {"groups": found, "bfloat16": _bfloat16(rows)}


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    good = [row for row in rows if row["error"] is None]
    figures: dict[str, Any] = {"cases": len(rows), "failed": [row["label"] for row in rows if row["error"]]}
    for name in _RATIOS:
        figures[name] = _spread([(row[name], row["label"]) for row in good if row[name] is not None])
    memory = [(row["memory"]["ratio"], row["label"]) for row in good if row.get("memory")]
    if memory:
        worst, label = max(memory)
        figures["memory"] = {"max": worst, "max_case": label}
    return figures


def _spread(values: Sequence[tuple[float, str]]) -> dict[str, Any] | None:
    if not values:
        return None
    least, label = min(values)
    return {"geomean": geometric_mean([v for v, _ in values]), "min": least, "min_case": label}


def _bfloat16(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """float32 time / bfloat16 time of ours, over rows that exist in both."""
    times = {row_key(row): row for row in rows if row["error"] is None}
    pairs: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for key, row in times.items():
        half = times.get(("bfloat16", *key[1:]))
        if key[0] == "float32" and half is not None:
            ratio = row["ours_us"] / half["ours_us"]
            pairs.setdefault((row["direction"], row["threads"]), []).append((ratio, row["label"]))
    return [
        {"direction": d, "threads": t, "over_float32": _spread(values)} for (d, t), values in pairs.items()
    ]


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Rows of two runs side by side: our time before / now (above 1 is faster now), and the same for the best
    library stages, which shows how much of it is the machine."""
    before = {row_key(row): row for row in old["rows"] if "ours_us" in row}
    rows = []
    for row in new["rows"]:
        past = before.get(row_key(row))
        if past is None or "ours_us" not in row:
            continue
        dtype, direction, threads, layout = _group(row)
        rows.append(
            {
                "dtype": dtype,
                "direction": direction,
                "threads": threads,
                "layout": layout,
                "label": row["label"],
                "old_us": past["ours_us"],
                "new_us": row["ours_us"],
                "speedup": past["ours_us"] / row["ours_us"],
                "stages_speedup": _stages_us(past) / _stages_us(row),
            }
        )
    gone = len(before) - len(rows)
    mean = geometric_mean([r["speedup"] for r in rows]) if rows else None
    return {"rows": rows, "geomean": mean, "only_in_old": gone, "only_in_new": len(new["rows"]) - len(rows)}


def _stages_us(row: Row) -> float:
    ratio = row.get("over_stages")
    return float("nan") if ratio is None else ratio * row["ours_us"]
