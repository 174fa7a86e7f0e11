"""Plots of a report as inline SVG, in the colours of the page around them."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from tensorcomp_ext.compress.report import LayerReport

DENSE, COMPRESSED, THIRD = "#8a8a8a", "#2b83ba", "#d7822b"  # apart for colour-blind eyes, in light and dark
_INK = "#010203"  # stands for the page's text colour until the SVG is written
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def network_plot(
    accuracy: Mapping[str, Mapping[str, float]],
    latency: Mapping[str, Mapping[str, tuple[float, float]]],
    prefix: str,
) -> str:
    """Accuracy by stage and latency by batch size of several networks, as one SVG element.

    Arguments:
        accuracy: network -> stage -> fraction of correct answers, 0..1.
        latency: batch size -> network -> (p50, p90) in seconds.
        prefix: makes the SVG's ids unique on the page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = [name for name, data in (("accuracy", accuracy), ("latency", latency)) if data]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 3.0), layout="constrained")
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            if panel == "accuracy":
                _accuracy(axes, accuracy)
            else:
                _latency(axes, latency)
        return svg(figure, prefix)


def layer_plot(layers: Sequence[LayerReport], prefix: str) -> str:
    """Parameters, MACs and median latency of every replaced layer, before and after, as one SVG element."""
    import matplotlib
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[float], list[float]]] = []
    for title, before, after, unit in (
        ("parameters, thousands", "parameters_before", "parameters_after", 1e3),
        ("MACs, millions", "macs_before", "macs_after", 1e6),
    ):
        values = [(getattr(layer, before), getattr(layer, after)) for layer in layers]
        if all(None not in pair for pair in values):
            panels.append((title, [b / unit for b, _ in values], [a / unit for _, a in values]))
    timed = [(layer.latency_before, layer.latency_after) for layer in layers]
    if all(before is not None and after is not None for before, after in timed):
        panels.append(("p50, ms", [b.p50 * 1e3 for b, _ in timed if b], [a.p50 * 1e3 for _, a in timed if a]))
    names = [layer.name or "(model)" for layer in layers]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.26 * len(layers)), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, before_values, after_values) in zip(all_axes, panels, strict=True):
            places = range(len(names))
            axes.barh([p - 0.2 for p in places], before_values, 0.4, color=DENSE, label="dense")
            axes.barh([p + 0.2 for p in places], after_values, 0.4, color=COMPRESSED, label="compressed")
            axes.set_title(title)
        all_axes[0].set_yticks(range(len(names)), names)
        all_axes[0].invert_yaxis()
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(figure, prefix)


def _accuracy(axes: Axes, accuracy: Mapping[str, Mapping[str, float]]) -> None:
    stages = list(dict.fromkeys(stage for values in accuracy.values() for stage in values))
    width = 0.8 / len(stages)
    for number, stage in enumerate(stages):
        places = [k + (number - (len(stages) - 1) / 2) * width for k in range(len(accuracy))]
        heights = [100 * values.get(stage, 0.0) for values in accuracy.values()]
        axes.bar(places, heights, 0.9 * width, color=(DENSE, THIRD, COMPRESSED)[number % 3], label=stage)
    axes.set_xticks(range(len(accuracy)), list(accuracy))
    axes.set_ylim(0, 100)
    axes.set_title("test accuracy, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8)


def _latency(axes: Axes, latency: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Median bars with a whisker up to p90, as multiples of the dense network's: one axis for all batches."""
    names = list(dict.fromkeys(name for values in latency.values() for name in values))
    width = 0.8 / len(names)
    colours = (DENSE, COMPRESSED, THIRD)
    for number, name in enumerate(names):
        for place, values in enumerate(latency.values()):
            if name not in values:
                continue
            scale = next(iter(values.values()))[0]
            p50, p90 = (value / scale for value in values[name])
            axes.bar(
                place + (number - (len(names) - 1) / 2) * width,
                p50,
                0.9 * width,
                yerr=[[0], [max(0.0, p90 - p50)]],
                color=colours[number % 3],
                ecolor=_INK,
                capsize=2,
                label=name if place == 0 else None,
            )
    axes.set_xticks(range(len(latency)), [f"batch {batch}" for batch in latency])
    axes.set_title("latency, p50 to p90, dense = 1")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8)


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element that scales, inherits the text colour and shares no id with another."""
    buffer = io.StringIO()
    empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    return text.replace(_INK, "currentColor").replace("<svg", '<svg aria-hidden="true"', 1)
