"""The report as one HTML file: no script, no external resource, readable on a phone and in the dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tensorcomp_ext.cli import plots, report_plots
from tensorcomp_ext.cli.info import gather
from tensorcomp_ext.compress.atomic import replacing
from tensorcomp_ext.compress.latency import Latency
from tensorcomp_ext.compress.report import LayerReport, Report

STAGES = {
    "before": "dense",
    "decomposed": "after decomposition",
    "recalibrated": "after recalibrating batch normalisation",
    "finetuned": "after fine-tuning",
    "trained": "after training",
}
_DASH = "–"


def environment() -> dict[str, str]:
    """What a measurement depends on: processor, instruction set, threads and versions."""
    found = gather()
    native = found["native"]
    return {
        "processor": str(found["processor"]),
        "instruction set": str(found["isa"] or _DASH),
        "threads": str(found["threads"]),
        "native code": "on" if native["ok"] else f"off: {native['reason']}",
        "tensorcomp_ext": str(found["version"]),
        "torch": str(found["torch"]),
        "Python": str(found["python"]),
    }


def write_report(path: str | Path, report: Report, *, title: str | None = None) -> None:
    """Write one compressed network's report, with what `report.details` holds, as HTML. See `write_html`."""
    details = report.details
    name = str(details.get("model", "network"))
    run = {"name": name, "report": report}
    write_html(path, {"title": title or f"{name}, compressed", "runs": [run], "environment": environment()})


def write_html(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write a report of one or several compressed networks as one self-contained HTML file, atomically.

    Arguments:
        path: file to write.
        results: "title": str; "description": paragraphs and "environment": names to values (both optional);
            "runs": list of mappings with "name"; "report": a Report or its `to_dict()`; "notes": paragraphs
            (optional); and, where they are not in the report's details, "accuracy": stage -> {"correct",
            "total"} with the stages before, decomposed, recalibrated, finetuned, trained; "latency": batch
            size -> {"dense", "compressed"} -> {"p10", "p50", "p90"} in seconds; "bytes" and "files":
            {"before", "after"}; "spectra" as `spectra.add_spectra` and "histograms" as
            `recipes.lowrank_sparse` write them. "sweep": the points of `sweep.sweep`
            (optional), in place of runs or beside them.

    Raises ValueError where there is no run or a report is none; OSError where the file cannot be written.
    """
    text = render(results)
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")


def render(results: Mapping[str, Any]) -> str:
    """The HTML text; arguments and errors of `write_html`."""
    runs = [_Run(run) for run in results.get("runs", ())]
    points = list(results.get("sweep") or ())
    if not runs and not points:
        raise ValueError("write_html: results must hold at least one run or a sweep")
    with_plots = plots.available()
    templates = Environment(
        loader=PackageLoader("tensorcomp_ext.cli", "."), autoescape=True, undefined=StrictUndefined
    )
    summary: dict[str, Any] = _summary(runs)
    summary["plot"] = _summary_plot(runs) if with_plots else None
    return templates.get_template("report.html.j2").render(
        title=str(results.get("title", "Compressed networks")),
        description=list(results.get("description", ())),
        summary=summary if runs else None,
        sweep=_sweep(points, with_plots) if points else None,
        summary_note=_images(runs),
        runs=[_section(run, f"run-{number}", with_plots) for number, run in enumerate(runs, 1)],
        environment=dict(results.get("environment") or {}),
        plots=with_plots,
    )


class _Run:
    """One run's entries, taken from itself or from its report's details."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        report = run["report"]
        self.report = report if isinstance(report, Report) else Report.from_dict(report)
        self.name = str(run["name"])
        self.notes = list(run.get("notes", ()))

        def entry(name: str) -> dict[str, Any]:
            return dict(run.get(name) or self.report.details.get(name) or {})

        self.accuracy, self.latency = entry("accuracy"), entry("latency")
        self.bytes, self.files = entry("bytes"), entry("files")
        self.spectra, self.histograms = entry("spectra"), entry("histograms")
        self.trained = "lowrank_sparse" in self.report.details

    def latency_of(self, batch: str, network: str) -> Latency | None:
        taken = self.latency.get(batch, {}).get(network)
        return None if taken is None else Latency(**taken)


