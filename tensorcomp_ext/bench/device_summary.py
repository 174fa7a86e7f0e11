"""What the rows of several plans come to: means over large rows, and every row where something is slower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measure import FUSED, OP, PARTIAL, STAGED, TUNED
from .ours import LAYER
from .summary import geometric_mean
from .tables import Table, number, time_us

Row = dict[str, Any]

WAYS = (TUNED, LAYER, FUSED, PARTIAL, STAGED, OP)
MACS_SAVED = 4.0
"""Ratio of dense to factorized MACs from which a layer that is slower than dense is worth a line."""

_RATIOS = ("over_stages", "over_any", "roofline_share")


def device_summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per dtype, direction and layout (and all layouts together).

    ``large``: geometric means over the rows marked large, for every way of ours. ``below_one``: rows in which
    the tuned layer is slower than the best library way; ``below_dense``: slower than the best dense way in
    its own layout; ``saving_and_slower``: those of the latter with at least a quarter of the MACs left out.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        case = row["case"]
        for layout in (case["layout"], "all"):
            groups.setdefault((case["dtype"], row["direction"], layout), []).append(row)
    layouts = {row["case"]["layout"] for row in rows}
    found = []
    for (dtype, direction, layout), members in groups.items():
        if layout == "all" and len(layouts) < 2:
            continue
        head = {"dtype": dtype, "direction": direction, "layout": layout}
        found.append(head | _figures(members))
    return found


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    good = [row for row in rows if row["error"] is None]
    large = [row for row in good if row["large"]]
    slower = [row for row in good if (row["over_dense_here"] or 1.0) < 1.0]
    return {
        "rows": len(rows),
        "failed": [row["label"] for row in rows if row["error"] is not None],
        "large_rows": len(large),
        "large": {way: _means(large, way) for way in WAYS if any(way in row["ours"] for row in large)},
        "below_one": _labelled([row for row in good if (row["over_any"] or 1.0) < 1.0], "over_any"),
        "below_dense": _labelled(slower, "over_dense_here"),
        "saving_and_slower": _labelled(
            [row for row in slower if row["dense_macs"] >= MACS_SAVED * row["macs"]], "over_dense_here"
        ),
        "not_captured": sorted(
            {c["name"] for row in good for c in row["candidates"] if c.get("capture_error") is not None}
        ),
    }


def _means(rows: Sequence[Row], way: str) -> dict[str, Any]:
    having = [row["ours"][way] for row in rows if way in row["ours"]]
    means: dict[str, Any] = {"rows": len(having)}
    for name in _RATIOS:
        values = [found[name] for found in having if found[name] is not None]
        means[name] = geometric_mean(values) if values else None
        means[f"{name}_min"] = min(values) if values else None
    return means


def _labelled(rows: Sequence[Row], ratio: str) -> list[dict[str, Any]]:
    return [{"label": row["label"], "layout": row["case"]["layout"], "ratio": row[ratio]} for row in rows]


def device_table(results: dict[str, Any]) -> Table:
    """A line for each group and way of ours; geometric means over large rows, the least in brackets."""
    head = ["dtype", "direction", "layout", "way", "large rows", "over best stages", "over best library way"]
    head += ["share of roofline", "rows below 1", "below dense", "of these, 4x fewer MACs"]
    body = []
    for group in results["summary"].get("device", []):
        counts = [str(len(group[key])) for key in ("below_one", "below_dense", "saving_and_slower")]
        ways = group["large"] or {"–": None}
        for index, (way, means) in enumerate(ways.items()):
            cells = [group["dtype"], group["direction"], group["layout"], way]
            cells.append(str(means["rows"]) if means else "0")
            cells += [_mean(means, name) for name in _RATIOS]
            body.append(cells + (counts if index == 0 else [""] * 3))
    return head, body


def _mean(means: dict[str, Any] | None, name: str) -> str:
    if means is None or means[name] is None:
        return "–"
    return f"{number(means[name])} ({number(means[f'{name}_min'])})"


def network_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows are never slower than dense, and those that are."""
    good = [row for row in rows if "over_dense" in row]
    return {
        "rows": len(rows),
        "measured": len(good),
        "slower": [
            {"label": r["label"], "dtype": r["case"]["dtype"], "direction": r["direction"], **r["over_dense"]}
            for r in good
            if not r["never_slower"]
        ],
    }


def network_table(results: dict[str, Any]) -> Table:
    """A line for each row, microseconds of every candidate."""
    rows = [row for row in results["rows"] if "over_dense" in row]
    names = [*dict.fromkeys(c["name"] for row in rows for c in row["candidates"])]
    head = [
        "network",
        "dtype",
        "direction",
        *(f"{name} us" for name in names),
        "over dense",
        "over best dense",
        "plans",
    ]
    head.append("never slower")
    body = []
    for row in rows:
        times = {c["name"]: c.get("median_us") for c in row["candidates"]}
        cells = [row["label"], row["case"]["dtype"], row["direction"]]
        cells += [time_us(t) if (t := times.get(name)) is not None else "–" for name in names]
        cells.append(", ".join(f"{number(ratio)} {mode}" for mode, ratio in row["over_dense"].items()))
        cells.append(number(row.get("over_best_dense")))
        cells.append("; ".join(dict.fromkeys(c["plan"] for c in row["candidates"] if c.get("plan"))))
        body.append([*cells, "yes" if row["never_slower"] else "NO"])
    return head, body


def never_slower_line(results: dict[str, Any]) -> str:
    """The promise in one line, with the rows that break it."""
    found = results["summary"]["network"]
    text = f"never slower than dense: {found['measured'] - len(found['slower'])} of {found['measured']} rows"
    for row in found["slower"]:
        ratios = ", ".join(f"{number(row[mode])} {mode}" for mode in ("eager", "graph") if mode in row)
        text += f"\n  slower: {row['dtype']} {row['direction']} {row['label']} ({ratios})"
    return text
