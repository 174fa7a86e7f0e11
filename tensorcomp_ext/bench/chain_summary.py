"""The figures of the chain suite that the tables of all suites do not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tables import number

Row = dict[str, Any]


def against_dense(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times faster than the dense layer the train of 4096 to 4096 features is, at each row count."""
    return [
        {
            "dtype": row["case"]["dtype"],
            "direction": row["direction"],
            "threads": row["threads"],
            "rows": row["case"]["rows"],
            "rank": row["case"]["rank"],
            "over_dense": row["over_dense"],
        }
        for row in rows
        if row["case"]["format"] == "tt"
        and row["case"]["c_in"] == row["case"]["c_out"] == 4096
        and row.get("over_dense") is not None
    ]


def chain_lines(results: dict[str, Any]) -> list[str]:
    """What :func:`against_dense` found, a line for each row."""
    return [
        f"TT 4096 to 4096 rank {found['rank']}, {found['dtype']} {found['direction']}, {found['threads']} "
        f"threads, {found['rows']} rows: {number(found['over_dense'])} times the speed of dense"
        for found in results["summary"].get("chain", [])
    ]
