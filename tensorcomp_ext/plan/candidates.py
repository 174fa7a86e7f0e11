"""The candidates for a call as a list that prints as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Candidate

_COLUMNS = ("", "plan", "MACs", "MB", "predicted ms", "measured ms", "program", "reason")
_RIGHT = range(2, 6)


class CandidateList(list["Candidate"]):
    """Candidates of one layer for one kind of input; printed, a row for each, the chosen one marked ``*``."""

    def __str__(self) -> str:
        return _aligned([_COLUMNS, *(_cells(candidate) for candidate in self)])

    __repr__ = __str__


def _cells(candidate: Candidate) -> tuple[str, ...]:
    # A plan that cannot serve has costs on paper only.
    serves = candidate.available.ok
    return (
        "*" if candidate.chosen else "",
        candidate.name,
        f"{candidate.macs:,}" if serves else "–",
        f"{candidate.bytes / 1e6:.3f}" if serves else "–",
        f"{candidate.predicted * 1e3:.4f}" if serves else "–",
        "–" if candidate.measured is None else f"{candidate.measured * 1e3:.4f}",
        candidate.program or "–",
        candidate.reason,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if place in _RIGHT else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
