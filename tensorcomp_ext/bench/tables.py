"""Results as text: a line a row while it runs, and the tables of the summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]
"""Head and body."""


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def time_us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def noisy(row: dict[str, Any]) -> bool:
    """Whether a time varied so much, its 90th percentile above twice the median, that no ratio can be read
    from the row: ours, or that of the library's ways it is compared with."""
    named = {row.get("headline", "ours layer"), row.get("best_stages"), row.get("best_dense")}
    named |= {"dense eager", "ours tuned eager"} if "over_dense" in row else set()
    return any(
        c["name"] in named and c.get("p90_us", 0) > 2 * c["median_us"]
        for c in row["candidates"]
        if "median_us" in c
    )


def row_line(row: dict[str, Any]) -> str:
    """One measured row on one line, of any suite."""
    if "network" in row["case"]:
        return _network_line(row)
    case = row["case"]
    head = f"{case['dtype']} {case['layout']} {row['direction']} t{row['threads']} {row['label']}"
    if row["error"]:
        return f"{head}: FAILED {row['error']}"
    ours = next(c for c in row["candidates"] if c["name"] == row.get("headline", "ours layer"))
    name = f"{row['headline']} ({ours.get('plan') or 'as named'})" if "headline" in row else "ours"
    parts = [f"{name} {time_us(ours['median_us'])} us ({time_us(ours['p10_us'])}–{time_us(ours['p90_us'])})"]
    for key, ratio in (("best_stages", "over_stages"), ("best_dense", None)):
        if row[key]:
            found = next(c for c in row["candidates"] if c["name"] == row[key])
            gain = f" {number(row[ratio])}x" if ratio else ""
            parts.append(f"{row[key]} {time_us(found['median_us'])} us{gain}")
    roof = row["roofline"]
    parts.append(f"roofline {time_us(roof['time_us'])} us ({roof['bound']}) {number(row['roofline_share'])}")
    if row["saved"] is not None:
        parts.append(f"saved/MACs {number(row['saved'])}")
    for other, found in row.get("ours", {}).items():
        if other != row["headline"]:
            parts.append(f"{other} {time_us(found['median_us'])} us {number(found['over_stages'])}x")
    if row.get("memory"):
        parts.append(f"memory {number(row['memory']['ratio'])}x")
    if noisy(row):
        parts.append("NOISY: something else ran on the machine")
    left_out = [c["name"] for c in row["candidates"] if c["error"]]
    if left_out:
        parts.append(f"left out: {', '.join(left_out)}")
    if row.get("wrong"):
        parts.append(f"WRONG {'; '.join(row['wrong'])}")
    return f"{head}: " + "; ".join(parts)


def _network_line(row: dict[str, Any]) -> str:
    head = f"{row['case']['dtype']} {row['direction']} {row['label']}"
    if row["error"]:
        return f"{head}: FAILED {row['error']}"
    parts = [
        f"{c['name']} {time_us(c['median_us'])} us" if "median_us" in c else f"{c['name']}: {c['error']}"
        for c in row["candidates"]
    ]
    ratios = ", ".join(f"{number(ratio)}x {mode}" for mode, ratio in row["over_dense"].items())
    plans = "; ".join(dict.fromkeys(c["plan"] for c in row["candidates"] if c.get("plan")))
    noise = " NOISY: something else ran on the machine" if noisy(row) else ""
    slower = "" if row["never_slower"] else " SLOWER THAN DENSE"
    return f"{head}: {'; '.join(parts)}; over dense {ratios} ({plans}){slower}{noise}"


def summary_table(results: dict[str, Any], *, cases: bool = True) -> Table:
    """Geometric means with the least value in brackets (and its case), a line for each group."""
    head = ["dtype", "direction", "threads", "layout", "cases", "over best library stages"]
    head += ["over best library way", "share of roofline", "time saved / MACs saved", "memory, worst"]
    body = []
    for group in results["summary"]["groups"]:
        failed = f" ({len(group['failed'])} failed)" if group["failed"] else ""
        cells = [group["dtype"], group["direction"], str(group["threads"]), group["layout"]]
        cells.append(f"{group['cases']}{failed}")
        cells += [
            _spread(group[name], cases) for name in ("over_stages", "over_any", "roofline_share", "saved")
        ]
        memory = group.get("memory")
        cells.append(f"{number(memory['max'])}x" if memory else "–")
        body.append(cells)
    return head, body


def _spread(value: dict[str, Any] | None, case: bool = True) -> str:
    if value is None:
        return "–"
    where = f": {value['min_case']}" if case else ""
    return f"{number(value['geomean'])} (least {number(value['min'])}{where})"


def bfloat16_table(results: dict[str, Any]) -> Table:
    """Our float32 time over our bfloat16 time."""
    rows = results["summary"]["bfloat16"]
    body = [[r["direction"], str(r["threads"]), _spread(r["over_float32"])] for r in rows]
    return ["direction", "threads", "bfloat16 over our float32"], body


def overhead_table(results: dict[str, Any]) -> Table:
    """A layer call on a tiny input."""
    body = [
        [
            r["mode"],
            str(r["threads"]),
            number(r["ours_us"]),
            number(r["conv2d_us"]),
            f"{r['difference_us']:+.2f}",
        ]
        for r in results.get("overhead", [])
    ]
    return ["mode", "threads", "ours, us", "nn.Conv2d, us", "difference, us"], body


def rows_table(results: dict[str, Any], dtype: str, direction: str, threads: int, layout: str) -> Table:
    """Every case of one group."""
    head = [
        "case",
        "ours us (p10–p90)",
        "best library stages",
        "us",
        "ratio",
        "best dense us",
        "roofline",
        "share",
    ]
    body = []
    for row in results["rows"]:
        case = row["case"]
        if (case["dtype"], row["direction"], row["threads"], case["layout"]) != (
            dtype,
            direction,
            threads,
            layout,
        ):
            continue
        if row["error"]:
            body.append([row["label"], f"failed: {row['error']}", *["–"] * (len(head) - 2)])
            continue
        by_name = {c["name"]: c for c in row["candidates"]}
        ours = by_name[row.get("headline", "ours layer")]
        stages, dense = by_name.get(row["best_stages"]), by_name.get(row["best_dense"])
        body.append(
            [
                row["label"] + (" (noisy)" if noisy(row) else ""),
                f"{time_us(ours['median_us'])} ({time_us(ours['p10_us'])}–{time_us(ours['p90_us'])})",
                row["best_stages"] or "–",
                time_us(stages["median_us"]) if stages else "–",
                number(row["over_stages"]),
                time_us(dense["median_us"]) if dense else "–",
                f"{time_us(row['roofline']['time_us'])} us, {row['roofline']['bound']}",
                number(row["roofline_share"]),
            ]
        )
    return head, body


def compare_table(changes: dict[str, Any]) -> Table:
    """What changed between two runs."""
    head = [
        "dtype",
        "direction",
        "threads",
        "layout",
        "case",
        "before us",
        "now us",
        "faster by",
        "stages meanwhile",
    ]
    body = [
        [
            r["dtype"],
            r["direction"],
            str(r["threads"]),
            r["layout"],
            r["label"],
            time_us(r["old_us"]),
            time_us(r["new_us"]),
            f"{number(r['speedup'])}x",
            f"{number(r['stages_speedup'])}x",
        ]
        for r in changes["rows"]
    ]
    return head, body


def markdown(table: Table) -> str:
    """A table as GitHub markdown."""
    head, body = table
    lines = [_line(head), _line(["---"] * len(head)), *(_line(cells) for cells in body)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
