"""What a latency rule chooses from: for every layer ranks with their error, for every kind their latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tensorcomp_ext.compress.allocate import positions
from tensorcomp_ext.compress.calls import Call, dense_macs
from tensorcomp_ext.compress.factorize import Choice, assembled
from tensorcomp_ext.compress.rank_candidates import candidates, evenly
from tensorcomp_ext.compress.stopwatch import Stopwatch
from tensorcomp_ext.decompose.output_fit import KernelFit, MatrixFit, OutputFit
from tensorcomp_ext.nn import FactorizedLayer
from tensorcomp_ext.ranks import rank_layout
from tensorcomp_ext.ranks.layouts import Ranks

FITS: dict[str, type[MatrixFit] | type[KernelFit]] = {"svd": MatrixFit, "tucker2": KernelFit}
MOST, LEAST = 24, 4
"""Candidates of a kind of layer."""
_CALLS = 25
"""Calls of the dense layer that a candidate takes about as long to tune and measure as."""


@dataclass
class Table:
    """Layers of one kind: equal but for their weights, and called on inputs of equal geometry."""

    members: list[Choice]
    calls: list[Call]
    fits: dict[str, OutputFit]
    ranks: list[Ranks] = field(default_factory=list)
    dense_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    layers: list[FactorizedLayer] = field(default_factory=list)

    def losses(self, name: str) -> list[float]:
        """Squared relative errors of a member at the candidates."""
        return [self.fits[name].squared_error(ranks) for ranks in self.ranks]

    def options(self, name: str) -> list[tuple[float, float]]:
        """(seconds over the dense layer's, loss) of staying dense and of every candidate."""
        saved = [seconds - self.dense_seconds for seconds in self.seconds]
        return [(0.0, 0.0), *zip(saved, self.losses(name), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        plans = [sorted({entry["plan"] for entry in layer.tuned.values()}) for layer in self.layers]
        return {
            "layers": {choice.name: self.losses(choice.name) for choice in self.members},
            "input": list(self.calls[0].shape),
            "calls": len(self.calls),
            "dense_seconds": self.dense_seconds,
            "ranks": [list(ranks) for ranks in self.ranks],
            "seconds": self.seconds,
            "plans": plans,
        }


def tables_of(
    choices: Sequence[Choice], calls: Mapping[str, list[Call]], moments: dict[str, Tensor]
) -> list[Table]:
    """Layers in kinds, with their errors; ``moments`` of what they read, where that is known, are used up."""
    found: dict[Any, Table] = {}
    for choice in choices:
        layer, made = choice.layer, calls[choice.name]
        geometry = tuple(
            str(getattr(layer, part, None)) for part in ("kernel_size", "stride", "padding", "dilation")
        )
        weight = layer.weight
        kind = (type(layer), geometry, tuple(weight.shape), weight.stride(), weight.dtype, weight.device)
        key = (*kind, layer.bias is None, choice.format, str(choice.structure), tuple(made))
        table = found.setdefault(key, Table([], made, {}))
        table.members.append(choice)
        table.fits[choice.name] = FITS[choice.format](weight, moments.pop(choice.name, None))
    return list(found.values())


def measure_tables(
    tables: Sequence[Table], stopwatch: Stopwatch, seconds: float, progress: Any = None
) -> None:
    """Choose the candidates of every kind and measure them; ``seconds`` in all, more where four take more."""
    dense = [_dense_seconds(table, stopwatch) for table in tables]
    for place, (table, taken) in enumerate(zip(tables, dense, strict=True)):
        if progress is not None:
            progress(place, len(tables), f"latency of {table.members[0].name}")
        share = seconds / len(tables)
        most = max(LEAST, min(MOST, int(share / max(_CALLS * taken, 1e-9))))
        first = table.members[0]
        layout = rank_layout(first.layer.weight.detach(), first.format, **first.structure)
        where = [positions(first.layer, call) for call in table.calls]
        found = candidates(
            layout,
            lambda ranks, layout=layout, where=where: sum(layout.macs(ranks, p) for p in where),  # type: ignore[misc]
            sum(dense_macs(first.layer, call) or 0 for call in table.calls),
            [fit.squared_error for fit in table.fits.values()],
        )
        table.ranks = evenly(found, most)
        table.layers = [assembled(first, ranks) for ranks in table.ranks]
        table.dense_seconds, table.seconds = 0.0, [0.0] * len(table.ranks)
        if not table.ranks:
            continue
        for call in dict.fromkeys(table.calls):
            times = stopwatch.layers(first.layer, call, table.layers, share / len(set(table.calls)))
            repeats = table.calls.count(call)
            table.dense_seconds += repeats * times[0]
            table.seconds = [a + repeats * b for a, b in zip(table.seconds, times[1:], strict=True)]


def _dense_seconds(table: Table, stopwatch: Stopwatch) -> float:
    layer = table.members[0].layer
    return sum(stopwatch.layers(layer, call, [], 0.0)[0] for call in table.calls)
