"""Accuracy against compression, one panel a data set, from results of ``benchmarks.accuracy.rank_selection``.

``python -m benchmarks.accuracy.rank_selection_plots results/lenet5_rings.json figures/lenet5_rings.svg``
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorcomp_ext.bench.experiment_summary import ways_of

Point = tuple[float, float, float]
"""Ratio, accuracy in per cent, and its standard deviation over seeds."""

STYLES = {
    "dense": ("black", "*"),
    "uniform": ("tab:gray", "s"),
    "l0": ("tab:blue", "o"),
    "reinforce": ("tab:red", "v"),
    "mars": ("tab:green", "D"),
}
VARIANTS = {"σ = 0.1": "^", "σ = 0.3": "<", "frozen at a target": "D"}
"""Markers of the same method under other options, drawn hollow."""


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """By data set and method the points in the order of their ratios; other noise and targets stand apart."""
    found: dict[str, dict[str, list[Point]]] = {}
    for (dataset, method, options), given in ways_of(rows).items():
        values = [100 * row["test"]["correct"] / row["test"]["total"] for row in given]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        point = statistics.fmean(row["ratio"] for row in given), statistics.fmean(values), spread
        chosen = json.loads(options)
        label = f"{method}, σ = {chosen['sigma']}" if "sigma" in chosen else method
        label += ", frozen at a target" if "target" in chosen else ""
        found.setdefault(dataset, {}).setdefault(label, []).append(point)
    return {name: {label: sorted(points) for label, points in each.items()} for name, each in found.items()}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the figure; the format follows the suffix of the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "tensorcomp"  # the same file from the same results
    panels = curves(results["rows"])
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, (dataset, found) in zip(axes[0], panels.items(), strict=True):
        for label, points in found.items():
            method, _, variant = label.partition(", ")
            color, marker = STYLES[method][0], VARIANTS.get(variant, STYLES[method][1])
            ratios, values, spreads = zip(*points, strict=True)
            hollow = "white" if variant else color
            axis.errorbar(
                ratios, values, spreads, color=color, marker=marker, markerfacecolor=hollow, label=label
            )
        axis.set_xscale("log")
        axis.set_xlabel("parameters, times fewer")
        axis.set_ylabel("correct test images, %")
        axis.set_title(f"{results['config']['network']}, {dataset}, {results['config']['epochs']} epochs")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    source, target = map(Path, arguments)
    draw(json.loads(source.read_text(encoding="utf-8")), target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
