"""The table of the embedding suite: ours against the dense gather, the rebuilt table and the slices."""

from __future__ import annotations

from typing import Any

from .embedding_library import GATHER, REBUILT, SLICES
from .measure import TUNED
from .tables import Table, number, time_us

_MEBI = 2**20


def embedding_table(results: dict[str, Any]) -> Table:
    """A line for each row: microseconds and ratios, peak megabytes beyond weights and indices."""
    head = [
        "lookups",
        "dtype",
        "direction",
        "threads",
        "ours us",
        "plan",
        "before tune us",
        "tuned us (plan)",
    ]
    head += ["dense gather us", "of dense", "rebuilt us", "of rebuilt", "slices us", "over slices"]
    head += ["peak MiB: ours", "cores + output", "dense", "rebuilt", "slices"]
    body = []
    for row in results["rows"]:
        cells = [row["label"], row["case"]["dtype"], row["direction"], str(row["threads"])]
        if row["error"]:
            body.append([*cells, f"failed: {row['error']}", *["–"] * (len(head) - len(cells) - 1)])
            continue
        times = {c["name"]: c.get("median_us") for c in row["candidates"]}
        ours = next(c for c in row["candidates"] if c["name"] == row["headline"])
        cells += [time_us(row["ours_us"]), ours.get("plan", "–"), _time(times.get("ours layer")), _tuned(row)]
        for name, inverse in ((GATHER, True), (REBUILT, True), (SLICES, False)):
            other = times.get(name)
            ratio = None if other is None else row["ours_us"] / other if inverse else other / row["ours_us"]
            cells += [_time(other), number(ratio)]
        memory = row.get("memory") or {}
        keys = ("ours_bytes", "least_bytes", "dense_bytes", "rebuilt_bytes", "stages_bytes")
        cells += [number(memory[key] / _MEBI, 1) if key in memory else "–" for key in keys]
        body.append(cells)
    return head, body


def _tuned(row: dict[str, Any]) -> str:
    found = next((c for c in row["candidates"] if c["name"] == TUNED and "median_us" in c), None)
    return "–" if found is None else f"{time_us(found['median_us'])} ({found.get('plan', '–')})"


def _time(value: float | None) -> str:
    return "–" if value is None else time_us(value)