def _summary(runs: Sequence[_Run]) -> dict[str, Any]:
    """The summary table: one column per run; a row per quantity, "before → after" in each cell."""
    rows: list[dict[str, Any]] = []

    def add(label: str, cells: Iterable[tuple[str, str]]) -> None:
        cells = list(cells)
        if any(text != _DASH for text, _ in cells):
            rows.append({"label": label, "cells": [{"text": text, "mood": mood} for text, mood in cells]})

    add("layers replaced", ((f"{len(r.report.replaced)} of {len(r.report.layers)}", "") for r in runs))
    add("parameters", (_change(r.report.parameters_before, r.report.parameters_after) for r in runs))
    add("MACs", (_change(r.report.macs_before, r.report.macs_after) for r in runs))
    add("bytes of weights", (_change(r.bytes.get("before"), r.bytes.get("after")) for r in runs))
    add("bytes on disk", (_change(r.files.get("before"), r.files.get("after")) for r in runs))
    for stage in _in_order(r.accuracy for r in runs):
        add(f"accuracy, {STAGES.get(stage, stage)}", (_accuracy(r.accuracy.get(stage)) for r in runs))
    for batch in _in_order(r.latency for r in runs):
        for percentile in ("p50", "p90"):
            cells = [
                _faster(r.latency_of(batch, "dense"), r.latency_of(batch, "compressed"), percentile)
                for r in runs
            ]
            add(f"latency at batch {batch}, {percentile}", cells)
    return {"heads": [run.name for run in runs], "rows": rows}


def _summary_plot(runs: Sequence[_Run]) -> Markup | None:
    accuracy = {
        run.name: {
            STAGES.get(stage, stage): counts["correct"] / counts["total"]
            for stage, counts in run.accuracy.items()
        }
        for run in runs
        if run.accuracy
    }
    latency: dict[str, dict[str, tuple[float, float]]] = {}
    for batch in _in_order(r.latency for r in runs):
        values: dict[str, tuple[float, float]] = {}
        for run in runs:
            dense, small = run.latency_of(batch, "dense"), run.latency_of(batch, "compressed")
            if dense is not None and small is not None:
                # Each run is compared with the dense network measured in turn with it.
                values.setdefault("dense", (1.0, dense.p90 / dense.p50))
                values[run.name] = (small.p50 / dense.p50, small.p90 / dense.p50)
        if values:
            latency[batch] = values
    if not accuracy and not latency:
        return None
    return Markup(plots.network_plot(accuracy, latency, "summary"))


def _section(run: _Run, identity: str, with_plots: bool) -> dict[str, Any]:
    report = run.report
    replaced = report.replaced
    return {
        "id": identity,
        "name": run.name,
        "notes": run.notes,
        "layers": [_layer(layer) for layer in report.layers],
        "total": {
            "parameters": (f"{report.parameters_before:,}", f"{report.parameters_after:,}"),
            "macs": (_count(report.macs_before), _count(report.macs_after)),
            "error": "" if report.output_error is None else f"{report.output_error:.3f}",
            "remark": f"all parameters; layers {report.layer_ratio:.2f}× smaller, "
            f"model {report.model_ratio:.2f}×{report.sparse_note}; the error is that of the outputs "
            f"{'after training' if run.trained else 'before fine-tuning'}",
        },
        "plot": Markup(plots.layer_plot(replaced, identity)) if with_plots and replaced else None,
        "errors": _errors(replaced, identity) if with_plots else None,
        "spectra": _spectra(run, identity) if with_plots and run.spectra else None,
        "histograms": _histograms(run, identity) if with_plots and run.histograms else None,
    }


def _errors(layers: Sequence[LayerReport], identity: str) -> Markup | None:
    """Errors of the decompositions, of two layers or more: what has no low-rank part has none."""
    errors = {layer.name: layer.relative_error for layer in layers if layer.relative_error is not None}
    if len(errors) < 2:
        return None
    return Markup(report_plots.error_plot({"": errors}, f"{identity}-errors"))


