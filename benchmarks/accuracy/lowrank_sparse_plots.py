"""Figures of low-rank + sparse compression against its parts, one self-contained page without scripts.

``python -m benchmarks.accuracy.lowrank_sparse_plots RESULTS.json ... --html page.html``

For each network: accuracy against what is stored, both starts over the epochs, errors of the low-rank parts
by layer, and weights before and after (Hawkins et al. 2021, figures 3, 5 and 6). Needs matplotlib.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorcomp_ext.bench.equal_size_summary import EQUAL_SIZE, Way, mean_and_spread, way_label, ways_of
from tensorcomp_ext.cli.plots import COMPRESSED, DENSE, STYLE, THIRD, available, svg
from tensorcomp_ext.cli.report_plots import error_plot, histogram_plot

_COLOURS = {"none": DENSE, "tt": COMPRESSED, "tucker": THIRD, "cp": "#b0457c"}
_MARKS = {"none": "D", "tt": "o", "tucker": "s", "cp": "^"}
_LINES = {"additive": "-", "masking": "--", "none": ":"}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Low-rank + sparse against its parts</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 60rem; font: 1rem/1.5 system-ui, sans-serif; }}
figure {{ margin: 1rem 0; }} figure svg {{ display: block; width: 100%; max-width: 46rem; height: auto; }}
figcaption {{ font-size: 0.875rem; opacity: 0.75; }}
</style>
</head>
<body>
<h1>Low-rank + sparse against its parts</h1>
{sections}
</body>
</html>
"""


def size_plot(results: Mapping[str, Any], prefix: str) -> str:
    """Test accuracy against the stored share of the weights, a line a way; bars are over the seeds.

    The ways with a sparse part once more, which beside decompositions alone are hardly apart.
    """
    import matplotlib
    from matplotlib.figure import Figure

    dense = 100 * results["dense"]["correct"] / results["dense"]["total"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, methods in zip(panels, (("lowrank",), ()), strict=True):
            axes.axhline(dense, color=DENSE, linewidth=0.8, label="dense")
            for way, rows in ways_of(results["rows"]).items():
                if way[3] != "masking" and way[0] in ("sparse", "lowrank-sparse", *methods):
                    _line_of(axes, way, rows)
            axes.set_xlabel("stored share of the weights, %")
        panels[0].set_title("test accuracy, %")
        panels[1].set_title("with a sparse part")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
        return svg(figure, prefix)


def _line_of(axes: Any, way: Way, rows: Sequence[Mapping[str, Any]]) -> None:
    """One way in all its sizes."""
    method, name, mode, _ = way
    points = []
    for storage in sorted({row["storage_asked"] for row in rows}):
        same = [row for row in rows if row["storage_asked"] == storage]
        share = sum(row["stored"] / row["weights"] for row in same) / len(same)
        points.append((100 * share, *mean_and_spread(same)))
    x, y, spread = zip(*points, strict=True)
    axes.errorbar(
        x,
        y,
        [0.0 if value is None else value for value in spread],
        fmt=_MARKS[name] + ("-" if method == "sparse" else _LINES[mode]),
        color=_COLOURS[name],
        linewidth=2.0 if method == "sparse" else 1.0,
        markersize=4,
        capsize=2,
        label=way_label(way),
    )


def start_plot(results: Mapping[str, Any], prefix: str) -> str | None:
    """Accuracy on training images held out over the epochs, of both starts; None where one is missing.

    As in all histories it is that of the network pruned for the next epoch, which dips where much is pruned.
    """
    import matplotlib
    from matplotlib.figure import Figure

    pairs: dict[tuple[str, str, float], dict[str, Sequence[Mapping[str, Any]]]] = {}
    for row in results["rows"]:
        if row["method"] == "lowrank-sparse" and row["seed"] == 0:
            key = (row["format"], row["mode"], row["storage_asked"])
            pairs.setdefault(key, {})[row["init"]] = row["history"]
    pairs = {key: starts for key, starts in pairs.items() if len(starts) == 2}
    if not pairs:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        modes = list(dict.fromkeys(mode for _, mode, _ in pairs))
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for axes, shown in zip(panels, modes, strict=True):
            for (name, mode, _), starts in pairs.items():
                for init, line in (("residual", "-"), ("masking", "--")) if mode == shown else ():
                    places = [entry["epoch"] for entry in starts[init]]
                    values = [100 * entry["held_out"][0] / entry["held_out"][1] for entry in starts[init]]
                    label = f"{_shown(name)}, {init} start"
                    mark = f"{_MARKS[name]}{line}"
                    axes.plot(places, values, mark, color=_COLOURS[name], markersize=4, label=label)
            axes.set_title(f"{shown}: correct of those held out, %")
            axes.set_xlabel("epoch")
        # A format may have both starts in one mode alone.
        handles = {
            text: line
            for axes in panels
            for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7)
        return svg(figure, prefix)


def errors_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Format -> layer -> error of the low-rank part with which additive training begins."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["method"], row["mode"], row["init"]) == ("lowrank-sparse", "additive", "residual"):
            found.setdefault(
                _shown(row["format"]),
                {entry["name"]: entry["error"] for entry in row["layers"] if entry["error"] is not None},
            )
    return found


def _shown(name: str) -> str:
    return "Tucker" if name == "tucker" else name.upper()


def section(results: Mapping[str, Any], number: int) -> str:
    """The figures of one network."""
    name, dense, config = results["network"], results["dense"], results["config"]
    figures = [
        (
            size_plot(results, f"sizes-{number}"),
            f"Correct of {dense['total']:,} test images after {config['epochs']} epochs of "
            f"{config['images']:,} training images; bars are standard deviations over seeds, where there are "
            "several. What is stored are weights of all layers but the last, places of entries not counted.",
        )
    ]
    if starts := start_plot(results, f"starts-{number}"):
        text = f"Both starts, on {config['held_out']:,} training images held out, after each epoch's training"
        figures.append((starts, f"{text} and the pruning before the next."))
    if errors := errors_of(results["rows"]):
        figures.append(
            (error_plot(errors, f"errors-{number}"), f"Low-rank parts of {config['fraction']:.0%}, by layer.")
        )
    for place, row in enumerate(r for r in results["rows"] if "histograms" in r):
        way = way_label((row["method"], row["format"], row["mode"], row["init"]))
        share = f"{row['storage_asked']:.0%}"
        plot = histogram_plot(row["histograms"], f"weights-{number}-{place}")
        figures.append((plot, f"How many weights have which value: {way}, {share} stored."))
    body = "\n".join(
        f"<figure>{plot}<figcaption>{html.escape(text)}</figcaption></figure>" for plot, text in figures
    )
    title = f"{name} on {config['dataset']}"
    return f'<section id="network-{number}">\n<h2>{html.escape(title)}</h2>\n{body}\n</section>'


def page(every: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    return _PAGE.format(sections="\n".join(section(results, k) for k, results in enumerate(every, 1)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="written by benchmarks.accuracy.lowrank_sparse")
    parser.add_argument("--html", type=Path, required=True)
    options = parser.parse_args(arguments)
    every = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    for path, results in zip(options.results, every, strict=True):
        if results.get("suite") != EQUAL_SIZE or not results["rows"]:
            parser.error(f"{path} has no rows of benchmarks.accuracy.lowrank_sparse")
    if not available():
        parser.error("plots need matplotlib, which is not installed")
    options.html.write_text(page(every), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
