"""What tuning found, for people and for machines."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .case import Case

if TYPE_CHECKING:
    from rich.table import Table

_UNSTEADY = 2.0
"""Median over the tenth percentile above which something else ran beside a measurement."""
_MARK = "?"
_WIDTH = 200  # of the text form: wide enough for a row to stay a line, whatever the terminal


@dataclass(frozen=True)
class Timing:
    """Seconds of one call under one plan."""

    median: float
    p10: float
    p90: float
    rounds: int

    @property
    def steady(self) -> bool:
        """Whether the machine did the same each time: the median is at most twice the tenth percentile."""
        return self.median <= _UNSTEADY * self.p10


@dataclass(frozen=True)
class LayerTuning:
    """What was measured for one layer and one kind of input, and what was chosen."""

    layer: str
    case: str
    choice: str
    timings: Mapping[str, Timing]
    unavailable: Mapping[str, str]
    """Plans that could not serve, with the reason."""

    @property
    def disturbed(self) -> bool:
        """Whether something else ran beside the measurement of the choice or of the dense layer."""
        against = (self.timings[name] for name in {self.choice, "dense"} & set(self.timings))
        return not all(timing.steady for timing in against)


@dataclass(repr=False)
class TuneResult:
    """The outcome of :func:`tune`; printed, a table of the medians."""

    layers: list[LayerTuning] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)

    def table(self) -> Table:
        """A rich table: a row for each layer and kind of input, milliseconds under every plan."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        cases = [Case.parse(entry.case) for entry in self.layers]
        modes = sorted({f"{_mode(case)}, {case.device}, threads: {case.threads}" for case in cases})
        table = Table(
            title=f"milliseconds of a call: {'; '.join(modes)}",
            title_justify="left",
            caption=Text("\n".join([*self._refusals(), *self._disturbances(), self._summary()])),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            header_style="bold",
            padding=(0, 1, 0, 0),
        )
        plans = [*dict.fromkeys(plan for e in self.layers for plan in e.timings)]
        for column in ("layer", "input", "plan"):
            table.add_column(column, no_wrap=column == "layer")
        for column in (*plans, "over dense"):
            table.add_column(column, justify="right")
        for entry, case in zip(self.layers, cases, strict=True):
            times = [_milliseconds(entry.timings.get(plan)) for plan in plans]
            table.add_row(
                Text(entry.layer or "(model)"),
                f"{'×'.join(map(str, case.shape))} {case.precision} {case.layout}",
                entry.choice,
                *(Text(t, "bold" if p == entry.choice else "") for p, t in zip(plans, times, strict=True)),
                _over_dense(entry) + _MARK * entry.disturbed,
            )
        return table

    def _refusals(self) -> list[str]:
        """Each reason for which a plan could not serve, once."""
        reasons = [(plan, reason) for entry in self.layers for plan, reason in entry.unavailable.items()]
        return [f"{plan}: {reason}" for plan, reason in dict.fromkeys(reasons)]

    def _disturbances(self) -> list[str]:
        count = sum(entry.disturbed for entry in self.layers)
        if not count:
            return []
        note = (
            "half of a plan's calls took over twice as long as its fastest; tune again when nothing else runs"
        )
        return [f"{_MARK} disturbed ({count} of {len(self.layers)}): {note}"]

    def _summary(self) -> str:
        layers = len({entry.layer for entry in self.layers})
        text = f"{layers} layer{'s'[: layers != 1]} tuned in {self.seconds:.1f} s"
        return f"{text}, interrupted: the others are as they were" if self.interrupted else text

    def __str__(self) -> str:
        from rich.console import Console

        if not self.layers:
            return self._summary()
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, legacy_windows=False)
        with console.capture() as captured:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")

    def __repr__(self) -> str:
        return f"<TuneResult: {self._summary()}>"


def _mode(case: Case) -> str:
    return "training" if case.training else "inference"


def _milliseconds(timing: Timing | None) -> str:
    return "–" if timing is None else f"{timing.median * 1e3:.3f}"


def _over_dense(entry: LayerTuning) -> str:
    dense, chosen = entry.timings.get("dense"), entry.timings[entry.choice]
    return "–" if dense is None else f"{dense.median / chosen.median:.2f}×"
