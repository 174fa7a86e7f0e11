"""What compression did to every layer and to the network, for people and for machines."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorcomp_ext.compress.latency import Latency

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("layer", "format", "parameters", "bytes", "MACs", "error", "latency ms", "plan", "remark")

MACS_NOTE = "MACs are those of the plan that runs; a layer on the dense plan saves none."


@dataclass
class LayerReport:
    """One layer. Parameters count weight entries without the bias; MACs are those of one call of the network.

    Of a weight with a sparse part parameters count the factors and the entries that are kept, as publications
    do; ``bytes_after`` counts what says where these belong, too. Bytes stay None where parameters say it all.
    ``skipped`` is the reason the layer was left dense, None where it was replaced; ``note`` is a remark on a
    layer that was replaced. Fields that need example inputs (``input_shape``, MACs) or measuring (latencies)
    stay None without them. ``macs_after`` counts the plan that runs, so it equals ``macs_before`` under a
    dense plan.
    """

    name: str
    type: str
    parameters_before: int
    parameters_after: int
    format: str | None = None
    rank: tuple[int, ...] | None = None
    relative_error: float | None = None
    input_shape: tuple[int, ...] | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    plan: str | None = None
    skipped: str | None = None
    note: str | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None

    @property
    def ratio(self) -> float:
        """Layer ratio: dense weights / factor weights."""
        return self.parameters_before / max(self.parameters_after, 1)

    @property
    def noisy(self) -> bool:
        """Whether a latency varied so much that no speed-up can be read from it."""
        return any(t is not None and t.noisy for t in (self.latency_before, self.latency_after))

    def cells(self) -> tuple[str, ...]:
        """The row of the printed table, in the order of ``COLUMNS``."""
        after = self.skipped is None
        latency = _before_after(
            _milliseconds(self.latency_before), _milliseconds(self.latency_after) if after else None
        )
        if self.noisy:
            latency += " noisy"
        return (
            self.name or "(model)",
            f"{self.format} {'×'.join(map(str, self.rank or ()))}" if self.format else "dense",
            _before_after(_count(self.parameters_before), _count(self.parameters_after) if after else None),
            _before_after(_count(self.bytes_before), _count(self.bytes_after)),
            _before_after(_count(self.macs_before), _count(self.macs_after) if after else None),
            "" if self.relative_error is None else f"{self.relative_error:.3f}",
            latency,
            self.plan or "",
            self.skipped or self.note or "",
        )


@dataclass
class Report:
    """All layers of a network that compression looked at, and the totals.

    ``parameters_before`` / ``parameters_after`` count every parameter of the network, biases and
    normalisation included, shared ones once. MACs sum over the convolutions and linear layers that the
    example inputs reached. ``output_error`` is the relative L2 distance of the compressed network's output on
    the example inputs.
    """

    layers: list[LayerReport]
    parameters_before: int
    parameters_after: int
    output_error: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} in the report; it has {[layer.name for layer in self.layers]}")

    @property
    def replaced(self) -> list[LayerReport]:
        """The layers that were factorised."""
        return [layer for layer in self.layers if layer.skipped is None]

    @property
    def skipped(self) -> list[LayerReport]:
        """The layers that were left dense; each says why."""
        return [layer for layer in self.layers if layer.skipped is not None]

    @property
    def layer_ratio(self) -> float:
        """Dense weights / factor weights over the replaced layers; 1.0 where nothing was replaced."""
        after = sum(layer.parameters_after for layer in self.replaced)
        return sum(layer.parameters_before for layer in self.replaced) / after if after else 1.0

    @property
    def model_ratio(self) -> float:
        """All dense parameters / all stored compressed parameters."""
        return self.parameters_before / max(self.parameters_after, 1)

    @property
    def macs_before(self) -> int | None:
        """MACs of the dense network on the example inputs, None without them."""
        known = [layer.macs_before for layer in self.layers if layer.macs_before is not None]
        return sum(known) if known else None

    @property
    def macs_after(self) -> int | None:
        """MACs of the plans that run on the example inputs, None without them."""
        known = [layer.macs_after for layer in self.layers if layer.macs_after is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary. Totals and ratios are in it for readers; ``from_dict`` ignores them."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "layer_ratio": self.layer_ratio,
            "model_ratio": self.model_ratio,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "output_error": self.output_error,
            "details": self.details,
            "layers": [_layer_to_dict(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that ``to_dict`` described. ValueError where fields are missing or of another type."""
        try:
            return cls(
                layers=[_layer_from_dict(layer) for layer in data["layers"]],
                parameters_before=int(data["parameters_before"]),
                parameters_after=int(data["parameters_after"]),
                output_error=data.get("output_error"),
                details=dict(data.get("details") or {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a compression report: {type(error).__name__}: {error}") from error

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def rows(self) -> list[tuple[str, ...]]:
        """The printed table: one tuple of cells per layer, then the totals, in the order of ``COLUMNS``."""
        error = "" if self.output_error is None else f"{self.output_error:.3f}"
        total = (
            "network",
            f"{len(self.replaced)} of {len(self.layers)}",
            _before_after(_count(self.parameters_before), _count(self.parameters_after)),
            "",
            _before_after(_count(self.macs_before), _count(self.macs_after)),
            error,
            "",
            "",
            f"layers {self.layer_ratio:.2f}× smaller, model {self.model_ratio:.2f}×{self.sparse_note}",
        )
        return [*(layer.cells() for layer in self.layers), total]

    @property
    def sparse_note(self) -> str:
        """Both counts of the layers with a sparse part, as the end of a remark; empty where there is none."""
        sparse = [layer for layer in self.replaced if layer.bytes_after is not None]
        if not sparse:
            return ""
        weights = sum(layer.parameters_after for layer in sparse)
        before = sum(layer.bytes_before or 0 for layer in sparse)
        after = sum(layer.bytes_after or 0 for layer in sparse)
        return (
            f"; low-rank + sparse layers: {weights:,} weights without indices, {before:,} → {after:,} bytes "
            f"with them, {before / max(after, 1):.2f}× smaller"
        )

    def table(self, title: str | None = None) -> Table:
        """The report as a rich table, remarks below it (rich is needed only here)."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = self.rows()
        remarks = "\n".join(f"{row[0]}: {row[-1]}" for row in rows if row[-1])
        if self.macs_after is not None:
            remarks += f"\n{MACS_NOTE}"
        table = Table(title=title, box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
        table.caption, table.caption_justify = Text(remarks, justify="left"), "left"
        used = [index for index in self._used_columns() if COLUMNS[index] != "remark"]
        for index in used:
            numeric = COLUMNS[index] in ("parameters", "bytes", "MACs", "error", "latency ms")
            table.add_column(COLUMNS[index], justify="right" if numeric else "left", no_wrap=index == 0)
        for number, row in enumerate(rows):
            style = "bold" if number == len(rows) - 1 else "" if row[1] != "dense" else "dim"
            table.add_row(
                *(Text(row[index]) for index in used), style=style, end_section=number == len(rows) - 2
            )
        return table

    def __str__(self) -> str:
        used = self._used_columns()
        rows = [COLUMNS, *self.rows()]
        widths = {index: max(len(row[index]) for row in rows) for index in used}
        lines = ["  ".join(row[index].ljust(widths[index]) for index in used).rstrip() for row in rows]
        return "\n".join(lines)

    def _used_columns(self) -> list[int]:
        rows = self.rows()
        return [index for index in range(len(COLUMNS)) if any(row[index] for row in rows)]


def _before_after(before: str | None, after: str | None) -> str:
    if before is None or after is None or before == after:
        return before or after or ""
    return f"{before} → {after}"


def _milliseconds(latency: Latency | None) -> str | None:
    return None if latency is None else f"{latency.p50 * 1e3:.3f}"


def _count(number: int | None) -> str | None:
    if number is None:
        return None
    if number < 10_000:
        return f"{number:,}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if number < 999.5 * size or unit == "G":
            return f"{number / size:.{max(0, 2 - int(math.log10(number / size)))}f}{unit}"
    return str(number)


def _layer_to_dict(layer: LayerReport) -> dict[str, Any]:
    data: dict[str, Any] = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
    for name in ("latency_before", "latency_after"):
        data[name] = data[name]._asdict() if data[name] is not None else None
    for name in ("rank", "input_shape"):
        data[name] = list(data[name]) if data[name] is not None else None
    return data


def _layer_from_dict(data: Mapping[str, Any]) -> LayerReport:
    values = {f.name: data[f.name] for f in dataclasses.fields(LayerReport) if f.name in data}
    for name in ("latency_before", "latency_after"):
        values[name] = Latency(**values[name]) if values.get(name) else None
    for name in ("rank", "input_shape"):
        values[name] = tuple(values[name]) if values.get(name) is not None else None
    return LayerReport(**values)