def _histograms(run: _Run, identity: str) -> Markup:
    return Markup(report_plots.histogram_plot(run.histograms, f"{identity}-histograms"))


def _spectra(run: _Run, identity: str) -> Markup:
    return Markup(report_plots.spectra_plot(run.spectra, f"{identity}-spectra"))


def _sweep(points: Sequence[Mapping[str, Any]], with_plots: bool) -> dict[str, Any]:
    """The points of a sweep: a table of them, and the plot."""
    rows = []
    for point in points:
        small, dense = Latency(**point["latency"]), Latency(**point["dense_latency"])
        error = point["output_error"]
        cells = [f"{point['parameters']:,}", _count(point["macs"]), "" if error is None else f"{error:.3f}"]
        cells += [_accuracy(point.get("accuracy"))[0], _faster(dense, small, "p50")[0]]
        rows.append({"label": point["rank"], "cells": cells})
    plot = Markup(report_plots.pareto_plot(points, "sweep-plot")) if with_plots else None
    return {"rows": rows, "plot": plot}


def _layer(layer: LayerReport) -> dict[str, Any]:
    kept = layer.skipped is not None
    before, after = layer.latency_before, layer.latency_after
    ratio, mood = "", ""
    if before is not None and after is not None:
        ratio = "noisy" if layer.noisy else f"{before.p50 / after.p50:.2f}×"
        mood = "" if layer.noisy else "good" if before.p50 >= after.p50 else "bad"
    return {
        "name": layer.name or "(model)",
        "format": layer.format or "dense",
        "ranks": " × ".join(map(str, layer.rank or ())),
        "parameters": (f"{layer.parameters_before:,}", "" if kept else f"{layer.parameters_after:,}"),
        "macs": (_count(layer.macs_before), "" if kept else _count(layer.macs_after)),
        "error": "" if layer.relative_error is None else f"{layer.relative_error:.3f}",
        "plan": layer.plan or "",
        "latency": tuple("" if t is None else f"{t.p50 * 1e3:.3f}" for t in (before, after)),
        "speedup": ratio,
        "mood": mood,
        "remark": layer.skipped or layer.note or "",
        "kept": kept,
    }


def _images(runs: Sequence[_Run]) -> str:
    totals = {counts["total"] for run in runs for counts in run.accuracy.values()}
    if not totals:
        return ""
    numbers = " and ".join(f"{total:,}" for total in sorted(totals))
    return f"Accuracy is counted on {numbers} held-out test images."


def _in_order(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _change(before: int | None, after: int | None) -> tuple[str, str]:
    if before is None or after is None:
        return _DASH, ""
    ratio = f" ({before / after:.2f}×)" if after else ""
    large = max(before, after)
    return f"{_count(before, large)} → {_count(after, large)}{ratio}", "good" if after <= before else "bad"


def _accuracy(counts: Mapping[str, int] | None) -> tuple[str, str]:
    if counts is None:
        return _DASH, ""
    correct, total = counts["correct"], counts["total"]
    return f"{100 * correct / total:.2f} % ({correct:,} of {total:,})", ""


def _faster(dense: Latency | None, small: Latency | None, percentile: str) -> tuple[str, str]:
    if dense is None or small is None:
        return _DASH, ""
    before, after = getattr(dense, percentile), getattr(small, percentile)
    if dense.noisy or small.noisy:
        return f"{before * 1e3:.2f} → {after * 1e3:.2f} ms (noisy)", ""
    return (
        f"{before * 1e3:.2f} → {after * 1e3:.2f} ms ({before / after:.2f}×)",
        "good" if after <= before else "bad",
    )


def _count(number: int | None, large: int | None = None) -> str:
    """A number of parameters or MACs, in full up to ten million; written as ``large`` is beside it."""
    if number is None:
        return ""
    if max(number, large or 0) < 10_000_000:
        return f"{number:,}"
    text = f"{number / 1e6:,.1f}"
    return (text if large is not None else re.sub(r"\.0$", "", text)) + " M"
