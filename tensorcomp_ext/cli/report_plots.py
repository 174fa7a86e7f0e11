"""Plots of spectra, of weights and of a sweep over ranks, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorcomp_ext.cli.plots import COMPRESSED, DENSE, STYLE, THIRD, svg

_COLUMNS = 4
_FLOOR = 1e-6  # values below are rounding; a logarithmic axis needs an end


def spectra_plot(spectra: Mapping[str, Sequence[Mapping[str, Any]]], prefix: str) -> str:
    """Singular values of every layer, a panel each, with a line at the rank that was kept; one SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(spectra) // _COLUMNS)
    columns = min(_COLUMNS, len(spectra))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.9 * columns + 0.4, 1.5 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(spectra) :]:
            axes.set_axis_off()
        for axes, (name, curves) in zip(panels, spectra.items(), strict=False):
            for curve, colour in zip(curves, (COMPRESSED, THIRD), strict=False):
                values = [max(v, _FLOOR) for v in curve["values"]]
                step = (curve["count"] - 1) / max(1, len(values) - 1)
                places = [1 + step * k for k in range(len(values))]
                axes.semilogy(places, values, color=colour, linewidth=1.2, label=curve["unfolding"])
                if curve["rank"] is not None:
                    axes.axvline(curve["rank"], color=colour, linewidth=0.8, linestyle="--")
            axes.set_title(name or "(model)", fontsize=8)
            axes.tick_params(labelsize=7)
        handles = {
            text: line
            for axes in panels
            for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        return svg(figure, prefix)


def histogram_plot(histograms: Mapping[str, Mapping[str, Any]], prefix: str) -> str:
    """Weights of every layer by value, before and after, a panel each; one SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(histograms) // _COLUMNS)
    columns = min(_COLUMNS, len(histograms))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.9 * columns + 0.4, 1.5 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(histograms) :]:
            axes.set_axis_off()
        for axes, (name, counted) in zip(panels, histograms.items(), strict=False):
            limit, bins = counted["limit"], len(counted["before"])
            edges = [limit * (2 * k / bins - 1) for k in range(bins + 1)]
            for label, colour, key in (("dense", DENSE, "before"), ("compressed", COMPRESSED, "after")):
                axes.stairs(counted[key], edges, color=colour, linewidth=1.2, label=label)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_title(name or "(model)", fontsize=8)
            axes.tick_params(labelsize=7)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(figure, prefix)


def error_plot(errors: Mapping[str, Mapping[str, float]], prefix: str) -> str:
    """Relative errors of low-rank parts by layer, one line for each of up to three series; one SVG.

    Args:
        errors: series -> layer -> ``|A - L| / |A|``; layers in the order in which they first come.
        prefix: makes the SVG's ids unique on the page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for series in errors.values() for name in series))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(min(7.2, 2.4 + 0.3 * len(names)), 2.8), layout="constrained")
        axes = figure.add_subplot()
        marks = zip(errors.items(), (COMPRESSED, THIRD, DENSE), "osD", strict=False)
        for (label, series), colour, mark in marks:
            places = [k for k, name in enumerate(names) if name in series]
            values = [series[names[k]] for k in places]
            axes.plot(places, values, f"{mark}-", color=colour, linewidth=1.0, markersize=4, label=label)
        axes.set_xticks(range(len(names)), [name or "(model)" for name in names], rotation=90, fontsize=7)
        axes.set_ylim(0, None)
        axes.set_title("relative error of the low-rank part")
        if len(errors) > 1:
            axes.legend(fontsize=8)
        return svg(figure, prefix)


def pareto_plot(points: Sequence[Mapping[str, Any]], prefix: str) -> str:
    """Latency against accuracy (against one minus the relative error without data) of a sweep; one SVG.

    The points no other beats in both are joined; the network before compression is grey.
    """
    import matplotlib
    from matplotlib.figure import Figure

    scored = "accuracy" in points[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        panels = (("latency p50, ms", lambda p: p["latency"]["p50"] * 1e3), ("parameters", _parameters))
        for index, (label, cost) in enumerate(panels):
            axes = figure.add_subplot(1, 2, index + 1)
            for point in points:
                dense = point["rank"] == "dense"
                x, y = cost(point), quality(point)
                axes.plot(x, y, "s" if dense else "o", color=DENSE if dense else COMPRESSED)
                axes.annotate(point["rank"], (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
            best = pareto([(cost(point), quality(point)) for point in points])
            axes.plot([x for x, _ in best], [y for _, y in best], color=THIRD, linewidth=0.8, zorder=0)
            axes.set_xlabel(label)
            axes.set_title("test accuracy, %" if scored else "1 − relative error of the outputs")
        return svg(figure, prefix)


def quality(point: Mapping[str, Any]) -> float:
    """What a sweep's point is good for: per cent of correct answers, or one minus the outputs' error."""
    if "accuracy" in point:
        return 100 * point["accuracy"]["correct"] / point["accuracy"]["total"]
    return 1.0 - (point["output_error"] or 0.0)


def _parameters(point: Mapping[str, Any]) -> float:
    return float(point["parameters"])


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, quality) pairs, those of which none costs less or as much and is better; by cost."""
    kept: list[tuple[float, float]] = []
    for cost, good in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or good > kept[-1][1]:
            kept.append((cost, good))
    return kept
